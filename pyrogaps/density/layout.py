"""Layout of one datapoint's latent sites in a flat unconstrained vector."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor


def plate_dim(message: Any, plate: str) -> int | None:
    """The (negative) batch dimension of the vectorised `plate` at a site, None where it does not enclose it."""
    for frame in message["cond_indep_stack"]:
        if frame.name == plate and frame.vectorized:
            return int(frame.dim)
    return None


def rows_first(tensor: Tensor, axis: int, rows: int) -> Tensor:
    """Sum `tensor` over all but its row axis (negative `axis`): shape `(rows,)`.

    A tensor without that axis, or of size one along it, is the same for every row.
    """
    if tensor.dim() < -axis:
        return tensor.sum().expand(rows)
    flat = tensor.movedim(axis, 0).flatten(1).sum(-1) if tensor.dim() > 1 else tensor
    return flat.expand(rows)


@dataclass(frozen=True)
class Site:
    """A latent site: its columns in the flat vector and the shape of its value.

    `shape` is that of one datapoint's unconstrained value, without the row axis; `axis` (negative) is the position
    of the row axis in a batch. `event_dim` and `batch_dims` are the model distribution's. A discrete site's columns
    hold numbers of states, of the `num_states` that an element has; it is 0 for a continuous one.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    axis: int
    event_dim: int
    unconstrained_event_dim: int
    batch_dims: int
    num_states: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + self.size)

    @property
    def num_padded(self) -> int:
        """Number of leading axes of size one in `shape` that only separate rows from the site's own axes."""
        return len(self.shape) - self.batch_dims - self.unconstrained_event_dim

    @property
    def batch_axis(self) -> int:
        """The row axis among the batch dimensions, as in a log-probability."""
        return self.axis + self.unconstrained_event_dim

    def unflatten(self, flat: Tensor) -> Tensor:
        """From `(*, rows, dim)` to the site's unconstrained value, rows at `axis`; leading axes stay leading."""
        chunk = flat[..., self.columns]
        value = chunk.reshape(*chunk.shape[:-1], *self.shape)
        return value.movedim(-1 - len(self.shape), self.axis)

    def flatten(self, value: Tensor) -> Tensor:
        """From the site's unconstrained value to its columns `(*, rows, size)`."""
        value = value.movedim(self.axis, -1 - len(self.shape))
        return value.flatten(-len(self.shape)) if self.shape else value.unsqueeze(-1)

    def sum_to_rows(self, log_prob: Tensor, lead: int = 0) -> Tensor:
        """Sum a `(lead..., *batch)` log-probability over all but its `lead` first axes and its row axis."""
        rest = log_prob.movedim(self.batch_axis, lead)
        return rest.flatten(lead + 1).sum(-1) if rest.dim() > lead + 1 else rest


def distribution_mask(fn: Any, message_mask: Any) -> Tensor | None:
    """The mask over elements of a site's value: that of `poutine.mask` and of `.mask(...)` at any depth of `fn`.

    Returns None where nothing is masked, else a boolean tensor that broadcasts to the value's shape.
    """
    masks: list[tuple[Any, int]] = [(message_mask, fn.event_dim)]
    inner = fn
    while inner is not None:
        if isinstance(inner, MaskedDistribution):
            masks.append((inner._mask, inner.event_dim))
        inner = getattr(inner, "base_dist", None)
    total: Tensor | None = None
    for mask, event_dim in masks:
        if mask is None or mask is True:
            continue
        tensor = torch.as_tensor(mask, dtype=torch.bool)
        tensor = tensor.reshape(tensor.shape + (1,) * event_dim)
        total = tensor if total is None else total & tensor
    return total


def unconstrained_mask(mask: Tensor | None, fn: Any, site: Site) -> Tensor | None:
    """A `distribution_mask` of the value for the unconstrained value, whose events may have fewer dimensions."""
    fewer = fn.event_dim - site.unconstrained_event_dim
    if mask is None or fewer <= 0:
        return mask
    return mask.flatten(-1 - fewer) if site.unconstrained_event_dim else mask.flatten(-fewer).all(-1)


def leaf(fn: Any) -> Any:
    """The distribution inside `Independent` and mask wrappers."""
    while getattr(fn, "base_dist", None) is not None and type(fn).__name__ in ("Independent", "MaskedDistribution"):
        fn = fn.base_dist
    return fn


def unmasked(fn: Any) -> Any:
    """`fn` without the masks it carries, so that the caller can apply each mask only once."""
    if isinstance(fn, MaskedDistribution):
        return unmasked(fn.base_dist)
    if type(fn).__name__ == "Independent" and isinstance(getattr(fn, "base_dist", None), MaskedDistribution):
        return unmasked(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    return fn
