"""Discrete latent sites of a model: which can be enumerated, and their values."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyrogaps.density.contraction import check_countable
from pyrogaps.density.layout import leaf, plate_dim, unmasked
from pyrogaps.density.supports import support_of
from pyrogaps.errors import InputError

# Values of one element of a site, such as an event of several Bernoulli variables.
MAX_VALUES = 1 << 14


@dataclass(frozen=True)
class Discrete:
    """A discrete latent of the model that is summed out; it has no columns in `z`.

    Attributes:
        name: of the site.
        values: `(K, *event_shape)`, the K values of one element, in the order of the sum.
        cardinality: K.
        shape: the batch shape of one datapoint, without the data plate: plates inside it, whose elements are summed
            independently.
        event_dim: number of event dimensions.
        axis: the batch dimension (negative) of the rows.
    """

    name: str
    values: Tensor = field(compare=False, repr=False)
    cardinality: int
    shape: tuple[int, ...]
    event_dim: int
    axis: int

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The event shape of a value."""
        return tuple(self.values.shape[1:])

    @property
    def log_states(self) -> float:
        """The logarithm of the number of joint states of its elements."""
        return math.prod(self.shape) * math.log(self.cardinality)

    def placed(self, rows: Tensor, *, drop_rows: bool = False) -> Tensor:
        """From `(R, *shape)` to the batch shape in the model, rows at `axis`; `drop_rows` for the only row."""
        if drop_rows:
            return rows.reshape(self.shape)
        padded = max(0, -1 - self.axis - len(self.shape))
        return rows.reshape(len(rows), *[1] * padded, *self.shape).movedim(0, self.axis)

    def rows_of(self, numbers: Tensor) -> Tensor:
        """The inverse of `placed`; without a data plate, of numbers without an axis of rows: `(1, *shape)`."""
        return numbers.reshape(1, *self.shape) if numbers.dim() < -self.axis else numbers.movedim(self.axis, 0)

    def number_of(self, value: Tensor) -> Tensor:
        """The numbers of values `(*batch, *event_shape)` among the K, `(*batch)`."""
        own = self.values.reshape(self.cardinality, *[1] * (value.dim() - self.event_dim), *self.event_shape)
        same = own == value
        return (same.flatten(-self.event_dim).all(-1) if self.event_dim else same).long().argmax(0)


def refuse_enumerated(sites: Mapping[str, Discrete], what: str) -> None:
    """Refuse discrete latents where `what` has no place for their sum."""
    for name in sites:
        raise InputError(
            f"site '{name}': {what} for models with discrete latents is not supported. Sum the site out in the model, "
            "with a likelihood that is the mixture (such as dist.MixtureSameFamily)"
        )


def is_discrete(fn: Any) -> bool:
    """Whether a distribution is of a discrete variable."""
    return bool(fn.has_enumerate_support or support_of(fn).is_discrete)


def is_categorical(fn: Any) -> bool:
    """Whether `fn` enumerates without reading tensors, and scores its own values fast: its own method is used."""
    return type(unmasked(fn)).__name__ in ("Categorical", "Bernoulli")


def read_discrete(name: str, message: Any, plate: str | None, lead: int) -> Discrete:
    """A discrete latent as it is enumerated; `InputError` where that is impossible."""
    fn = message["fn"]
    values = values_of(fn, name)
    shape, axis = list(fn.batch_shape), lead
    if plate is not None:
        dim = plate_dim(message, plate)
        assert dim is not None
        del shape[dim]
        axis = dim
    return Discrete(name, values, len(values), tuple(shape), fn.event_dim, axis)


def values_of(fn: Any, name: str) -> Tensor:
    """The values `(K, *event_shape)` of one element of `fn`, the distribution of site `name`."""
    inner = unmasked(fn)
    number = getattr(inner, "reinterpreted_batch_ndims", 0)
    if not number:
        return _own_values(inner, name)
    single = values_of(inner.base_dist, name)
    shape = inner.event_shape[:number]
    elements = math.prod(shape)
    if elements * math.log(len(single)) > math.log(MAX_VALUES):
        raise InputError(
            f"site '{name}': an event of {elements} discrete elements has {len(single)}^{elements} values, too many to "
            "sum over. Put the elements in a plate instead of to_event if they are independent given the data, or "
            "let the guide draw the site"
        )
    places = torch.tensor(list(itertools.product(range(len(single)), repeat=elements)), device=single.device)
    return single[places].reshape(-1, *shape, *single.shape[1:])


def _own_values(fn: Any, name: str) -> Tensor:
    kind = type(leaf(fn)).__name__
    if not fn.has_enumerate_support:
        raise InputError(
            f"site '{name}': a {kind} has infinitely many values, or too many, to sum over. Truncate it, as in "
            "pyro.sample(..., dist.Categorical(logits=...)) over its first values, or sum the site out in the model"
        )
    check_countable(fn, name)
    try:
        values: Tensor = fn.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise InputError(
            f"site '{name}': the values of its {kind} cannot be enumerated ({error}). Give all elements the same "
            "number of values, or sum the site out in the model"
        ) from error
    return values.reshape(len(values), *fn.event_shape)
