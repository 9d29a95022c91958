"""Data sets: a number of datapoints, fetched by index."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pyrogaps.errors import InputError
from pyrogaps.settings import Count, checked


@checked("IndexedData")
@dataclass(frozen=True)
class IndexedData:
    """A data set fetched by index, for models whose arguments are not plain tensors.

    `fetch(indices)` takes a one-dimensional integer tensor, which may repeat an index, and returns the
    model's positional arguments for those datapoints, in the order of `indices`. Pad ragged data to one
    length for the whole set, so that every datapoint has latents of the same size.
    """

    num_datapoints: Count
    fetch: Callable[[Tensor], tuple[Any, ...]]

    def __len__(self) -> int:
        return self.num_datapoints


Data: TypeAlias = Tensor | tuple[Tensor, ...] | IndexedData


def as_indexed(data: Data) -> IndexedData:
    """View `data` (a tensor, a tuple of tensors, or an `IndexedData`) as an `IndexedData`.

    Raises `InputError` when `data` is something else, is empty, or its tensors differ in length.
    """
    if isinstance(data, IndexedData):
        return data
    tensors = (data,) if isinstance(data, Tensor) else tuple(data) if isinstance(data, list | tuple) else ()
    if not tensors or not all(isinstance(tensor, Tensor) and tensor.dim() > 0 for tensor in tensors):
        raise InputError(
            "data: expected a tensor or a tuple of tensors whose first axis is the data plate, got "
            f"{type(data).__name__}. Wrap anything else in IndexedData(num_datapoints, fetch)"
        )
    lengths = [len(tensor) for tensor in tensors]
    if len(set(lengths)) > 1:
        raise InputError(
            f"data: the tensors have different lengths along their first axis, the data plate: {lengths}. Cut them to "
            "one length, or pass plate=False to treat the whole data set as one datapoint"
        )

    if not lengths[0]:
        raise InputError("data: there are no datapoints")

    def fetch(indices: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.index_select(0, indices.to(tensor.device)) for tensor in tensors)

    return IndexedData(lengths[0], fetch)


def rows_of(args: tuple[Any, ...], number: int) -> IndexedData:
    """The `number` datapoints with arguments `args`; non-tensor arguments belong to all of them."""

    def fetch(indices: Tensor) -> tuple[Any, ...]:
        return tuple(arg[indices.to(arg.device)] if isinstance(arg, Tensor) else arg for arg in args)

    return IndexedData(number, fetch)


def whole(data: Data) -> IndexedData:
    """The whole data set as one datapoint, its arguments not indexed."""
    if isinstance(data, IndexedData):
        return IndexedData(1, lambda indices: as_tuple(data.fetch(torch.arange(data.num_datapoints))))
    args = tuple(data) if isinstance(data, list | tuple) else (data,)
    return IndexedData(1, lambda indices: args)


def as_tuple(args: Any) -> tuple[Any, ...]:
    """The result of `fetch` as the model's positional arguments; raises `InputError` where it gave none."""
    if args is None:
        raise InputError("data: fetch, or to_data, returned None; return the model's arguments, as a tuple")
    return args if isinstance(args, tuple) else (args,)


def evenly_spaced(num_datapoints: int, number: int) -> Tensor:
    """Indices of `number` evenly spaced datapoints, first and last included; all if there are no more."""
    return torch.linspace(0, num_datapoints - 1, min(number, num_datapoints)).round().long()


def part_of(data: IndexedData, number: int) -> tuple[IndexedData, Tensor]:
    """`number` datapoints of `data`, evenly spaced, as a data set, and their indices in `data`."""
    chosen = evenly_spaced(len(data), number)
    return IndexedData(len(chosen), lambda indices: data.fetch(chosen[indices])), chosen


def all_indices(data: IndexedData, device: torch.device | str | None = None) -> Tensor:
    """The indices `0 .. N - 1`, shape `(N,)`."""
    return torch.arange(data.num_datapoints, device=device)
