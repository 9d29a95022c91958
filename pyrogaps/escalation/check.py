"""The ladder on data simulated from the model, where log p(x) has an upper bound too: which rungs to trust."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.ais import AIS, SimulatedBounds, anchor, anchored_path, run_path, run_pilot
from pyrogaps.bounds import over_chunks
from pyrogaps.capture import GradientEvaluator
from pyrogaps.escalation.climb import Found, climb_chunk
from pyrogaps.escalation.plan import GUIDE
from pyrogaps.escalation.result import escalated
from pyrogaps.escalation.settings import Escalation
from pyrogaps.log_weights import log_mean_exp
from pyrogaps.problem import Simulated
from pyrogaps.refine import OwnFamily, Refinement, refine_chunk
from pyrogaps.refine.families import Family
from pyrogaps.refine.local import Refinable
from pyrogaps.streams import Chunk

# The AIS whose reverse is the upper bound: 50 temperatures for a tolerance of 0.1, more for less.
SHORTEST, FOR_TOLERANCE = 50, 0.1


@dataclass(frozen=True)
class LadderCheck(SimulatedBounds):
    """`lower` is the ladder's bound from rung `lowest` on, with standard error `lower_mcse`; `upper` that of AIS in
    reverse from the latents behind the data.
    """

    lowest: int
    lower_mcse: Tensor


def check_ladder(
    simulated: Simulated,
    family: OwnFamily | Family,
    settings: Escalation,
    refinement: Refinement,
    batch_size: int,
    seed: int,
    lowest: int | None = None,
) -> LadderCheck:
    """The lowest rung from which on log p(x) is on average no further than the tolerance below its upper bound.

    It is decided on simulated data, so that what is measured afterwards does not depend on it. Where no rung is, the
    last one is returned; `lowest`, where given, is checked alone.
    """
    joint, z = simulated.problem.joint, simulated.z
    evaluator = GradientEvaluator(joint, settings.mode)
    longer = max(1, math.ceil(FOR_TOLERANCE / settings.tolerance))
    reverse = AIS(num_temperatures=SHORTEST * longer, mode=settings.mode)

    posteriors: dict[Chunk, Refinable] = {}

    def bound(chunk: Chunk) -> Tensor:
        posteriors[chunk], _ = refine_chunk(family, evaluator, chunk, refinement, seed)
        start = anchor(joint, posteriors[chunk], chunk, reverse.widen, seed)
        path = anchored_path(evaluator, start, chunk, seed)
        tuning = run_pilot(path, evaluator, chunk, reverse, seed)
        ran = run_path(path, tuning, evaluator, chunk, reverse, seed, z[chunk.start : chunk.stop])
        return -log_mean_exp(-ran.log_weights)

    upper = torch.cat(over_chunks(bound, joint, batch_size, seed)).cpu()

    def from_rung(rung: int) -> LadderCheck:
        def one(chunk: Chunk) -> list[Found]:
            return climb_chunk(evaluator, posteriors[chunk], chunk, settings, seed, rung)

        found = [block for blocks in over_chunks(one, joint, batch_size, seed) for block in blocks]
        estimate = escalated(found)
        return LadderCheck(estimate.value, upper, rung, estimate.mcse)

    if lowest is not None:
        return from_rung(lowest)
    check = from_rung(GUIDE)
    for rung in range(GUIDE + 1, settings.num_rungs):
        if check.width <= settings.tolerance:
            break
        check = from_rung(rung)
    return check
