"""Sites of one model run: values, pointwise log-likelihoods, and the names of their axes."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyrogaps.density.layout import distribution_mask
from pyrogaps.density.structure import is_factor
from pyrogaps.errors import InputError

DATAPOINT = "datapoint"
RESERVED = ("chain", "draw", DATAPOINT)


@dataclass(frozen=True)
class Record:
    """A site of one run: its `value` `(*batch, *event)` and, of an observed site, `log_likelihood` `(*batch)` in nats.

    `plates` are the vectorised plates around it, by their (negative) batch dimension, `enclosing` the names of all.
    """

    value: Tensor
    event_dim: int
    plates: dict[int, str]
    enclosing: frozenset[str]
    log_likelihood: Tensor | None = None
    latent: bool = False

    @property
    def batch_dims(self) -> int:
        return self.value.dim() - self.event_dim

    def axis_of(self, plate: str) -> int | None:
        """The (negative) axis of `value` along which `plate` lies; None where the value does not vary along it."""
        axis = next((dim - self.event_dim for dim, name in self.plates.items() if name == plate), None)
        return axis if axis is not None and -axis <= self.value.dim() else None

    def dims(self, name: str, names: "Names") -> list[str | None]:
        """Names of the value's axes; None for an axis of size one that no plate makes, put there by Pyro."""
        result: list[str | None] = []
        unnamed = 0
        for position, size in enumerate(self.value.shape):
            in_batch = position < self.batch_dims
            plate = self.plates.get(position - self.batch_dims) if in_batch else None
            if plate is not None:
                result.append(names.of_plate(plate))
            elif in_batch and size == 1:
                result.append(None)
            else:
                result.append(f"{name}_dim_{unnamed}")
                unnamed += 1
        return result


@dataclass(frozen=True)
class Names:
    """Names of dimensions: the data plate's is "datapoint", another plate's its own, unless it is taken."""

    data_plate: str | None
    variables: Collection[str]

    def of_plate(self, plate: str) -> str:
        if plate == self.data_plate:
            return DATAPOINT
        return f"{plate}_plate" if plate in self.variables or plate in RESERVED else plate


class RecordSites(Messenger):
    """Keeps a `Record` of every latent, observed and deterministic site; put it around the handler that sets values.

    A `pyro.factor` holds no data and is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, Record] = {}

    def _pyro_post_sample(self, message: Any) -> None:
        if site_is_subsample(message) or is_factor(message["fn"]):
            return
        name = message["name"]
        if name in RESERVED:
            raise InputError(f"site '{name}': a dimension of the tree has this name. Rename the site")
        self.sites[name] = _record(message)


def _record(message: Any) -> Record:
    fn, value, frames = message["fn"], message["value"], message["cond_indep_stack"]
    if message["infer"].get("_deterministic"):
        return _deterministic(value, fn.event_dim, frames)
    plates = {int(frame.dim): frame.name for frame in frames if frame.vectorized}
    enclosing = frozenset(frame.name for frame in frames)
    if not message["is_observed"]:
        return Record(value, fn.event_dim, plates, enclosing, latent=True)
    whole = value.expand(torch.broadcast_shapes(value.shape, fn.batch_shape + fn.event_shape))
    return Record(whole, fn.event_dim, plates, enclosing, _log_likelihood(message))


def _deterministic(value: Tensor, event_dim: int, frames: Any) -> Record:
    """The record of a deterministic site.

    Pyro takes its value for one event by default. Axes that fit all plates around the site count as batch axes
    instead. Plates along which the value does not vary are left out.
    """
    vectorised = {int(frame.dim): frame for frame in frames if frame.vectorized}
    nesting = -min(vectorised, default=0)
    if event_dim == value.dim() >= nesting:
        fits = all(value.shape[nesting + dim] == frame.size for dim, frame in vectorised.items())
        event_dim -= nesting * fits
    batch = value.shape[: value.dim() - event_dim]
    plates = {dim: frame.name for dim, frame in vectorised.items() if -dim <= len(batch) and batch[dim] == frame.size}
    return Record(value, event_dim, plates, frozenset(frame.name for frame in frames))


def _log_likelihood(message: Any) -> Tensor:
    """log p of each observation `(*batch)`, without scales, in double precision; NaN where a mask hides all of it."""
    fn, value = message["fn"], message["value"]
    log_prob: Tensor = fn.log_prob(value).double()
    mask = distribution_mask(fn, message["mask"])
    if mask is None:
        seen = torch.ones_like(log_prob, dtype=torch.bool)
    else:
        shape = torch.broadcast_shapes(mask.shape, value.shape, fn.batch_shape + fn.event_shape)
        seen = mask.expand(shape)
        seen = seen.flatten(-fn.event_dim).any(-1) if fn.event_dim else seen
        log_prob = log_prob.expand(torch.broadcast_shapes(log_prob.shape, seen.shape))
    if bool((torch.isnan(log_prob) & seen).any()):
        raise InputError(
            f"site '{message['name']}': its log-likelihood is NaN at some draws of the guide. Check the model's "
            "parameters and the guide's scales"
        )
    return torch.where(seen, log_prob, torch.nan)
