"""`log_evidence`: log p(x) of every datapoint, each by what it takes."""

from dataclasses import replace

from pyrogaps.bounds import over_chunks
from pyrogaps.capture import GradientEvaluator
from pyrogaps.density import Data, GuideDensity
from pyrogaps.density.data import part_of
from pyrogaps.density.draws import Posterior
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.escalation.check import LadderCheck, check_ladder
from pyrogaps.escalation.climb import Found, climb_chunk
from pyrogaps.escalation.plan import GUIDE
from pyrogaps.escalation.result import EscalatedEstimate, escalated
from pyrogaps.escalation.settings import Escalation
from pyrogaps.problem import Plate, Problem
from pyrogaps.refine import OwnFamily, Refinement, own_family, refine_chunk
from pyrogaps.streams import Chunk, derive_seed


def checked(
    problem: Problem, own: OwnFamily, settings: Escalation, refinement: Refinement, batch_size: int, seed: int
) -> LadderCheck | str | None:
    """The ladder's check on data like those of `problem`; None where none is asked for, or why there can be none."""
    if settings.num_simulated == 0:
        return None
    stream = derive_seed(seed, "ladder")
    try:
        part = part_of(problem.joint.data, settings.num_simulated)[0]
        simulated = own.elsewhere(problem).over(part).simulated(stream)
        return check_ladder(simulated, own.over(simulated.problem), settings, refinement, batch_size, stream)
    except InputError as error:
        return str(error)


def log_evidence(
    model: Program | Problem,
    guide: Program | Posterior | None = None,
    data: Data | None = None,
    *,
    settings: Escalation | None = None,
    refinement: Refinement | None = None,
    plate: Plate = None,
    batch_size: int = 64,
    seed: int = 0,
) -> EscalatedEstimate:
    r"""log p(x_n) of every datapoint to a stated standard error, by what each of them takes.

    A ladder of estimators is climbed, datapoint by datapoint, until one can be trusted: importance sampling from the
    refined guide; from a Gaussian with the curvature of log p(x, z) about it; AIS from that Gaussian, as long as need
    be. Every rung's value is log-mean-exp of weights with $\mathbb E[w] = p(x_n)$, a lower bound in expectation. Which
    rung and how many draws is decided on pilot draws, which are thrown away.

    Args:
        model, guide, data, plate: as for `ais`, or a `Problem` alone. A guide is refined first; what `refine` returned
            is taken as it is.
        settings: see `Escalation`.
        refinement: settings of the refinement.
        batch_size: datapoints held at once; it does not change the result.
        seed: of all the randomness.

    Returns:
        An `EscalatedEstimate` in nats: `value`, `mcse`, `method`, `num_draws`, `num_evaluations` `(N,)`.

    Raises:
        InputError: as `ais`.
    """
    settings, refinement = settings or Escalation(), refinement or Refinement()
    problem = Problem.of(model, guide, data, plate)
    density, evaluator = problem.guided(), GradientEvaluator(problem.joint, settings.mode)
    own: OwnFamily | None = None
    check: LadderCheck | str | None = None
    if isinstance(density, GuideDensity):
        own = own_family(density)
        check = checked(problem, own, settings, refinement, batch_size, seed)
    lowest = check.lowest if isinstance(check, LadderCheck) else GUIDE

    def one(chunk: Chunk) -> list[Found]:
        if own is None:
            return climb_chunk(evaluator, density, chunk, settings, seed, lowest)
        refined, _ = refine_chunk(own, evaluator, chunk, refinement, seed)
        return climb_chunk(evaluator, refined, chunk, settings, seed, lowest)

    found = [block for blocks in over_chunks(one, problem.joint, batch_size, seed) for block in blocks]
    return replace(escalated(found), check=check if isinstance(check, LadderCheck) else None)
