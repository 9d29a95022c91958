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

# Draws from which on weights are examined closely, if they look well at all.
NUM_FIRST_DRAWS = 64


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

    A few draws for all, and as many as the settings say for those whose effective sample size is large enough.
    """
    first = sampler.log_weights(positions, NUM_FIRST_DRAWS, "first pilot")
    varies = excess(first)
    trusted = _near_constant(varies, settings)
    examined = (~trusted & (varies <= 1 / settings.min_ess - 1)).nonzero()[:, 0]
    cost = torch.full((len(positions),), NUM_FIRST_DRAWS)
    if len(examined):
        more = max(PARTICLE_BLOCK, settings.num_pilot_draws - NUM_FIRST_DRAWS)
        weights = torch.cat([first[:, examined], sampler.log_weights(positions[examined], more, "second pilot")])
        cost[examined.cpu()] += more
        varies[examined] = excess(weights)
        # NaN, where the weights do not vary in their tail, is not above.
        heavy = pareto_khat(weights).to(weights.device) > settings.max_khat
        trusted[examined] = ~heavy & (varies[examined] <= 1 / settings.min_ess - 1)
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
