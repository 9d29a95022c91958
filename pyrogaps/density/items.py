"""Map-style data sets, such as those of torch, and lists of datapoints: items fetched one by one and stacked."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from pyrogaps.errors import InputError
from pyrogaps.guard import failures_named

COLLECT = "Collect its items first: torch.stack(list(data)) of tensors, list(data) of tuples or dictionaries"


class Rows(Dataset[Any]):
    """A data set whose items are the rows of `batch`: a tensor, or a tuple, list or dictionary of tensors."""

    def __init__(self, batch: Any, number: int) -> None:
        self.batch, self.number = batch, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Any:
        if not -self.number <= index < self.number:
            raise IndexError(f"index {index} is out of range for {self.number} datapoints")
        return tree_map_only(Tensor, lambda tensor: tensor[index] if tensor.dim() else tensor, self.batch)


def whole_tensors(data: Any) -> tuple[Tensor, ...] | None:
    """The tensors of a `TensorDataset`, of a subset of one, or of a loader of either; None for other data sets."""
    if isinstance(data, DataLoader):
        return None if _has_own_collate(data) else whole_tensors(data.dataset)
    if type(data) is TensorDataset:
        return tuple(data.tensors)
    if type(data) is Subset and (tensors := whole_tensors(data.dataset)) is not None:
        rows = torch.as_tensor(list(data.indices), dtype=torch.long)
        number = len(tensors[0])
        if len(rows) and not -number <= int(rows.min()) <= int(rows.max()) < number:
            raise InputError(f"data: a Subset has indices beyond the {number} items of its data set. Take them out")
        return tuple(tensor[rows.to(tensor.device)] for tensor in tensors)
    return None


def items_of(data: Any) -> tuple[Any, Callable[[list[Any]], Any]]:
    """The data set behind `data`, with the function that makes a batch of its items; refuses what has no index."""
    collate: Callable[[list[Any]], Any] = stacked
    if isinstance(data, DataLoader):
        collate = data.collate_fn if _has_own_collate(data) else stacked
        data = data.dataset
    if isinstance(data, IterableDataset | Iterator) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise InputError(f"data: a {type(data).__name__} has no items to select by index. {COLLECT}")
    return data, collate


def _has_own_collate(loader: DataLoader[Any]) -> bool:
    return loader.collate_fn is not default_collate and loader.batch_sampler is not None


def batches_of(data: Any, collate: Callable[[list[Any]], Any]) -> Callable[[Tensor], Any]:
    """The batch of items at given indices. Items that repeat are fetched once; the last batch is kept."""
    name, last = _name_of(data), [(torch.empty(0, dtype=torch.long), None)]

    def fetch(indices: Tensor) -> Any:
        wanted, places = torch.unique(indices.cpu(), return_inverse=True)
        if not torch.equal(wanted, last[0][0]):
            with failures_named(f"data: reading the items of {name}"):
                items = [data[int(index)] for index in wanted]
            with failures_named(f"data: collate_fn of {name}"):
                batch = collate(items)
            _check_batch(batch, len(items), name)
            last[0] = wanted, batch
        if torch.equal(places, torch.arange(len(wanted))):
            return last[0][1]
        return tree_map_only(Tensor, lambda t: t[places.to(t.device)] if t.dim() else t, last[0][1])

    return fetch


def _name_of(data: Any) -> str:
    return _name_of(data.dataset) if type(data) is Subset else type(data).__name__


def _check_batch(batch: Any, number: int, name: str) -> None:
    """Refuse what a `collate_fn` makes of `number` items that has not a row for each."""
    if batch is None:
        raise InputError(f"data: collate_fn of {name} returned None. Return a batch of the items")
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) != number:
            raise InputError(
                f"data: collate_fn of {name} made {len(leaf)} rows of {number} items. Return one row for each, in order"
            )


def stacked(items: list[Any]) -> Any:
    """A batch of items: their tensors, arrays and numbers along a new first axis."""
    flat = [tree_flatten(item) for item in items]
    form = flat[0][1]
    if any(other != form for _, other in flat):
        raise InputError("data: the items differ in form. Give every item the same tuple or dictionary of tensors")
    columns = zip(*([_tensor(leaf) for leaf in leaves] for leaves, _ in flat), strict=True)
    return tree_unflatten([_stack(column) for column in columns], form)


def _stack(column: tuple[Tensor, ...]) -> Tensor:
    shapes = sorted({tuple(tensor.shape) for tensor in column})
    if len(shapes) > 1:
        raise InputError(
            f"data: the items differ in shape, {shapes[0]} and {shapes[1]} among them. Pad them to one shape and mask "
            "the padding"
        )
    kinds = sorted({str(tensor.dtype) for tensor in column})
    if len(kinds) > 1:
        raise InputError(
            f"data: the items differ in dtype, {kinds[0]} and {kinds[1]} among them. Convert them to one, as in "
            "x.float()"
        )
    return torch.stack(column)


def _tensor(leaf: Any) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf
    if isinstance(leaf, bool | int | float | np.generic | np.ndarray) and str(getattr(leaf, "dtype", "")) != "object":
        # A number of Python has the default dtype, as in torch.tensor.
        return torch.as_tensor(leaf) if isinstance(leaf, np.generic | np.ndarray) else torch.tensor(leaf)
    raise InputError(
        f"data: its items hold a {type(leaf).__name__}, of which there is no tensor. Convert it in the data set, as "
        "transform=ToTensor() does for images, or leave it out"
    )


def plain(value: Any) -> Any:
    """Tensors of a simulated batch as the caller's items have them: on the CPU, without history."""
    return tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, value)
