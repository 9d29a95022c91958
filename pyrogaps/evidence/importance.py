"""The rungs of importance sampling: draws from a proposal, their weights, and whether these can be trusted."""

from typing import Protocol

import torch
from torch import Tensor

from pyrogaps.bounds import refuse_nan
from pyrogaps.density import GuideDensity, JointDensity
from pyrogaps.density.draws import BlockedGuide, Posterior
from pyrogaps.evidence.ladder_settings import LadderSettings
from pyrogaps.gaussians import Gaussian
from pyrogaps.log_weights import effective_sample_size, pareto_khat
from pyrogaps.run import Run
from pyrogaps.streams import PARTICLE_BLOCK, Chunk, particle_blocks


class Proposal(Protocol):
    """Where draws come from, and the density that they are weighted by."""

    joint: JointDensity

    def draw(self, positions: Tensor, number: int, purpose: str, part: int) -> tuple[Tensor, Tensor]:
        """`z` `(number, M, dim)` and log q `(number, M)` at `positions` of a block; `part` of a stream."""
        ...


class FromGuide:
    """Draws from a guide, in the space that it is defined on (with its auxiliary variables, where it has them)."""

    def __init__(self, joint: JointDensity, posterior: Posterior, block: Chunk, run: Run) -> None:
        self.joint = posterior.joint if isinstance(posterior, GuideDensity) else joint
        self._guide, self._run = BlockedGuide(posterior, block), run

    def draw(self, positions: Tensor, number: int, purpose: str, part: int) -> tuple[Tensor, Tensor]:
        z, log_q = self._guide.sample(number, self._run.stream(purpose), part)
        return z[:, positions], log_q[:, positions]


class FromGaussian:
    """Draws from Gaussians."""

    def __init__(self, joint: JointDensity, start: Gaussian, block: Chunk, run: Run) -> None:
        self.joint, self.start, self._block, self._run = joint, start, block, run

    def draw(self, positions: Tensor, number: int, purpose: str, part: int) -> tuple[Tensor, Tensor]:
        columns = Chunk(self._block.start, self._block.start + len(positions))
        stream = self._run.stream(f"{purpose} {part}")
        noise = stream.noise(columns, dtype=self.joint.dtype, device=self.joint.device)
        start = self.start.at(positions)
        z = start.draw(noise.normal(number, self.joint.dim))
        return z, start.log_density(z)[0]


def weigh(proposal: Proposal, block: Chunk, positions: Tensor, numbers: Tensor, purpose: str) -> list[Tensor]:
    """log p(x, z) - log q(z) of `numbers` `(M,)` draws for each of the datapoints at `positions`, nats.

    Numbers are multiples of a particle block.
    """
    parts: list[list[Tensor]] = [[] for _ in positions]
    with torch.no_grad():
        for part, size in enumerate(particle_blocks(int(numbers.max()) if len(numbers) else 0)):
            wanting = (numbers > part * PARTICLE_BLOCK).nonzero()[:, 0]
            subset = positions[wanting]
            z, log_q = proposal.draw(subset, size, purpose, part)
            indices = block.start + subset
            weights = refuse_nan(proposal.joint(z, indices).double() - log_q.double(), indices)
            for place, column in zip(wanting.tolist(), weights.T, strict=True):
                parts[place].append(column)
    return [torch.cat(columns) for columns in parts]


def excess(log_weights: Tensor) -> Tensor:
    """The relative variance of weights, Var(w) / E[w]^2, of `(S, M)` log-weights: `(M,)`."""
    return len(log_weights) / effective_sample_size(log_weights) - 1


def trusted(log_weights: Tensor, settings: LadderSettings) -> Tensor:
    """Whether importance sampling can be trusted: its k-hat is low and its effective sample size is not, `(M,)`.

    Where even a hundred times the variance of the weights would meet the tolerance, k-hat is ignored: it then describes
    the tail of weights that hardly vary.
    """
    varies = excess(log_weights)
    # NaN, where the weights do not vary in their tail, is not above.
    heavy = pareto_khat(log_weights).to(log_weights.device) > settings.max_khat
    near_constant = 100 * varies / PARTICLE_BLOCK <= settings.tolerance**2
    return near_constant | (~heavy & (varies <= 1 / settings.min_ess - 1))
