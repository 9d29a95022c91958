"""One training step as the tensor operations it is made of, to be replayed without Pyro."""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyrogaps.capture.graphs import own_outputs, record, reuse_memory
from pyrogaps.training.objective import Objective

Gradients = list[Tensor | None]


class Outcome(NamedTuple):
    """The negative objective and the plain ELBO of a minibatch, nats per datapoint, and the parameters' gradients."""

    loss: float
    elbo: float
    gradients: Gradients


class Arguments:
    """What a step is given, taken apart: tensors, and all else, by which records are told apart."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self._leaves, self._tree = tree_flatten(args)
        self._places = [place for place, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.tensors: list[Tensor] = [self._leaves[place] for place in self._places]

    @property
    def key(self) -> str:
        """The same for arguments that one record serves, and in every process."""
        described = [
            (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else repr(leaf)
            for leaf in self._leaves
        ]
        return f"{described} {self._tree}"

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Any:
        """The same arguments, with others in the places of their tensors."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        return tree_unflatten(leaves, self._tree)


class Record:
    """Loss and gradients of `parameters` as a function of a minibatch's tensors and the weights of annealed terms.

    Parameters, buffers and what else the programs read are referred to, not copied: their values may change in place.
    Random operations draw from torch's global generators, as they do in the programs.

    Raises what tracing or the programs raise where a step cannot be recorded.
    """

    def __init__(self, objective: Objective, parameters: list[Tensor], arguments: Arguments) -> None:
        if not all(value.is_contiguous() for value in parameters):
            raise NotImplementedError("an optimizer wants gradients that are laid out as parameters are")
        number = len(objective.factors)
        self._used: list[bool] = []
        self.num_uses = 0
        self._seconds_by_pyro = self._seconds = float("inf")

        def step(*inputs: Tensor) -> tuple[Tensor, ...]:
            with objective.factors_from(inputs[:number]), torch.enable_grad():
                loss, elbo = objective.tensors(*arguments.with_tensors(inputs[number:]))
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            self._used = [gradient is not None for gradient in gradients]
            figures = torch.stack([loss.detach(), elbo.detach().to(loss.dtype)])
            return figures, *(gradient for gradient in gradients if gradient is not None)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._graph = reuse_memory(own_outputs(record(step, *objective.factors, *arguments.tensors)))

    def __call__(self, objective: Objective, arguments: Arguments) -> Outcome:
        """Replay the step on a minibatch, at the objective's present weights."""
        self.num_uses += 1
        with torch.no_grad():
            figures, *gradients = self._graph(*objective.factors, *arguments.tensors)
        given = iter(gradients)
        loss, elbo = figures.tolist()
        return Outcome(loss, elbo, [next(given) if used else None for used in self._used])

    def time(self, by_pyro: float, replayed: float) -> None:
        """Note how many seconds one step took either way. A first use, which prepares memory, does not count."""
        if self.num_uses > 1:
            self._seconds_by_pyro = min(self._seconds_by_pyro, by_pyro)
            self._seconds = min(self._seconds, replayed)

    @property
    def is_faster(self) -> bool:
        """Whether the fastest replay took less time than the fastest step through Pyro."""
        return self._seconds < self._seconds_by_pyro

    def is_due(self, rarely: int) -> bool:
        """Whether the next use is to be compared with Pyro: uses 1, 2, 4, 8 ..., and every `rarely`-th."""
        use = self.num_uses + 1
        return use & (use - 1) == 0 or use % rarely == 0


def agree(found: Outcome, expected: Outcome) -> bool:
    """Whether two outcomes of one step are the same but for rounding."""
    figures = zip(found[:2], expected[:2], strict=True)
    if any(not abs(left - right) <= 1e-4 * (1 + abs(right)) for left, right in figures):
        return False
    pairs = list(zip(found.gradients, expected.gradients, strict=True))
    if any((left is None) != (right is None) for left, right in pairs):
        return False
    present = [(left, right) for left, right in pairs if left is not None and right is not None]
    largest = max((float(right.abs().max()) for _, right in present if right.numel()), default=0.0)
    return all(_close(left, right, largest) for left, right in present)


def _close(left: Tensor, right: Tensor, largest: float) -> bool:
    # A gradient that cancels out is known as well as the terms that cancel.
    relative, absolute = (1e-7, 1e-12) if left.dtype == torch.float64 else (1e-3, 1e-6)
    spread = float(right.abs().max()) if right.numel() else 0.0
    return torch.allclose(left, right, rtol=relative, atol=relative * spread + absolute * largest, equal_nan=True)
