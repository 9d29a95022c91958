"""log p(x) of the whole data set, by the ladder on the space of all its latents."""

from contextlib import suppress
from dataclasses import dataclass

from pyrogaps.density import Data, JointDensity
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.evidence import Ladder, LadderEstimate
from pyrogaps.evidence.log_evidence import measured
from pyrogaps.problem import Problem
from pyrogaps.run import Run

# Theta and the latents of all datapoints together may be this many.
MAX_WHOLE = 256
# Of the tolerance of the global gap: the standard error that log p(x) is measured to.
ERROR_SHARE = 0.2


@dataclass(frozen=True)
class WholeEvidence:
    """log p(x) of a data set between two bounds, nats, with their standard errors, and whether it can be trusted.

    One datapoint is examined for modes that the ladder would miss, so that those of theta are found.
    """

    lower: float
    lower_mcse: float
    upper: float
    upper_mcse: float
    reliable: bool


def whole_evidence(
    model: Program, guide: Program, data: Data, num_latents: int, tolerance: float, run: Run
) -> WholeEvidence | None:
    """log p(x) of a data set with `num_latents` latents in all; None where these are too many.

    The ladder starts from the guide, where that has a density over all latents.
    """
    if num_latents > MAX_WHOLE:
        return None
    problem = Problem(model, None, JointDensity(model, data, False, make_whole=True), None)
    with suppress(InputError):  # else it starts from the prior
        problem = problem.with_guide(guide)
    ladder = Ladder(tolerance=ERROR_SHARE * tolerance)
    estimate = measured(problem, ladder, None, run.derived("whole data set").quiet(), 1)
    assert isinstance(estimate, LadderEstimate)
    assert estimate.upper is not None
    lower, upper = (float(value) for value in (estimate.value, estimate.upper))
    return WholeEvidence(lower, float(estimate.mcse), upper, float(estimate.upper_mcse), bool(estimate.reliable.all()))
