"""The ladder where discrete latents are summed out: by parts, one for every mode."""

from torch import Tensor

from pyrogaps.capture import GradientEvaluator
from pyrogaps.density.data import selected
from pyrogaps.evidence.climb import Climbed
from pyrogaps.evidence.ladder_settings import LadderSettings
from pyrogaps.evidence.parts import PartSlots, climbed_by_parts
from pyrogaps.gaussians import Curvature, anchor_of, fitted, prior_gaussian
from pyrogaps.modes import Modes, explore, modes_by_states
from pyrogaps.problem import Problem
from pyrogaps.run import Run
from pyrogaps.state_modes import has_few_states
from pyrogaps.streams import Chunk


def climbed_by_components(problem: Problem, chunk: Chunk, block: Chunk, settings: LadderSettings, run: Run) -> Climbed:
    """The ladder for the datapoints of a block of a chunk.

    Their modes are those of the states of the discrete latents; with many states, what chains from the prior find.
    """
    if has_few_states(problem.joint):
        modes = modes_by_states(problem, block, run)
    else:
        wide = prior_gaussian(problem, block, run.stream("components prior"))
        anchor = anchor_of(problem, chunk, run).within(chunk, block)
        modes = explore(problem, anchor, block, run.derived("components"), wide)
    evaluator = problem.evaluator.over(problem.joint.over(selected(problem.joint.data, block.indices)))
    run = run.derived("components", block.start)  # parts are counted from 0 in every block
    return climbed_from_parts(evaluator, modes, settings, run)


def climbed_from_parts(evaluator: GradientEvaluator, modes: Modes, settings: LadderSettings, run: Run) -> Climbed:
    """As `climbed_by_parts`, from Gaussians by the curvature of the parts themselves: that of a state is another."""
    return climbed_by_parts(evaluator, modes, settings, run, _remeasured(evaluator, modes, run))


def _remeasured(evaluator: GradientEvaluator, modes: Modes, run: Run) -> Curvature:
    """Gaussians by the curvature of the parts, from those of `modes`; these where a fit does not settle."""
    slots, known = PartSlots(evaluator, modes), modes.curvature
    noise = slots.noise(run.stream("components parts"), len(modes.owners), known.gaussian.loc.dtype)

    def gradients(positions: Tensor, points: Tensor) -> Tensor:
        return slots.gradients(positions, points)

    fit = fitted(known.gaussian, gradients, noise)
    settled = fit.agrees & ~fit.cut
    places, gaussian = settled.nonzero()[:, 0], known.gaussian
    gaussian = gaussian.with_replaced(places, fit.gaussian.at(places)) if len(places) else gaussian
    return Curvature(gaussian, known.cut & ~settled, settled, fit.num_gradients)
