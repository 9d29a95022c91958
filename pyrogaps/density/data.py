"""Data sets: a number of datapoints, fetched by index."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.data import DataLoader, Dataset

from pyrogaps.errors import InputError, counted
from pyrogaps.guard import failures_named
from pyrogaps.settings import Count, checked

# Arguments that are the same for every datapoint, beside functions and tensors without dimensions.
CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@checked("IndexedData")
@dataclass(frozen=True)
class IndexedData:
    """A data set fetched by index, for models whose arguments are not plain tensors.

    `fetch(indices)` takes a one-dimensional integer tensor, which may repeat an index, and returns the
    model's positional arguments for those datapoints, in the order of `indices`. Pad ragged data to one
    length for the whole set, so that every datapoint has latents of the same size.

    `names` has one for each datapoint, such as those of cells, or is None; ledgers keep them.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> data = pg.IndexedData(len(x), lambda rows: (x[rows],))
        >>> pg.elbo(model, guide, data).value.shape
        torch.Size([6])
    """

    num_datapoints: Count
    fetch: Callable[[Tensor], tuple[Any, ...]]
    names: Sequence[str] | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        number, fetch = self.num_datapoints, self.fetch
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            got = number if isinstance(number, bool | float) else type(number).__name__
            raise InputError(f"IndexedData.num_datapoints: must be a whole number, got {got}")
        if not callable(fetch):
            raise InputError(f"IndexedData.fetch: must be a function of indices, got {type(fetch).__name__}")
        if self.names is not None and len(self.names) != number:
            raise InputError(
                f"IndexedData.names: there are {len(self.names):,} of them for {counted(int(number), 'datapoint')}. "
                "Pass one for each"
            )
        object.__setattr__(self, "fetch", functools.partial(_fetched, fetch))

    def __len__(self) -> int:
        return self.num_datapoints


@dataclass(frozen=True)
class HeldData(IndexedData):
    """Datapoints that the model holds itself and selects by the indices of its data plate.

    `rows` `(num_datapoints,)` are their indices in the model's data set, which has `size` datapoints. Arguments are the
    same for all of them.
    """

    rows: Tensor = field(default_factory=lambda: torch.arange(0))
    size: int = 0


# What a caller may pass; `forms` reads it. A list is one of arguments, of numbers or of items, whichever fits.
Data: TypeAlias = (
    Tensor | np.ndarray | tuple[Any, ...] | list[Any] | dict[Any, Any] | Dataset[Any] | DataLoader[Any] | IndexedData
)


def check_tensor(tensor: Tensor, name: str) -> None:
    """Refuse a tensor of the data that densities cannot be computed from."""
    if tensor.is_nested:
        raise InputError(f"data: {name} is a nested tensor. Pad it to one length, as in x.to_padded_tensor(0.0)")
    if tensor.layout != torch.strided:
        raise InputError(f"data: {name} is sparse. Convert it with x.to_dense()")
    if tensor.is_meta:
        raise InputError(f"data: {name} is on the meta device, so it has no values. Load the data on cpu or cuda")
    if tensor.is_complex():
        raise InputError(f"data: {name} is complex. Pass real tensors, as in torch.view_as_real(x)")
    if tensor.is_quantized:
        raise InputError(f"data: {name} is quantized. Convert it with x.dequantize()")
    if tensor.is_floating_point() and torch.finfo(tensor.dtype).bits < 32:
        raise InputError(
            f"data: {name} has dtype {tensor.dtype}, too coarse for log-densities. Convert it with x.float()"
        )


def _fetched(fetch: Callable[[Tensor], Any], indices: Tensor) -> tuple[Any, ...]:
    """The model's arguments for `indices`; raises `InputError` where fetch fails or returns nothing."""
    with failures_named("data: fetch"):
        args = fetch(indices)
    if args is None:
        raise InputError("data: fetch(indices) returned None; it must return the model's arguments for these indices")
    return as_tuple(args)


