"""Factors of a model that depend on enumerated latents, and their sum over all states."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from opt_einsum import get_symbol  # type: ignore[import-untyped]
from pyro.ops.contract import contract_to_tensor
from torch import Tensor

from pyrogaps.density.contraction import MARKOV_REMEDY, LogSumRing, TooManyStates, named, too_many
from pyrogaps.errors import InputError

# The symbol of the datapoints' dimension. `get_symbol` gives letters to all others.
ROWS = "*"


class Factor(NamedTuple):
    """A log-density `term` of a site, which depends on enumerated latents; `is_prior` where the site is latent."""

    term: Tensor
    message: Any
    is_prior: bool


class Factors:
    """The factors of one run that depend on enumerated latents, and the sum over these.

    Args:
        plate: the data plate's name; None where rows have the dimension `first_dim + 1`, or there is only one.
        rows: R.
        first_dim: the first dimension of enumerated latents; all of them are left of it.
    """

    def __init__(self, plate: str | None, rows: int, first_dim: int) -> None:
        self.plate, self.rows, self.first_dim = plate, rows, first_dim
        self.factors: list[Factor] = []

    def __bool__(self) -> bool:
        return bool(self.factors)

    def holds(self, term: Tensor, event_dim: int = 0) -> bool:
        """Whether `term` has a dimension of an enumerated latent."""
        return any(size > 1 for size in term.shape[: max(0, term.dim() - event_dim + self.first_dim + 1)])

    def add(self, term: Tensor, message: Any, *, is_prior: bool) -> None:
        """Hold a factor; the dimensions of `message` are read when all are there."""
        self.factors.append(Factor(term, message, is_prior))

    def best(self, factor: Factor) -> Tensor:
        """The largest value of a factor over all states, for each element of its plates."""
        lead = max(0, factor.term.dim() + self.first_dim + 1)
        return factor.term.amax(tuple(range(lead))) if lead else factor.term

    def at(self, positions: Mapping[str, Tensor]) -> list[tuple[Tensor, Any]]:
        """The factors at one state, with their messages: `positions` of each site's value, in its batch shape."""
        names = {}
        for factor in self.factors:
            infer = factor.message["infer"]
            if (dim := infer.get("_enumerate_dim")) is not None:
                names[infer["_dim_to_id"][dim]] = factor.message["name"]
        chosen = []
        for term, message, _ in self.factors:
            own = term
            for dim in range(-term.dim(), self.first_dim + 1):
                if term.shape[dim] > 1:
                    places = positions[names[_identity(message, dim)]]
                    places = places.reshape([1] * (own.dim() - places.dim()) + list(places.shape))
                    own = torch.take_along_dim(own, places, dim)
            own = _expanded(
                own.reshape(own.shape[max(0, own.dim() + self.first_dim + 1) :]), _inner(message, self.plate)
            )
            chosen.append((own, message))
        return chosen

    def total(self, *, prior: bool = False) -> Tensor:
        """log sum over y of the product of all factors, or of the latent sites' alone, `(R,)`."""
        factors = [factor for factor in self.factors if factor.is_prior or not prior]
        symbols = Symbols(self.plate, self.first_dim)
        packed = [symbols.packed(factor, self.rows) for factor in factors]
        tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for ordinal, term in sorted(packed, key=lambda pair: len(pair[0])):
            tree.setdefault(ordinal, []).append(term)
        ring = LogSumRing({**symbols.sizes, ROWS: self.rows}, self.rows)
        try:
            result: Tensor = contract_to_tensor(tree, symbols.states, target_ordinal=frozenset([ROWS]), ring=ring)
        except NotImplementedError as error:
            raise InputError(
                f"site '{factors[0].message['name']}': discrete latents that depend on each other across two plates "
                "cannot be summed out. Use a plain loop for one of the plates, or sum the site out in the model"
            ) from error
        except TooManyStates as error:
            raise too_many(
                [factor.message["name"] for factor in factors], error.elements, term.element_size()
            ) from None
        return result


class Symbols:
    """Names of tensor dimensions: one for each plate, for each enumerated latent, and `ROWS` for the datapoints."""

    def __init__(self, plate: str | None, first_dim: int) -> None:
        self.plate, self.first_dim = plate, first_dim
        self.sizes: dict[str, int] = {}
        self.states: set[str] = set()
        self._plates: dict[Any, str] = {}

    def packed(self, factor: Factor, rows: int) -> tuple[frozenset[str], Tensor]:
        """The plates of a factor, as symbols, and its term without the dimensions of size one."""
        term, message = factor.term, factor.message
        frames = {frame.dim: frame for frame in message["cond_indep_stack"] if frame.vectorized}
        term = _expanded(term, _inner(message, self.plate))
        ordinal, symbols = {ROWS}, []
        for dim in range(-term.dim(), 0):
            symbol = self._symbol(dim, term.shape[dim], frames, message)
            if dim > self.first_dim:
                ordinal.add(symbol)
            elif term.shape[dim] > 1:
                self.states.add(symbol)
            if term.shape[dim] > 1:
                symbols.append(symbol)
                self.sizes[symbol] = term.shape[dim]
        return frozenset(ordinal), named(term.reshape([size for size in term.shape if size > 1]), "".join(symbols))

    def _symbol(self, dim: int, size: int, frames: Mapping[int, Any], message: Any) -> str:
        if dim <= self.first_dim:
            return get_symbol(1 + 2 * _identity(message, dim)) if size > 1 else ""
        if dim in frames:
            return ROWS if frames[dim].name == self.plate else self._plate(frames[dim].name)
        if self.plate is None and dim == self.first_dim + 1:
            return ROWS
        return self._plate((dim, size))  # independent elements outside any plate

    def _plate(self, key: Any) -> str:
        return self._plates.setdefault(key, get_symbol(2 * len(self._plates)))


def _identity(message: Any, dim: int) -> int:
    """The number of the enumerated latent that has the dimension `dim` at a site."""
    identity = message["infer"].get("_dim_to_id", {}).get(dim)
    if identity is None:
        raise InputError(
            f"site '{message['name']}': it depends on a discrete latent beyond the history of its pyro.markov chain. "
            f"{MARKOV_REMEDY}"
        )
    return int(identity)


def _inner(message: Any, plate: str | None) -> dict[int, int]:
    """Sizes of the plates around a site, by dimension, but the data plate's."""
    return {frame.dim: frame.size for frame in message["cond_indep_stack"] if frame.vectorized and frame.name != plate}


def _expanded(term: Tensor, sizes: Mapping[int, int]) -> Tensor:
    """`term` with its full size along plates."""
    if not sizes:
        return term
    lead = max(term.dim(), -min(sizes))
    shape = [1] * (lead - term.dim()) + list(term.shape)
    for dim, size in sizes.items():
        shape[dim] = max(size, shape[dim])
    return term.expand(shape)
