"""The first rung of the ladder: importance sampling from the anchor, and whether its weights can be trusted."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.bounds import refuse_nan
from pyrogaps.capture.slots import Slots
from pyrogaps.evidence.ladder_settings import LadderSettings
from pyrogaps.gaussians import Gaussian
from pyrogaps.log_weights import effective_sample_size, pareto_khat
from pyrogaps.run import Run
from pyrogaps.streams import PARTICLE_BLOCK, particle_blocks

# Draws after which weights that look bad are examined no further, and as many more with the largest k-hat then: that of
# so few draws is known to about 0.2. Of 256 MNIST posteriors this rejects one in three of those that would be rejected
# in the end, and 5% of the others.
NUM_FIRST_DRAWS, NUM_SECOND_DRAWS, MAX_EARLY_KHAT = 64, PARTICLE_BLOCK, 0.5


@dataclass(frozen=True)
class Sampler:
    """Importance sampling for the datapoints of a block from the Gaussians `start`."""

    slots: Slots
    start: Gaussian
    run: Run

    def log_weights(self, positions: Tensor, number: int, purpose: str) -> Tensor:
        """log p(x, z) - log q(z), `(number, M)` in nats, of draws for the datapoints at `positions` of the block."""
        start, parts = self.start.at(positions), []
        for part, size in enumerate(particle_blocks(number)):
            stream = self.run.stream(f"ladder {purpose} {part}")
            noise = self.slots.noise(stream, len(positions), start.loc.dtype)
            z = start.draw(noise.normal(size, self.slots.dim))
            weights = self.slots.values(positions, z).double() - start.log_density(z)[0].double()
            parts.append(refuse_nan(weights, self.slots.block.indices[positions]))
        return torch.cat(parts)


def pilot_sampling(sampler: Sampler, positions: Tensor, settings: LadderSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Which of the datapoints at `positions` `(M,)` can be measured by importance sampling: positions, relative
    variances of their weights, and the number of draws that this took for each of the M.

    A few draws for all, more for those whose effective sample size is large enough, and as many as the settings say
    for those whose k-hat is not far too large.
    """
    first = sampler.log_weights(positions, NUM_FIRST_DRAWS, "first pilot")
    varies = excess(first)
    trusted, most = _near_constant(varies, settings), 1 / settings.min_ess - 1
    left = (~trusted & (varies <= most)).nonzero()[:, 0]
    cost, weights = torch.full((len(positions),), NUM_FIRST_DRAWS), first[:, left]
    rest = max(0, settings.num_pilot_draws - NUM_FIRST_DRAWS - NUM_SECOND_DRAWS)
    looks = (("second pilot", NUM_SECOND_DRAWS), ("third pilot", rest))
    for name, number in looks[: 1 + (rest > 0)]:
        if not len(left):
            break
        weights = torch.cat([weights, sampler.log_weights(positions[left], number, name)])
        cost[left.cpu()] += number
        varies[left] = excess(weights)
        last = len(weights) >= settings.num_pilot_draws
        # NaN, where the weights do not vary in their tail, is not above.
        heavy = pareto_khat(weights) > (settings.max_khat if last else max(MAX_EARLY_KHAT, settings.max_khat))
        good = ~heavy.to(varies.device) & (varies[left] <= most)
        if last:
            trusted[left] = good
        left, weights = left[good], weights[:, good]
    return positions[trusted.cpu()], varies[trusted].cpu(), cost


def excess(log_weights: Tensor) -> Tensor:
    """The relative variance of weights, Var(w) / E[w]^2, of `(S, M)` log-weights: `(M,)`; infinite where all are 0."""
    varies = len(log_weights) / effective_sample_size(log_weights) - 1
    return torch.nan_to_num(varies, nan=torch.inf)


def _near_constant(varies: Tensor, settings: LadderSettings) -> Tensor:
    """Where even a hundred times the variance of the weights would meet the tolerance, so that their tail is no
    matter.
    """
    return 100 * varies / PARTICLE_BLOCK <= settings.tolerance**2