def check_indices(indices: Any, num_datapoints: int | None = None) -> None:
    """Refuse what is no vector of whole numbers, or goes beyond the `num_datapoints`."""
    whole = isinstance(indices, Tensor) and not (
        indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool
    )
    if not whole or indices.dim() != 1 or not len(indices):
        tensor = isinstance(indices, Tensor)
        got = f"{indices.dtype} of shape {tuple(indices.shape)}" if tensor else f"a {type(indices).__name__}"
        raise InputError(f"indices: expected a tensor of at least one whole number, shape (B,), got {got}")
    if num_datapoints is not None and not 0 <= int(indices.min()) <= int(indices.max()) < num_datapoints:
        raise beyond(num_datapoints)


def beyond(num_datapoints: int) -> InputError:
    """The error for indices of datapoints that there are not."""
    return InputError(f"indices: they must be from 0 to N - 1 = {num_datapoints - 1}")


def is_constant(value: Any) -> bool:
    """Whether an argument is the same for every datapoint, tensors left aside."""
    return isinstance(value, CONSTANTS) or callable(value)


def rows_of(args: tuple[Any, ...], number: int, like: IndexedData | None = None) -> IndexedData:
    """The `number` datapoints with arguments `args`; what has no row per datapoint belongs to all of them.

    `like` has data of the same form, and tells which tensors have a row per datapoint: all of this length otherwise.
    """
    leaves, form = tree_flatten(args)
    constant = set() if like is None else constant_positions(like)
    for position, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) and not is_constant(leaf):
            raise InputError(
                f"data: a {type(leaf).__name__} has no rows to select datapoints from. Pass tensors to the programs, "
                "and pack or convert them inside"
            )
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or len(leaf) != number):
            constant.add(position)

    def fetch(indices: Tensor) -> tuple[Any, ...]:
        rows = [
            leaf.index_select(0, indices.to(leaf.device)) if isinstance(leaf, Tensor) and at not in constant else leaf
            for at, leaf in enumerate(leaves)
        ]
        return as_tuple(tree_unflatten(rows, form))

    return IndexedData(number, fetch)


def constant_positions(data: IndexedData) -> set[int]:
    """The positions of tensors among the arguments, nested ones too, that are the same for every datapoint."""
    one, two = (tree_leaves(data.fetch(torch.zeros(number, dtype=torch.long))) for number in (1, 2))
    pairs = enumerate(zip(one, two, strict=True))
    return {at for at, (a, b) in pairs if isinstance(a, Tensor) and (a.dim() == 0 or len(a) == len(b))}


def as_tuple(args: Any) -> tuple[Any, ...]:
    """The result of `fetch` as the model's positional arguments; raises `InputError` where it gave none."""
    if args is None:
        raise InputError("data: fetch, or to_data, returned None. Return the model's arguments, as a tuple")
    return tuple(args) if isinstance(args, list | tuple) else (args,)


def evenly_spaced(num_datapoints: int, number: int) -> Tensor:
    """Indices of `number` evenly spaced datapoints, first and last included; all if there are no more."""
    return torch.linspace(0, num_datapoints - 1, min(number, num_datapoints)).round().long()


def part_of(data: IndexedData, number: int) -> tuple[IndexedData, Tensor]:
    """`number` datapoints of `data`, evenly spaced, as a data set, and their indices in `data`."""
    chosen = evenly_spaced(len(data), number)
    return selected(data, chosen), chosen


def selected(data: IndexedData, indices: Tensor) -> IndexedData:
    """The datapoints `indices` of `data` as a data set, counted from 0."""
    if isinstance(data, HeldData):
        return HeldData(len(indices), data.fetch, data.rows[indices], data.size)
    names = None if data.names is None else [data.names[index] for index in indices.tolist()]
    return IndexedData(len(indices), lambda rows: data.fetch(indices[rows]), names=names)


def all_indices(data: IndexedData, device: torch.device | str | None = None) -> Tensor:
    """The indices `0 .. N - 1`, shape `(N,)`."""
    return torch.arange(data.num_datapoints, device=device)
