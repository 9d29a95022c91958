"""One training step recorded as tensor operations, for replay without Pyro."""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyrogaps.capture.graphs import own_outputs, record, reuse_memory
from pyrogaps.training.objective import Objective

Gradients = list[Tensor | None]


class Outcome(NamedTuple):
    """Negative objective and plain ELBO of a minibatch, in nats per datapoint, and the parameters' gradients."""

    loss: float
    elbo: float
    gradients: Gradients


class Arguments:
    """The arguments of a step, split into tensors and other values; the latter select the record."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self._leaves, self._tree = tree_flatten(args)
        self._positions = [position for position, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.tensors: list[Tensor] = [self._leaves[position] for position in self._positions]

    @property
    def key(self) -> str:
        """A key shared by all arguments that one record serves; equal in every process."""
        described = [
            (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else repr(leaf)
            for leaf in self._leaves
        ]
        return f"{described} {self._tree}"

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Any:
        """The same arguments with their tensors replaced by `tensors`."""
        leaves = list(self._leaves)
        for position, tensor in zip(self._positions, tensors, strict=True):
            leaves[position] = tensor
        return tree_unflatten(leaves, self._tree)


class Record:
    """Loss and gradients of `parameters` as a function of a minibatch's tensors and the weights of annealed terms.

    Parameters, buffers and other tensors of the programs are held by reference: their values may change in place.
    Random operations draw from torch's global generators, as in the programs.

    Raises the error of tracing or of the programs if a step cannot be recorded.
    """

    def __init__(self, objective: Objective, parameters: list[Tensor], arguments: Arguments) -> None:
        if not all(value.is_contiguous() for value in parameters):
            raise NotImplementedError("a parameter is not contiguous, so its gradient cannot be recorded")
        number = len(objective.factors)
        self._used: list[bool] = []
        self.num_uses = 0
        self._seconds_by_pyro = self._seconds = float("inf")

        def step(*inputs: Tensor) -> tuple[Tensor, ...]:
            with objective.factors_from(inputs[:number]), torch.enable_grad():
                loss, elbo = objective.tensors(*arguments.with_tensors(inputs[number:]))
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            self._used = [gradient is not None for gradient in gradients]
            values = torch.stack([loss.detach(), elbo.detach().to(loss.dtype)])
            return values, *(gradient for gradient in gradients if gradient is not None)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._graph = reuse_memory(own_outputs(record(step, *objective.factors, *arguments.tensors)))

    def __call__(self, objective: Objective, arguments: Arguments) -> Outcome:
        """Replay the step on a minibatch with the objective's current weights."""
        self.num_uses += 1
        with torch.no_grad():
            values, *gradients = self._graph(*objective.factors, *arguments.tensors)
        remaining = iter(gradients)
        loss, elbo = values.tolist()
        return Outcome(loss, elbo, [next(remaining) if used else None for used in self._used])

    def time(self, by_pyro: float, replayed: float) -> None:
        """Record the seconds of one step by Pyro and by replay; the first use, which allocates memory, is ignored."""
        if self.num_uses > 1:
            self._seconds_by_pyro = min(self._seconds_by_pyro, by_pyro)
            self._seconds = min(self._seconds, replayed)

    @property
    def is_faster(self) -> bool:
        """Whether the fastest replay beat the fastest step through Pyro."""
        return self._seconds < self._seconds_by_pyro

    def is_due(self, period: int) -> bool:
        """Whether the next use is compared with Pyro: uses 1, 2, 4, 8 ..., and every `period`-th."""
        use = self.num_uses + 1
        return use & (use - 1) == 0 or use % period == 0


def agree(outcome: Outcome, expected: Outcome) -> bool:
    """Whether two outcomes of one step are equal up to rounding."""
    values = zip(outcome[:2], expected[:2], strict=True)
    if any(not abs(left - right) <= 1e-4 * (1 + abs(right)) for left, right in values):
        return False
    pairs = list(zip(outcome.gradients, expected.gradients, strict=True))
    if any((left is None) != (right is None) for left, right in pairs):
        return False
    present = [(left, right) for left, right in pairs if left is not None and right is not None]
    largest = max((float(right.abs().max()) for _, right in present if right.numel()), default=0.0)
    return all(_close(left, right, largest) for left, right in present)


def _close(left: Tensor, right: Tensor, largest: float) -> bool:
    # If the terms of a gradient cancel, its rounding error is that of the terms.
    relative, absolute = (1e-7, 1e-12) if left.dtype == torch.float64 else (1e-3, 1e-6)
    spread = float(right.abs().max()) if right.numel() else 0.0
    return torch.allclose(left, right, rtol=relative, atol=relative * spread + absolute * largest, equal_nan=True)
