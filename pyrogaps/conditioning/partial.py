"""A model with part of its data withheld: log p(C, z), the marginal of log p(C, Cbar, z)."""

import functools
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrogaps.conditioning.conditions import Shown, hidden
from pyrogaps.conditioning.leaks import NUM_CHECKED_ROWS, observed
from pyrogaps.density import IndexedData, JointDensity
from pyrogaps.density.layout import distribution_mask, leaf
from pyrogaps.density.rows import same_density
from pyrogaps.density.runs import evaluating
from pyrogaps.errors import InputError
from pyrogaps.streams import seeded

ShownElements = dict[str, Tensor]


class ShowOnly(Messenger):
    """Masks withheld data in the likelihood; `shown` has masks over the observed sites' values."""

    def __init__(self, shown: ShownElements) -> None:
        super().__init__()
        self.shown = shown

    def _pyro_sample(self, message: Any) -> None:
        if not message["is_observed"] or message["name"] not in self.shown:
            return
        fn, keep = message["fn"], self.shown[message["name"]]
        before = distribution_mask(fn, None)
        keep = keep if before is None else keep & before
        inner = leaf(fn)
        if inner.event_dim:
            keep = keep.flatten(-inner.event_dim).all(-1)
        shape = torch.broadcast_shapes(inner.batch_shape, keep.shape)
        masked = inner.expand(shape).mask(keep.expand(shape))
        message["fn"] = masked.to_event(fn.event_dim - inner.event_dim)


def partially_observed(joint: JointDensity, conditions: Shown) -> JointDensity:
    r"""The density of the shown data, $\log p(C_n, z)$, in the latent space of `joint`, in nats.

    Observed sites must factorise over shown and withheld elements given the latents: a likelihood whose shown elements
    depend on withheld ones (autoregressive) has no such marginal.

    Raises `InputError` naming the site, where it does not.
    """

    def shown(args: tuple[Any, ...], indices: Tensor) -> ShownElements:
        return shown_elements(joint, conditions, args, indices)

    @functools.wraps(joint.model)
    def model(*args_and_shown: Any) -> Any:
        *args, elements = args_and_shown
        with ShowOnly(elements):
            return joint.model(*args)

    def fetch(indices: Tensor) -> tuple[Any, ...]:
        args = joint.data.fetch(indices)
        return *args, shown(args, indices)

    partial = JointDensity(model, IndexedData(joint.num_datapoints, fetch), joint.plate)
    _check_independence(joint, partial, conditions)
    return partial


def shown_elements(joint: JointDensity, conditions: Shown, args: tuple[Any, ...], indices: Tensor) -> ShownElements:
    """Masks over the observed sites' values that depend on withheld data, True at elements that do not.

    They are found by running the model on data in which every withheld element is changed.
    """
    masks = conditions.masks(args)
    with seeded(0, "shown"), evaluating(joint.model), joint.plates(indices), torch.no_grad():
        before, after = (observed(joint, given) for given in (args, hidden(args, masks)))
    result = {}
    for name, (value, fn) in before.items():
        same = value == after[name][0]
        if bool(same.all()):
            continue
        inner = leaf(fn)
        if inner.event_dim:
            events = same.flatten(-inner.event_dim)
            if not torch.equal(events.all(-1), events.any(-1)):
                raise InputError(
                    f"site '{name}': a {type(inner).__name__} cannot be observed in part. Show or withhold whole "
                    "events, or use a likelihood with independent elements"
                )
        result[name] = same
    return result


def _check_independence(joint: JointDensity, partial: JointDensity, conditions: Shown) -> None:
    """Check that the density of the shown data does not depend on withheld data."""
    indices = torch.arange(min(NUM_CHECKED_ROWS, joint.num_datapoints))
    args = partial.fetch(indices)
    other = *hidden(args[:-1], conditions.masks(args[:-1])), args[-1]
    flat = 0.1 * torch.linspace(-1, 1, len(indices) * joint.dim, dtype=joint.dtype).reshape(len(indices), joint.dim)
    flat = flat.to(joint.device)
    with evaluating(joint.model), torch.no_grad():
        before, after = (partial.total(flat, given, indices) for given in (args, other))
    assert isinstance(before, Tensor)
    assert isinstance(after, Tensor)
    if not same_density(before, after):
        raise InputError(
            "conditions: the density of the shown data depends on withheld data (an autoregressive likelihood, or "
            "withheld inputs of the model). Choose conditions under which both parts are independent given the latents"
        )
