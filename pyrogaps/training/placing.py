"""The device of modules and minibatches during training, and the modules' mode afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pyrogaps.density.data import IndexedData, as_tuple
from pyrogaps.density.runs import Program
from pyrogaps.training.weights import all_modules


def place(modules: list[nn.Module], device: torch.device | str | None) -> torch.device:
    """Move `modules` to `device`, if given; returns the device of the parameters."""
    if device is not None:
        for module in modules:
            module.to(device)
        return torch.device(device)
    return next((value.device for module in modules for value in module.parameters()), torch.device("cpu"))


def on_device(data: IndexedData, device: torch.device | str | None) -> IndexedData:
    """`data` with tensors moved to `device`, if given, when they are fetched."""
    if device is None:
        return data

    def fetch(indices: Tensor) -> tuple[Any, ...]:
        return as_tuple(tree_map_only(Tensor, lambda item: item.to(device), data.fetch(indices)))

    return IndexedData(len(data), fetch)


@contextmanager
def modes_restored(model: Program, guide: Program) -> Iterator[None]:
    """Restore the training or evaluation mode of every module on exit."""
    modes = {module: module.training for top in all_modules(model, guide) for module in top.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
