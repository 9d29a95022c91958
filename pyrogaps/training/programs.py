"""State a step may depend on besides its arguments: attributes, hooks, buffers and random state of the programs."""

import inspect
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Tensor, nn

from pyrogaps.density.runs import Program

PLAIN = (bool, int, float, str, type(None))


class Watched:
    """Watches a model, a guide and their modules for state that a recorded step would not follow."""

    def __init__(self, programs: list[Program], tops: list[nn.Module]) -> None:
        self._programs = programs
        self._modules = list(dict.fromkeys(module for top in tops for module in top.modules()))

    def settings(self) -> str:
        """Attributes and variables that are numbers, strings or booleans; equal in every process."""
        return repr([(name, value) for name, value in self._variables() if isinstance(value, PLAIN)])

    def state(self) -> list[tuple[str, Any]]:
        """State that a step must not change if it is to be recorded; comparable only within this process.

        Buffers may change in place, because a record changes them as well.
        """
        buffers = {id(value) for module in self._modules for value in module.buffers()}
        return [(name, _token(value, buffers)) for name, value in self._variables()]

    def is_opaque(self) -> bool:
        """Whether hooks or recurrent layers prevent recording."""
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return any(
            isinstance(module, nn.RNNBase) or any(getattr(module, name) for name in hooks) for module in self._modules
        )

    def buffers(self) -> list[Tensor]:
        return [value for module in self._modules for value in module.buffers()]

    def _variables(self) -> Iterator[tuple[str, Any]]:
        for number, module in enumerate(self._modules):
            entries = {**vars(module), **module._buffers}
            yield from ((f"{number}.{name}", value) for name, value in entries.items())
        for number, program in enumerate(self._programs):
            function = inspect.unwrap(getattr(program, "__func__", program))
            if inspect.isfunction(function):
                variables = inspect.getclosurevars(function)
                for name, value in (*variables.nonlocals.items(), *variables.globals.items()):
                    yield f"program {number}.{name}", value


def _token(value: Any, buffers: set[int]) -> Any:
    """A token that differs once `value` has been changed or replaced."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        return id(value), None if id(value) in buffers or value.requires_grad else value._version
    return len(value) if isinstance(value, Sized) and isinstance(value, list | dict | set | tuple) else None


class Snapshot:
    """A copy of torch's global random state, on the CPU and on `device`, and of the values of `buffers`."""

    def __init__(self, buffers: list[Tensor], device: torch.device) -> None:
        self._buffers, self._values = buffers, [value.clone() for value in buffers]
        self._device = device if device.type == "cuda" else None
        self._random = [torch.get_rng_state()]
        if self._device is not None:
            self._random.append(torch.cuda.get_rng_state(self._device))

    def restore(self) -> None:
        with torch.no_grad():
            for buffer, value in zip(self._buffers, self._values, strict=True):
                buffer.copy_(value)
        torch.set_rng_state(self._random[0])
        if self._device is not None:
            torch.cuda.set_rng_state(self._random[1], self._device)

    def is_like(self, other: "Snapshot") -> bool:
        """Whether both have the same random state, and buffers that are equal up to rounding."""
        if not all(torch.equal(left, right) for left, right in zip(self._random, other._random, strict=True)):
            return False
        pairs = zip(self._values, other._values, strict=True)
        return all(torch.allclose(left, right, rtol=1e-3, atol=1e-6, equal_nan=True) for left, right in pairs)
