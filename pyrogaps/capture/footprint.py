"""What one point takes of memory while a model's density and its gradient are computed there."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyrogaps import memory
from pyrogaps.density import JointDensity
from pyrogaps.density.runs import evaluating

FEW = 8
MOST = 1 << 16  # points that any device takes at a time


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors made while it is on: those alive `now`, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._watched: list[Any] = []

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for watch in self._watched:
            watch.detach()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), made=False)  # what was there before, such as parameters, of which views are made
        result = func(*args, **(kwargs or {}))
        self._note(result, made=True)
        self.peak = max(self.peak, self.now)
        return result

    def _note(self, values: Any, *, made: bool) -> None:
        for leaf in tree_leaves(values):
            # A sparse tensor has no storage of its own.
            dense = isinstance(leaf, Tensor) and leaf.layout is torch.strided
            storage = leaf.untyped_storage() if dense else None
            if storage is not None and storage._cdata not in self._sizes:
                size = storage.nbytes() if made else 0
                self._sizes[storage._cdata] = size
                self.now += size
                self._watched.append(weakref.finalize(storage, self._forget, storage._cdata))

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def bytes_per_point(joint: JointDensity) -> int:
    """The most that is alive at once while log p(x, z) and its gradient are computed through Pyro, a point.

    Of a model that has no gradient, a guess that leaves pieces as they are.
    """
    few = 1 if joint.plate is None else FEW
    indices = torch.zeros(few, dtype=torch.long)
    with evaluating(joint.model), LiveMemory() as live, torch.enable_grad():
        flat = joint.zeros(few).requires_grad_()
        try:
            total = torch.stack(joint.score(flat, joint.fetch(indices), indices)).sum()
            torch.autograd.grad(total, flat, allow_unused=True)
        except Exception:  # values alone may be all that is asked of it
            return memory.WORKING_SET // MOST
    return max(1, int(live.peak) // few)


def points_within(joint: JointDensity, most: int) -> int:
    """How many points, a power of two and no more than `most`, fit the working set; at least 1."""
    fitting = max(1, memory.working_set() // bytes_per_point(joint))
    return min(most, 1 << (fitting.bit_length() - 1))
