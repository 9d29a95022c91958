"""Memory per point of a model's density and gradient."""

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

NUM_POINTS = 8  # of the measurement
MAX_POINTS = 1 << 16  # per call, on any device


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors created while it is active: those alive `now`, and their `peak`."""

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
        self._note((args, kwargs), made=False)  # existing tensors, such as parameters, count 0 bytes
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
    """Peak memory per point, in bytes, of log p(x, z) and its gradient through Pyro.

    For a model without a gradient, a small guess that allows pieces of the largest size.
    """
    number = 1 if joint.plate is None else NUM_POINTS
    indices = torch.zeros(number, dtype=torch.long)
    with evaluating(joint.model), LiveMemory() as live, torch.enable_grad():
        flat = joint.zeros(number).requires_grad_()
        try:
            total = joint.total(flat, joint.fetch(indices), indices).sum()
            torch.autograd.grad(total, flat, allow_unused=True)
        except Exception:  # only values may be needed
            return memory.WORKING_SET // MAX_POINTS
    return max(1, int(live.peak) // number)


def points_within(joint: JointDensity, max_points: int, max_bytes: int | None = None) -> int:
    """Number of points that fit the working set, and `max_bytes`: a power of two from 1 to `max_points`."""
    room = memory.working_set() if max_bytes is None else min(max_bytes, memory.working_set())
    fitting = max(1, room // bytes_per_point(joint))
    return min(max_points, 1 << (fitting.bit_length() - 1))
