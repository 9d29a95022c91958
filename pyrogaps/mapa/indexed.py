"""What losses that train against a posterior over datapoints have in common: steps by index, counts, refusals."""

import math
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.mapa.paired import Paired
from pyrogaps.mapa.posterior import MapaPosterior


class IndexedELBO(ELBO):
    """A loss whose steps take a batch of indices, `(B,)`, and return the negative mean of a bound over it, nats.

    The rows are fetched from the posterior's data. A subclass says in `draw_bounds` what the bound is, of a model and
    an encoder that `pairing` has checked, once. Arguments, attributes and errors are described in `MAPA_ELBO`.
    """

    pairing: type[Paired]

    def __init__(self, posterior: MapaPosterior, num_top: int, num_samples: int, plate: str | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.name = type(self).__name__
        self.posterior, self.num_top, self.num_samples = posterior, num_top, num_samples
        self._check_sizes()
        self.plate = plate
        self.reset_counts()
        self._programs: tuple[Program, Program] | None = None

    @property
    def num_datapoints(self) -> int:
        """N, of the posterior's data."""
        return self.posterior.num_datapoints

    @property
    def device(self) -> torch.device:
        """Where the posterior lies, and its data with it."""
        return self.posterior.indices.device

    def __repr__(self) -> str:
        held = f"{self.posterior.num_neighbours} of {self.num_datapoints} datapoints by {self.posterior.kernel}"
        chosen = ("num_top", "num_samples", "replacement", "num_draws")
        told = [f"{name}={getattr(self, name)}" for name in chosen if hasattr(self, name)]
        return f"{self.name}({held}, {', '.join(told)})"

    def reset_counts(self) -> None:
        """Count passes from 0 again."""
        self.num_encoded = self.num_decoded = self.num_scored = 0

    def draw_bounds(self, joint: Any, indices: Tensor) -> tuple[Tensor, int]:
        """One draw of the bound for each of `indices`, `(B,)`, and how many rows were encoded and decoded for it."""
        raise NotImplementedError

    def bounds(self, model: Program, encoder: Program, indices: Tensor) -> Tensor:
        """One draw of the bound for each of the datapoints `indices` `(B,)`: shape `(B,)`, nats, differentiable."""
        indices = checked_indices(indices, self.num_datapoints).to(self.device)
        values, passes = self.draw_bounds(self._paired(model, encoder), indices)
        self.num_encoded += passes
        self.num_decoded += passes
        self.num_scored += len(indices)
        return values

    def minibatches(self, batch_size: int) -> list[Tensor]:
        """One pass over the data, in random order, in batches of indices; the last may be short."""
        return list(torch.randperm(self.num_datapoints, device="cpu").split(batch_size))

    def differentiable_loss(self, model: Program, guide: Program, *args: Any) -> Tensor:
        """-L of one batch of indices, the only argument."""
        if len(args) != 1 or not isinstance(args[0], Tensor):
            raise InputError(
                f"{self.name}: step takes a batch of indices, such as torch.arange(100); it fetches the data"
            )
        return -self.bounds(model, guide, args[0]).mean()

    def loss(self, model: Program, guide: Program, *args: Any) -> float:
        """-L of one batch of indices, without gradients."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args).item()

    def loss_and_grads(self, model: Program, guide: Program, *args: Any) -> float:
        """-L of one batch of indices; its gradient is left in the parameters."""
        loss = self.differentiable_loss(model, guide, *args)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the bound is {-value}; lower the learning rate, or bound the scales")
        if loss.requires_grad:
            loss.backward()
        return value

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError(f"{self.name} scores pairs of datapoints, which no one trace holds")

    def _paired(self, model: Program, encoder: Program) -> Paired:
        if self._programs is None or self._programs[0] is not model or self._programs[1] is not encoder:
            self._joint = self.pairing(model, encoder, self.posterior.data, self.plate)
            self._programs = model, encoder
        return self._joint

    def _check_sizes(self) -> None:
        if self.num_top < 0 or self.num_samples < 0 or self.num_top + self.num_samples < 1:
            raise InputError(
                f"{self.name}: num_top and num_samples must not be negative, and one of them positive, got "
                f"{self.num_top} and {self.num_samples}"
            )
        number, kept = self.posterior.num_neighbours, self._kept()
        if self.num_top > number:
            raise InputError(f"{self.name}: num_top={self.num_top}, but there are {number} {kept}; lower it")
        if self.num_samples and self.num_top == number:
            raise InputError(
                f"{self.name}: num_top={self.num_top} leaves none of the {number} {kept} to draw; set num_samples=0"
            )

    def _check_without_replacement(self) -> None:
        number = self.posterior.num_neighbours
        if self.num_samples > number - self.num_top:
            raise InputError(
                f"{self.name}: num_samples={self.num_samples} without replacement, but num_top={self.num_top} leaves "
                f"{number - self.num_top} of the {number} {self._kept()} to draw; lower it"
            )

    def _kept(self) -> str:
        few = self.posterior.num_neighbours < self.posterior.num_datapoints
        return "neighbours that the posterior keeps of each row" if few else "N datapoints"


def checked_indices(indices: Tensor, num_datapoints: int) -> Tensor:
    """A batch of indices `(B,)`. Raises `InputError` where it is empty, out of range, or not of whole numbers."""
    whole = not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool)
    if indices.dim() != 1 or len(indices) == 0 or not whole:
        told = f"{indices.dtype} of shape {tuple(indices.shape)}"
        raise InputError(f"indices: expected at least one whole number, shape (B,), got {told}")
    if int(indices.min()) < 0 or int(indices.max()) >= num_datapoints:
        raise InputError(f"indices: they must be from 0 to N - 1 = {num_datapoints - 1}")
    return indices.long()
