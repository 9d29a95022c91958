"""The rungs of importance sampling: draws from a proposal, their weights, and whether these can be trusted."""

from typing import Protocol

import torch
from torch import Tensor

from pyrogaps.anneal import GaussianStart
from pyrogaps.bounds import refuse_nan
from pyrogaps.density import GuideDensity, JointDensity
from pyrogaps.density.draws import BlockedGuide, Posterior
from pyrogaps.escalation.settings import Escalation
from pyrogaps.log_weights import effective_sample_size, pareto_khat
from pyrogaps.streams import PARTICLE_BLOCK, Chunk, Noise, particle_blocks


class Proposal(Protocol):
    """Where draws come from, and the density that they are weighed by."""

    joint: JointDensity

    def draw(self, members: Tensor, number: int, purpose: str, part: int) -> tuple[Tensor, Tensor]:
        """`z` `(number, M, dim)` and log q `(number, M)` of the datapoints at places `members`; `part` of a stream."""
        ...


class FromGuide:
    """Draws from a guide, in the space that it is defined on (with its auxiliary variables, where it has them)."""

    def __init__(self, joint: JointDensity, posterior: Posterior, block: Chunk, seed: int) -> None:
        self.joint = posterior.joint if isinstance(posterior, GuideDensity) else joint
        self._guide, self._seed = BlockedGuide(posterior, block), seed

    def draw(self, members: Tensor, number: int, purpose: str, part: int) -> tuple[Tensor, Tensor]:
        z, log_q = self._guide.sample(number, self._seed, purpose, part)
        return z[:, members], log_q[:, members]


class FromGaussian:
    """Draws from Gaussians."""

    def __init__(self, joint: JointDensity, start: GaussianStart, block: Chunk, seed: int) -> None:
        self.joint, self.start, self._block, self._seed = joint, start, block, seed

    def draw(self, members: Tensor, number: int, purpose: str, part: int) -> tuple[Tensor, Tensor]:
        columns = Chunk(self._block.start, self._block.start + len(members))
        labels = {"dtype": self.joint.dtype, "device": self.joint.device}
        noise = Noise(self._seed, f"{purpose} {part}", columns, **labels).normal(number, self.joint.dim)
        start = self.start.at(members)
        z = start.draw(noise)
        return z, start.log_density(z)[0]


def weigh(proposal: Proposal, block: Chunk, members: Tensor, numbers: Tensor, purpose: str) -> list[Tensor]:
    """log p(x, z) - log q(z) of `numbers` `(M,)` draws, multiples of a particle block, for each of `members`, nats."""
    parts: list[list[Tensor]] = [[] for _ in members]
    with torch.no_grad():
        for part, size in enumerate(particle_blocks(int(numbers.max()) if len(numbers) else 0)):
            wanting = (numbers > part * PARTICLE_BLOCK).nonzero()[:, 0]
            some = members[wanting]
            z, log_q = proposal.draw(some, size, purpose, part)
            indices = block.start + some
            weights = refuse_nan(proposal.joint(z, indices).double() - log_q.double(), indices)
            for place, column in zip(wanting.tolist(), weights.T, strict=True):
                parts[place].append(column)
    return [torch.cat(columns) for columns in parts]


def excess(log_weights: Tensor) -> Tensor:
    """The relative variance of weights, Var(w) / E[w]^2, of `(S, M)` log-weights: `(M,)`."""
    return len(log_weights) / effective_sample_size(log_weights) - 1


def trusted(log_weights: Tensor, settings: Escalation) -> Tensor:
    """Whether to stop at importance sampling: its k-hat is low and not nearly all of its draws are wasted, `(M,)`.

    Weights that hardly vary have a k-hat too, of what little there is: where a hundred times their variance would do,
    it is not heeded.
    """
    varies = excess(log_weights)
    # NaN, where the weights do not vary in their tail, is not above.
    heavy = pareto_khat(log_weights).to(log_weights.device) > settings.max_khat
    near_constant = 100 * varies / PARTICLE_BLOCK <= settings.tolerance**2
    return near_constant | (~heavy & (varies <= 1 / settings.min_ess - 1))
