"""Paths of AIS: from a Gaussian, or from the model's prior, to log p(x, z) by leapfrog moves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrogaps.annealing.loop import Adaptation
from pyrogaps.capture import GradientEvaluator
from pyrogaps.density import JointDensity
from pyrogaps.gaussians import Gaussian
from pyrogaps.hmc import Evaluate, Evaluation, HMCState, Leapfrog
from pyrogaps.scales import Scale
from pyrogaps.streams import BLOCK, Chunk, Stream

NUM_SCALE_DRAWS = 256


@dataclass(frozen=True)
class Path:
    """A path for the datapoints of a chunk.

    Attributes:
        joint: the density at its end.
        draw: points `(S, B, dim)` of f_0, from how many chains and a stream.
        evaluate: the path's densities as functions of `S` points of each datapoint, from S.
        scale: the preconditioner of its moves, see `Leapfrog`.
        start: what streams of draws of f_0 are called.
    """

    joint: JointDensity
    draw: Callable[[int, Stream], Tensor]
    evaluate: Callable[[int], Evaluate]
    scale: Scale
    start: str = "start"

    def move(self, num_chains: int, num_leapfrog: int) -> "LeapfrogMove":
        """What moves `num_chains` chains of each datapoint along the path."""
        return LeapfrogMove(self.evaluate(num_chains), self.scale, num_leapfrog)


@dataclass(frozen=True)
class LeapfrogMove(Leapfrog):
    """Leapfrog steps on (1 - b) log f_0 + b log p(x, z), see `Move`."""

    @property
    def adaptation(self) -> Adaptation:
        return Adaptation(first=self._like.shape[1] ** -0.25, warm_up_rate=1.0, rate=0.5)

    @property
    def _like(self) -> Tensor:
        return self.scale if isinstance(self.scale, Tensor) else self.scale.diagonal

    def target(self, beta: Tensor) -> tuple[Tensor, Tensor]:
        beta = beta.to(self._like)
        return 1 - beta, beta

    def difference(self, state: HMCState) -> Tensor:
        log_start, log_joint = state.log_densities
        return log_joint.double() - log_start.double()


def anchored_path(evaluator: GradientEvaluator, start: Gaussian, chunk: Chunk) -> Path:
    """The path from a Gaussian, such as one fitted to a guide."""
    joint = evaluator.joint

    def draw(num_chains: int, stream: Stream) -> Tensor:
        noise = stream.noise(chunk, dtype=joint.dtype, device=joint.device)
        return start.draw(noise.normal(num_chains, joint.dim))

    def evaluate(num_chains: int) -> Evaluate:
        bound = evaluator.bind(chunk.indices, num_chains)
        return from_gaussian(start, bound, bound.gradients)

    return Path(joint, draw, evaluate, start.moves)


def prior_path(evaluator: GradientEvaluator, chunk: Chunk, scale_stream: Stream) -> Path:
    """The path from the model's own latent distribution; `evaluator` must have been made with `split=True`."""
    joint = evaluator.joint

    def draw(num_chains: int, stream: Stream) -> Tensor:
        parts = []
        for block in chunk.blocks():
            stream.reseed(block.start // BLOCK)
            parts.append(joint.sample_prior(num_chains, block.indices))
        return torch.cat(parts, 1)

    def evaluate(num_chains: int) -> Evaluate:
        bound = evaluator.bind(chunk.indices, num_chains)
        return Evaluation(lambda position: HMCState(position, *bound(position)), bound.gradients)

    spread = draw(NUM_SCALE_DRAWS, scale_stream).std(0)
    scale, active = torch.where(spread > 0, spread, torch.ones_like(spread)), joint.active(chunk.indices)
    moving = scale if active is None else torch.where(active, scale, torch.zeros_like(scale))
    return Path(joint, draw, evaluate, moving, "prior")


def from_gaussian(start: Gaussian, joint: Any, gradients: Callable[[Tensor], tuple[Tensor, ...]]) -> Evaluation:
    """The path's evaluation when f_0 is a Gaussian: its density in closed form beside the model's.

    `joint` gives the model's log density and gradient, `gradients` the gradient alone.
    """

    def evaluate(position: Tensor) -> HMCState:
        log_start, start_gradient = start.log_density(position)
        (log_joint,), (gradient,) = joint(position)
        return HMCState(position, (log_start, log_joint), (start_gradient, gradient))

    return Evaluation(evaluate, lambda position: (start.gradient(position), *gradients(position)))
