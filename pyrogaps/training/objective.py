"""The minibatch objective, per datapoint, on Pyro's own `Trace_ELBO` or another loss like it."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyrogaps.density.runs import Program
from pyrogaps.training.recordable import is_recordable, tensor_loss
from pyrogaps.training.weighing import CountDatapoints, WeightLatents


class Objective:
    """E_q[log p(x|z) + beta (log p(z) - lambda log q(z|x))], nats per datapoint, by `num_particles` draws.

    `begin(rows)` announces a minibatch of that many rows. `loss_and_grads` has the signature that `pyro.infer.SVI`
    asks for; it and `evaluate` leave the plain ELBO (beta = lambda = 1) of the same draws in `elbo`. An `estimator` of
    another bound takes the ELBO's place, with beta = lambda = 1.
    """

    def __init__(self, model: Program, guide: Program, num_particles: int, estimator: ELBO | None = None) -> None:
        self._model_weight, self._guide_weight, self._count = WeightLatents(), WeightLatents(), CountDatapoints()
        self.model = self._count(self._model_weight(model))
        self.guide = self._guide_weight(guide)
        self._estimator: Any = estimator or Trace_ELBO(num_particles=num_particles)
        self.elbo = math.nan

    @property
    def is_recordable(self) -> bool:
        """Whether `tensors` knows this bound."""
        return is_recordable(self._estimator)

    def anneal(self, beta: float, entropy_weight: float) -> None:
        """Set beta and lambda, each in [0, 1]."""
        self._model_weight.weight = beta
        self._guide_weight.weight = beta * entropy_weight

    @property
    def kind(self) -> str:
        """What the weights make of the loss, in a word; a record holds for all losses of one kind."""
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
                weight.factor = factor
            yield
        finally:
            for weight in partial:
                weight.factor = None

    def begin(self, rows: int) -> None:
        self._count.reset(rows)
        self._model_weight.withheld = self._guide_weight.withheld = 0.0

    def loss_and_grads(self, model: Program, guide: Program, *args: Any) -> float:
        """The negative objective of one minibatch; its gradient is left in the parameters.

        Raises `FloatingPointError` where it is not finite, before any gradient is taken.
        """
        loss = self.differentiable_loss(model, guide, *args)
        value = self._finite(self._note(loss))
        loss.backward()
        return value

    def differentiable_loss(self, model: Program, guide: Program, *args: Any) -> Tensor:
        """The negative objective of one minibatch, whose gradient has not been taken yet."""
        with _no_nan_warnings():
            loss: Tensor = self._estimator.differentiable_loss(model, guide, *args) / self._count.num_datapoints
        return loss

    def elbo_of(self, loss: Tensor) -> Tensor:
        """The plain ELBO of the draws that gave `loss`, nats per datapoint."""
        return self._withheld() - loss.detach()

    @property
    def is_scaled_up(self) -> bool:
        """Whether the model's data plate stands for more datapoints than the last minibatch had."""
        return self._count.num_datapoints > self._count.rows

    def tensors(self, *args: Any) -> tuple[Tensor, Tensor]:
        """The negative objective, with a gradient, and the plain ELBO, of one minibatch: what a record holds."""
        total = tensor_loss(self._estimator, self.model, self.guide, args)
        loss = total / self._count.num_datapoints
        return loss, self.elbo_of(loss)

    def accept(self, loss: float, elbo: float) -> float:
        """Take over what was computed elsewhere, as for `tensors`; returns the loss.

        Raises `FloatingPointError` where the loss is not finite.
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
    """A loss whose steps take indices of the `num_datapoints` that it holds, and that says which go together."""

    num_datapoints: int
    device: torch.device

    def minibatches(self, batch_size: int) -> list[Tensor]:
        """One pass over the data in batches of indices."""

    def loss(self, model: Program, guide: Program, *args: Any) -> float:
        """The negative bound, nats per datapoint."""

    def loss_and_grads(self, model: Program, guide: Program, *args: Any) -> float:
        """The same, with its gradient left in the parameters. Raises `FloatingPointError` where it is not finite."""


class IndexedObjective:
    """A bound on datapoints that `estimator` fetches by index itself, such as `MAPA_ELBO`, nats per datapoint.

    Used as `Objective` is; `args` is a batch of indices.
    """

    def __init__(self, model: Program, guide: Program, estimator: IndexedBound) -> None:
        self.model, self.guide, self._estimator = model, guide, estimator
        self.elbo = math.nan

    def anneal(self, beta: float, entropy_weight: float) -> None:
        """Nothing: the bound has no terms to weigh."""

    def begin(self, rows: int) -> None:
        """Nothing: the bound is a mean."""

    def loss_and_grads(self, model: Program, guide: Program, *args: Any) -> float:
        """The negative bound of one minibatch; its gradient is left in the parameters.

        Raises `FloatingPointError` where it is not finite, before any gradient is taken.
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
    """Silence Pyro's warnings about NaN: here every one of them becomes an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered")
        yield
