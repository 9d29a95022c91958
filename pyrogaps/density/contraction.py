"""Sums and products of log-densities over named dimensions, in log space throughout.

Pyro's own ring multiplies exponentials: where two factors of one state differ by more than an exponent's range (88
nats in single precision), their product is 0 although their sum in log space is not. Here factors are added as
logarithms, and one variable is summed out after the other.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from pyro.ops.rings import LogRing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyrogaps.errors import InputError

# Elements of a tensor for each datapoint, above which a sum over states is refused: 64 MB in single precision.
MAX_ELEMENTS = 1 << 24


MARKOV_REMEDY = (
    "Write chains as `for t in pyro.markov(range(T))`, with history= as many steps as a site looks back, or sum the "
    "site out in the model"
)


class TooManyStates(Exception):
    """A sum over states needs a tensor with `elements` for each datapoint."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements


class BoundedStates(TorchDispatchMode):
    """Refuses operations whose broadcast result has more than `MAX_ELEMENTS` for each of `rows`, before they run."""

    def __init__(self, rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rows = rows

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [leaf.shape for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if torch.Tag.pointwise in getattr(func, "tags", ()) and shapes:
            elements = math.prod(torch.broadcast_shapes(*shapes)) // self._rows
            if elements > MAX_ELEMENTS:
                raise TooManyStates(elements)
        return func(*args, **(kwargs or {}))


class LogSumRing(LogRing):
    """Pyro's ring of log-densities, for `pyro.ops.contract`, without its exponentials.

    Tensors name their dimensions in `_pyro_dims`, a string of symbols. `rows` is the size of the datapoints' dimension.
    """

    def __init__(self, dim_to_size: dict[str, int], rows: int) -> None:
        super().__init__(dim_to_size=dim_to_size)  # type: ignore[no-untyped-call]
        self._rows = rows

    def sumproduct(self, terms: Iterable[Tensor], dims: Iterable[str]) -> Tensor:
        """The sum over `dims` of the product of `terms`: that variable first whose factors have the fewest states."""
        left, dims = list(terms), set(dims)
        while dims := dims.intersection("".join(map(names, left))):
            first = min(sorted(dims), key=lambda dim: self._size(dim, left))
            linked = [term for term in left if first in names(term)]
            left = [term for term in left if first not in names(term)]
            rest = "".join(map(names, left))
            alone = {dim for dim in dims if dim not in rest and any(dim in names(term) for term in linked)}
            left.append(self._summed(self._added(linked), alone))
        return self._added(left)

    def _size(self, dim: str, terms: list[Tensor]) -> int:
        symbols = set("".join(names(term) for term in terms if dim in names(term)))
        return math.prod(self._dim_to_size[symbol] for symbol in symbols)

    def _added(self, terms: list[Tensor]) -> Tensor:
        symbols = "".join(sorted(set("".join(map(names, terms)))))
        elements = math.prod(self._dim_to_size[symbol] for symbol in symbols) // self._rows
        if elements > MAX_ELEMENTS:
            raise TooManyStates(elements)
        aligned = [_aligned(term, symbols) for term in terms]
        total = aligned[0]
        for term in aligned[1:]:
            total = total + term
        return named(total.expand([self._dim_to_size[symbol] for symbol in symbols]), symbols)

    @staticmethod
    def _summed(term: Tensor, dims: set[str]) -> Tensor:
        symbols = names(term)
        rest = "".join(symbol for symbol in symbols if symbol not in dims)
        return named(log_sum_exp(term, [symbols.index(dim) for dim in sorted(dims)]), rest)


def log_sum_exp(tensor: Tensor, dims: list[int]) -> Tensor:
    """The logarithm of the sum of exponentials over `dims`; where all are -infinity its gradient is 0, not NaN."""
    with torch.no_grad():
        top = tensor.amax(dims, keepdim=True)
        top = torch.where(top == -math.inf, torch.zeros_like(top), top)
    total = (tensor - top).exp().sum(dims)
    none = total == 0  # NaN is not, and stays
    result = torch.where(none, torch.ones_like(total), total).log() + top.reshape(total.shape)
    return torch.where(none, torch.full_like(total, -math.inf), result)


def names(term: Tensor) -> str:
    """The symbols of a packed tensor's dimensions."""
    return term._pyro_dims  # type: ignore[attr-defined, no-any-return]


def named(tensor: Tensor, symbols: str) -> Tensor:
    """A view of `tensor` with these symbols for its dimensions."""
    view = tensor[...]
    view._pyro_dims = symbols  # type: ignore[attr-defined]
    return view


def _aligned(term: Tensor, symbols: str) -> Tensor:
    """`term` with its dimensions in the order of `symbols`, of size one where it lacks them."""
    own = names(term)
    ordered = term.permute([own.index(symbol) for symbol in symbols if symbol in own])
    sizes = iter(ordered.shape)
    return ordered.reshape([next(sizes) if symbol in own else 1 for symbol in symbols])


def too_many(names: list[str], elements: int, element_size: int) -> InputError:
    """The error for a sum over states that needs too large a tensor."""
    gigabytes = elements * element_size / 1e9
    return InputError(
        f"site '{names[0]}': summing out the discrete latents needs {elements:,} joint states at once for each "
        f"datapoint, {gigabytes:,.1f} GB. {MARKOV_REMEDY}"
    )


def check_countable(fn: Any, name: str) -> None:
    """Refuse a distribution with more values than a tensor of them may have, before there is one."""
    total = torch.as_tensor(getattr(fn, "total_count", 0))
    if bool((total >= MAX_ELEMENTS).any()):
        raise too_many([name], int(total.max()) + 1, torch.finfo(torch.get_default_dtype()).bits // 8)
