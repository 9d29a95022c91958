"""The minibatch objective per datapoint, computed by Pyro's `Trace_ELBO` or a similar loss."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyrogaps.density.runs import Program
from pyrogaps.guard import failures_named
from pyrogaps.training.recordable import is_recordable, tensor_loss
from pyrogaps.training.weighing import CountDatapoints, WeightLatents


class Objective:
    """E_q[log p(x|z) + beta (log p(z) - lambda log q(z|x))], nats per datapoint, from `num_particles` draws.

    Call `begin(rows)` before a minibatch of that many rows. `loss_and_grads` has the signature that `pyro.infer.SVI`
    requires. Both it and `evaluate` set `elbo` to the plain ELBO (beta = lambda = 1) of the same draws. An `estimator`
    of another bound replaces the ELBO, with beta = lambda = 1.
    """

    def __init__(self, model: Program, guide: Program, num_particles: int, estimator: ELBO | None = None) -> None:
        self._model_weight, self._guide_weight, self._count = WeightLatents(), WeightLatents(), CountDatapoints()
        self.model = self._count(self._model_weight(model))
        self.guide = self._guide_weight(guide)
        self._estimator: Any = estimator or Trace_ELBO(num_particles=num_particles)
        self.elbo = math.nan

    @property
    def is_recordable(self) -> bool:
        """Whether `tensors` can compute this bound."""
        return is_recordable(self._estimator)

    def anneal(self, beta: float, entropy_weight: float) -> None:
        """Set beta and lambda, each in [0, 1]."""
        self._model_weight.set_weight(beta)
        self._guide_weight.set_weight(beta * entropy_weight)

    @property
    def kind(self) -> str:
        """Which weights are 0, 1 or between; one record serves all losses of one kind."""
        weights = (self._model_weight, self._guide_weight)
        return ", ".join("partial" if weight.is_partial else str(int(weight.weight)) for weight in weights)

    @property
    def factors(self) -> list[Tensor]:
        """The weights that are neither 0 nor 1, as tensors without dimensions."""
        weights = (self._model_weight, self._guide_weight)
        return [torch.tensor(weight.weight, dtype=torch.double) for weight in weights if weight.is_partial]

    @contextmanager
    def factors_from(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Take the weights that are neither 0 nor 1 from `inputs`."""
        partial = [weight for weight in (self._model_weight, self._guide_weight) if weight.is_partial]
        try:
            for weight, factor in zip(partial, inputs, strict=True):
                weight.take_factor(factor)
            yield
        finally:
            for weight in partial:
                weight.take_factor(None)

    def begin(self, rows: int) -> None:
        self._count.reset(rows)
        self._model_weight.reset()
        self._guide_weight.reset()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any) -> float:
        """Negative objective of one minibatch; adds its gradient to the parameters' `.grad`.

        Raises `FloatingPointError`, before any gradient is computed, if it is not finite.
        """
        loss = self.differentiable_loss(model, guide, *args)
        value = self._finite(self._note(loss))
        loss.backward()
        return value

    def differentiable_loss(self, model: Program, guide: Program, *args: Any) -> Tensor:
        """Negative objective of one minibatch, as a tensor with a graph."""
        with _no_nan_warnings(), self._failures_named():
            loss: Tensor = self._estimator.differentiable_loss(model, guide, *args) / self._count.num_datapoints
        return loss

    def _failures_named(self) -> AbstractContextManager[None]:
        """Name an objective of the user's that fails; exceptions of programs are named elsewhere."""
        name = type(self._estimator).__name__
        return nullcontext() if self.is_recordable else failures_named(f"training: objective {name}")

    def elbo_of(self, loss: Tensor) -> Tensor:
        """The plain ELBO of the draws that gave `loss`, nats per datapoint."""
        return self._withheld() - loss.detach()

    @property
    def is_scaled_up(self) -> bool:
        """Whether the model's data plate is larger than the last minibatch."""
        return self._count.num_datapoints > self._count.rows

    def tensors(self, *args: Any) -> tuple[Tensor, Tensor]:
        """Negative objective, with a graph, and plain ELBO of one minibatch; this is what gets recorded."""
        total = tensor_loss(self._estimator, self.model, self.guide, args)
        loss = total / self._count.num_datapoints
        return loss, self.elbo_of(loss)

    def accept(self, loss: float, elbo: float) -> float:
        """Set `elbo` from a result of `tensors` and return the loss.

        Raises `FloatingPointError` if the loss is not finite.
        """
        self.elbo = elbo
        return self._finite(loss)

    def _finite(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        return loss

    def evaluate(self, *args: Any) -> float:
        """The plain ELBO of one batch, nats per datapoint, without gradients."""
        self.anneal(1.0, 1.0)
        with torch.no_grad():
            self._note(self.differentiable_loss(self.model, self.guide, *args))
        return self.elbo

    def _note(self, loss: Tensor) -> float:
        value = float(loss.item())
        self.elbo = -value + float(self._withheld())
        return value

    def _withheld(self) -> Tensor | float:
        number: int = self._estimator.num_particles * self._count.num_datapoints
        return (self._model_weight.withheld - self._guide_weight.withheld) / number


@runtime_checkable
class IndexedBound(Protocol):
    """A loss that holds its `num_datapoints` itself, makes its own minibatches, and is evaluated at their indices."""

    num_datapoints: int
    device: torch.device

    def minibatches(self, batch_size: int) -> list[Tensor]:
        """One pass over the data in batches of indices."""

    def loss(self, model: Program, guide: Program, *args: Any) -> float:
        """The negative bound, nats per datapoint."""

    def loss_and_grads(self, model: Program, guide: Program, *args: Any) -> float:
        """As `loss`; adds the gradient to the parameters. Raises `FloatingPointError` if it is not finite."""


class IndexedObjective:
    """A bound that fetches its own datapoints by index, such as `MAPA_ELBO`, in nats per datapoint.

    It has the interface of `Objective`; `args` is a batch of indices.
    """

    def __init__(self, model: Program, guide: Program, estimator: IndexedBound) -> None:
        self.model, self.guide, self._estimator = model, guide, estimator
        self.elbo = math.nan

    def anneal(self, beta: float, entropy_weight: float) -> None:
        """Do nothing: the bound has no separate terms to weight."""

    def begin(self, rows: int) -> None:
        """Do nothing: the bound is a mean already."""

    def loss_and_grads(self, model: Program, guide: Program, *args: Any) -> float:
        """Negative bound of one minibatch; adds its gradient to the parameters' `.grad`.

        Raises `FloatingPointError`, before any gradient is computed, if it is not finite.
        """
        with _no_nan_warnings():
            value = self._estimator.loss_and_grads(model, guide, *args)
        self.elbo = -value
        return value

    def evaluate(self, *args: Any) -> float:
        """The bound of one batch, nats per datapoint, without gradients."""
        with _no_nan_warnings():
            self.elbo = -self._estimator.loss(self.model, self.guide, *args)
        return self.elbo


@contextmanager
def _no_nan_warnings() -> Iterator[None]:
    """Silence Pyro's NaN warnings: NaN raises an error here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered")
        yield
