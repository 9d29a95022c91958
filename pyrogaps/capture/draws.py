"""Random draws that are differentiable in parameters, replayed from a record of the program that makes them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrogaps.capture.constants import ConstantsApart
from pyrogaps.capture.graphs import record, reuse_memory
from pyrogaps.capture.halves import halves
from pyrogaps.capture.programs import Values, same_values
from pyrogaps.capture.reasons import WrongRecord
from pyrogaps.streams import seeded

# Making a record takes about as long as so many calls with their gradients.
NUM_CALLS = 16
# From the parameters at which a record is checked to those at which it is made, whose values could be constants in it.
SHIFT = 0.1


class RecordedDraws:
    """A random function of parameters, replayed from a record after its first `NUM_CALLS` calls.

    A replay takes the same random numbers from torch's generators as a call, and its results have the same gradients.
    What depends on neither parameters nor random numbers is computed once. A function that cannot be recorded is called
    every time.

    Args:
        function: gives tensors that are differentiable in all its arguments. Whatever else it reads must not change.
        device: of its random numbers.
    """

    def __init__(self, function: Callable[..., Values], device: torch.device) -> None:
        self._function, self._device = function, device
        self._calls = 0
        self._record: _Record | None = None

    def __call__(self, parameters: list[Tensor]) -> Values:
        self._calls += 1
        if self._calls == NUM_CALLS + 1:
            self._record = self._checked(parameters)
        return self._function(*parameters) if self._record is None else self._record(*parameters)

    def _checked(self, parameters: list[Tensor]) -> "_Record | None":
        """A record; None where none can be made that gives the values and gradients of a call."""
        points = [parameter.detach() for parameter in parameters]
        for buffers in (False, True):
            try:
                return self._made(points, buffers=buffers)
            except Exception:  # another way remains, in the end a call each time
                continue
        return None

    def _made(self, points: list[Tensor], *, buffers: bool) -> "_Record":
        with seeded(0, "checked", device=self._device), torch.no_grad():
            values = self._function(*points)
        weights = [torch.linspace(-1, 1, value.numel()).to(value).reshape(value.shape) for value in values]
        with seeded(0, "recorded", device=self._device):
            made = _Record(self._function, [point + SHIFT for point in points], weights, buffers=buffers)
        results = []
        for function in (self._function, made):
            with seeded(0, "checked", device=self._device):
                results.append(_with_gradients(function, points, weights))
        if not all(map(same_values, *results)):
            raise WrongRecord
        return made


def _with_gradients(function: Callable[..., Values], parameters: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """The values of a function, then the gradients of their sum with `weights`."""
    with torch.enable_grad():
        points = [parameter.detach().requires_grad_() for parameter in parameters]
        values = function(*points)
        gradients = torch.autograd.grad(values, points, weights, allow_unused=True, materialize_grads=True)
    return [*(value.detach() for value in values), *gradients]


class _Record:
    """A record of a function's values, and one of their gradients from what the first has computed."""

    def __init__(
        self, function: Callable[..., Values], parameters: list[Tensor], weights: list[Tensor], *, buffers: bool
    ) -> None:
        number = len(parameters)

        def both(*inputs: Tensor) -> list[Tensor]:
            with ConstantsApart(inputs, buffers=buffers):
                return _with_gradients(function, [*inputs[:number]], [*inputs[number:]])

        whole = record(both, *parameters, *weights)
        self._values, self._gradients = map(reuse_memory, halves(whole, slice(number, None), len(weights)))
        self._num_values = len(weights)

    def __call__(self, *parameters: Tensor) -> Values:
        results: Values = _Replay.apply(self._values, self._gradients, self._num_values, *parameters)
        return results


class _Replay(torch.autograd.Function):
    """A record as an operation that autograd knows."""

    @staticmethod
    def forward(ctx: Any, values: Any, gradients: Any, number: int, *parameters: Tensor) -> Values:
        results = values(*parameters)
        ctx.gradients, ctx.kept = gradients, results[number:]
        first: Values = results[:number]
        return first

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> Any:
        return None, None, None, *ctx.gradients(*weights, *ctx.kept)
