"""Data sets: a number of datapoints, fetched by index."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from pyrogaps.errors import InputError
from pyrogaps.guard import failures_named
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

    def __post_init__(self) -> None:
        number, fetch = self.num_datapoints, self.fetch
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            got = number if isinstance(number, bool | float) else type(number).__name__
            raise InputError(f"IndexedData.num_datapoints: must be a whole number, got {got}")
        if not callable(fetch):
            raise InputError(f"IndexedData.fetch: must be a function of indices, got {type(fetch).__name__}")
        object.__setattr__(self, "fetch", functools.partial(_fetched, fetch))

    def __len__(self) -> int:
        return self.num_datapoints


Data: TypeAlias = Tensor | tuple[Tensor, ...] | IndexedData


def as_given(data: Any) -> Any:
    """`data` with its NumPy arrays as tensors; raises `InputError` for arrays and tensors without usable numbers."""
    if isinstance(data, IndexedData):
        return data
    converted = tree_map_only(np.ndarray, _from_numpy, data)
    converted = tree_map_only(Tensor, _without_history, converted)
    for position, leaf in enumerate(tree_leaves(converted)):
        if isinstance(leaf, Tensor):
            check_tensor(leaf, f"element {position}" if isinstance(converted, list | tuple | dict) else "the tensor")
    return converted


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


def as_indexed(data: Data) -> IndexedData:
    """View `data` (a tensor, a tuple of tensors or arrays, or an `IndexedData`) as an `IndexedData`.

    Raises `InputError` when `data` is something else, is empty, or its tensors differ in length.
    """
    data = as_given(data)
    if isinstance(data, IndexedData):
        return data
    tensors = (data,) if isinstance(data, Tensor) else tuple(data) if isinstance(data, list | tuple) else ()
    odd = [type(tensor).__name__ for tensor in tensors if not isinstance(tensor, Tensor)]
    if odd or not tensors:
        where = type(data).__name__ + (f" with a {odd[0]}" if odd else "")
        raise InputError(
            "data: expected a tensor or a tuple of tensors whose first axis is the data plate, got "
            f"{where}. Wrap anything else in IndexedData(num_datapoints, fetch)"
        )
    if any(tensor.dim() == 0 for tensor in tensors):
        raise InputError(
            "data: a tensor without dimensions has no axis of datapoints. Pass x[None] for one datapoint, or "
            "plate=False to treat the whole data set as one"
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


def _fetched(fetch: Callable[[Tensor], Any], indices: Tensor) -> tuple[Any, ...]:
    """The model's arguments for `indices`; raises `InputError` where fetch fails or returns nothing."""
    with failures_named("data: fetch"):
        args = fetch(indices)
    if args is None:
        raise InputError("data: fetch(indices) returned None; it must return the model's arguments for these indices")
    return as_tuple(args)


def rows_of(args: tuple[Any, ...], number: int) -> IndexedData:
    """The `number` datapoints with arguments `args`; non-tensor arguments belong to all of them."""

    def fetch(indices: Tensor) -> tuple[Any, ...]:
        return tuple(arg[indices.to(arg.device)] if isinstance(arg, Tensor) else arg for arg in args)

    return IndexedData(number, fetch)


def whole(data: Data) -> IndexedData:
    """The whole data set as one datapoint, its arguments not indexed."""
    data = as_given(data)
    if isinstance(data, IndexedData):
        return IndexedData(1, lambda indices: data.fetch(torch.arange(data.num_datapoints)))
    args = tuple(data) if isinstance(data, list | tuple) else (data,)
    return IndexedData(1, lambda indices: args)


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
    return IndexedData(len(indices), lambda rows: data.fetch(indices[rows]))


def _from_numpy(array: Any) -> Tensor:
    try:
        return torch.as_tensor(array)
    except (TypeError, ValueError) as error:
        raise InputError(f"data: an array of dtype {array.dtype} cannot become a tensor. Pass numbers") from error


def _without_history(tensor: Tensor) -> Tensor:
    """`tensor` as gradients of other things can pass it by: data may come from an inference mode, or a network."""
    return tensor.clone() if tensor.is_inference() else tensor.detach() if tensor.requires_grad else tensor


def all_indices(data: IndexedData, device: torch.device | str | None = None) -> Tensor:
    """The indices `0 .. N - 1`, shape `(N,)`."""
    return torch.arange(data.num_datapoints, device=device)
