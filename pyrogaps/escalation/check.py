"""The ladder on data simulated from the model, where log p(x) has an upper bound too: which rungs to trust."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrogaps.ais import AIS, SimulatedBounds, anchor, anchored_path, run_path, run_pilot, simulated_pair
from pyrogaps.bounds import Plate, over_chunks
from pyrogaps.capture import GradientEvaluator
from pyrogaps.density import Data
from pyrogaps.density.runs import Program
from pyrogaps.escalation.climb import Found, climb_chunk
from pyrogaps.escalation.plan import GUIDE
from pyrogaps.escalation.result import escalated
from pyrogaps.escalation.settings import Escalation
from pyrogaps.log_weights import log_mean_exp
from pyrogaps.refine import Refinement, own_family, refine_chunk
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
    model: Program,
    guide_or_family: Any,
    data: Data,
    *,
    settings: Escalation,
    refinement: Refinement,
    lowest: int | None = None,
    plate: Plate = None,
    batch_size: int = 64,
    seed: int = 0,
) -> LadderCheck:
    """The lowest rung from which on log p(x) is on average no further than the tolerance below its upper bound.

    It is decided on data of its own, in the shape of `data`, so that what is measured afterwards does not depend on it.
    Where no rung is, the last one is returned; `lowest`, where given, is checked alone.

    Raises `InputError` where the model cannot be simulated.
    """
    joint, density, z = simulated_pair(model, guide_or_family, data, plate, seed)
    evaluator = GradientEvaluator(joint, settings.mode)
    family = guide_or_family if density is None else own_family(density)
    longer = max(1, math.ceil(FOR_TOLERANCE / settings.tolerance))
    reverse = AIS(num_temperatures=SHORTEST * longer, mode=settings.mode)

    posteriors: dict[Chunk, Refinable] = {}

    def bound(chunk: Chunk) -> Tensor:
        posteriors[chunk], _ = refine_chunk(family, evaluator, chunk, refinement, seed)
        start = anchor(joint, posteriors[chunk], chunk, reverse.widen, seed, chunk.start)
        path = anchored_path(evaluator, start, chunk, seed)
        tuning = run_pilot(path, evaluator, chunk, reverse, seed)
        ran = run_path(path, tuning, evaluator, chunk, reverse, seed, z[chunk.start : chunk.stop])
        return -log_mean_exp(-ran.log_weights)

    upper = torch.cat(over_chunks(bound, joint, batch_size, seed)).cpu()

    def from_rung(rung: int) -> LadderCheck:
        def one(chunk: Chunk) -> list[Found]:
            return climb_chunk(evaluator, posteriors[chunk], chunk, chunk.start, settings, seed, rung)

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
