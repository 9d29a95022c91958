"""The ladder on data simulated from the model, where log p(x) has an upper bound too: which rungs to trust."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.density.draws import Posterior
from pyrogaps.evidence.ais import AIS
from pyrogaps.evidence.climb import climb
from pyrogaps.evidence.ladder_settings import LadderSettings
from pyrogaps.evidence.plan import GUIDE
from pyrogaps.evidence.simulated_bounds import SimulatedBounds
from pyrogaps.log_weights import log_mean_exp, mcse_of_log_mean_exp
from pyrogaps.problem import Simulated
from pyrogaps.refine import Refiner
from pyrogaps.run import Run
from pyrogaps.streams import Chunk


@dataclass(frozen=True, repr=False)
class LadderCheck(SimulatedBounds):
    """`lower` is the ladder's bound from rung `lowest` on, with standard error `lower_mcse`; `upper` that of AIS in
    reverse from the latents behind the data.
    """

    lowest: int
    lower_mcse: Tensor


def check_ladder(
    simulated: Simulated, refiner: Refiner, settings: LadderSettings, reverse: AIS, run: Run
) -> LadderCheck:
    """The lowest rung from which on log p(x) is on average no further than the tolerance below its upper bound.

    It is chosen on simulated data, so that what is measured afterwards does not depend on it. Where there is no such
    rung, the last one is returned. `reverse` gives the upper bound.
    """
    problem, z = simulated.problem, simulated.z
    upper_side = reverse.prepare(problem, run)
    posteriors: dict[Chunk, Posterior] = {}

    def bound_above(chunk: Chunk) -> Tensor:
        posteriors[chunk], _ = refiner(problem.evaluator, chunk, run)
        exact = z[chunk.start : chunk.stop]
        return -log_mean_exp(upper_side.negative_log_weights(chunk, posteriors[chunk], exact))

    upper = torch.cat(run.map(bound_above, problem.joint)).cpu()

    def from_rung(rung: int) -> LadderCheck:
        def bound_below(chunk: Chunk) -> tuple[Tensor, Tensor]:
            blocks = climb(problem.evaluator, posteriors[chunk], chunk, settings, run, rung)
            weights = [column for block in blocks for column in block.log_weights]
            values = torch.stack([log_mean_exp(column) for column in weights])
            return values, torch.stack([mcse_of_log_mean_exp(column) for column in weights])

        parts = run.map(bound_below, problem.joint)
        lower, mcse = (torch.cat(side).cpu() for side in zip(*parts, strict=True))
        return LadderCheck(lower, upper, rung, mcse)

    check = from_rung(GUIDE)
    for rung in range(GUIDE + 1, settings.num_rungs):
        if check.width <= settings.tolerance:
            break
        check = from_rung(rung)
    return check
