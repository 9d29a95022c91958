r"""Modes of a posterior whose discrete latents are summed out: a Gaussian for each of their states.

$p(x, z) = \sum_y p(x, y, z)$ has several modes by nature. With few joint states y, Gaussians are fitted by curvature to
log p(x, y, z) for each, at every datapoint; their Laplace masses approximate p(x, y). States `NEGLIGIBLE` nats below
the largest, less than 1e-4 of the mass each, get no Gaussian, and Gaussians that nearly coincide become one: this
changes how well the integrals of `parts` are approximated, not what they add up to. With many states, chains from the
prior find the modes, as for any other posterior.
"""

import math

import torch
from torch import Tensor

from pyrogaps.capture import GradientEvaluator
from pyrogaps.capture.slots import Slots
from pyrogaps.density.at_states import DensityAtStates, all_states, num_states
from pyrogaps.density.data import selected
from pyrogaps.evidence.climb import Climbed
from pyrogaps.evidence.ladder_settings import LadderSettings
from pyrogaps.evidence.parts import PartSlots, climbed_by_parts
from pyrogaps.gaussians import Curvature, anchor_of, bhattacharyya, fitted, prior_gaussian
from pyrogaps.modes import NEGLIGIBLE, Modes, explore, polished
from pyrogaps.problem import Problem
from pyrogaps.run import Run
from pyrogaps.streams import Chunk

# Up to this many joint states of a datapoint, each is fitted.
MAX_STATES = 32
# Gaussians nearer than this Bhattacharyya distance become one, and a datapoint keeps the largest few.
COINCIDE, MAX_PARTS = 0.02, 8


def climbed_by_components(problem: Problem, chunk: Chunk, block: Chunk, settings: LadderSettings, run: Run) -> Climbed:
    """The ladder for the datapoints of a block, by a part for every mode."""
    modes = components(problem, chunk, block, run)
    evaluator = problem.evaluator.over(problem.joint.over(selected(problem.joint.data, block.indices)))
    run = run.derived("components", block.start)  # parts are counted from 0 in every block
    return climbed_by_parts(evaluator, modes, settings, run, remeasured(evaluator, modes, run))


def components(problem: Problem, chunk: Chunk, block: Chunk, run: Run) -> Modes:
    """The modes of the datapoints of a block of a chunk, by the states of their discrete latents."""
    if num_states(problem.joint.enumerated) > MAX_STATES:
        wide = prior_gaussian(problem, block, run.stream("components prior"))
        return explore(problem, anchor_of(problem, chunk, run).within(chunk, block), block, run, wide)
    owners, curvature, log_masses = _fits(problem, block, run)
    kept, masses = _merged(owners, curvature, log_masses)
    evaluations = torch.zeros(len(block), dtype=torch.long).index_add(0, owners, curvature.num_gradients.cpu())
    return Modes(owners[kept], curvature.at(kept), masses, evaluations, torch.ones(len(block), dtype=torch.bool))


def _fits(problem: Problem, block: Chunk, run: Run) -> tuple[Tensor, Curvature, Tensor]:
    """A Gaussian for every state of every datapoint: its owner, itself, and the logarithm of its Laplace mass."""
    table = all_states(problem.joint.enumerated)
    number = len(next(iter(table.values())))
    owners = torch.arange(len(block)).repeat_interleave(number)
    states = {name: numbers.repeat(len(block), *[1] * (numbers.dim() - 1)) for name, numbers in table.items()}
    density = DensityAtStates(problem.joint, block.indices[owners], states)
    recorder = run.remembered(
        "components", problem.joint.model, lambda: GradientEvaluator(density, problem.mode, quiet=True)
    )
    evaluator = recorder.over(density)
    start = prior_gaussian(problem, block, run.stream("components prior")).at(owners)
    parts, masses = [], []
    for pairs in torch.arange(len(owners)).split(len(block)):
        slots = Slots(evaluator, Chunk(int(pairs[0]), int(pairs[-1]) + 1))
        everyone = torch.arange(len(pairs))
        fit = polished(slots, start.at(pairs), everyone, run.derived("states", block.start, int(pairs[0])))
        parts.append(fit)
        heights = slots.values(everyone, fit.gaussian.loc[None])[0].double()
        masses.append((heights - fit.gaussian.peak.double()).cpu())
    return owners, Curvature.joined(parts), torch.cat(masses)


def _merged(owners: Tensor, curvature: Curvature, log_masses: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the Gaussians that are kept, owner by owner, largest first, and the logarithms of their masses."""
    kept: list[int] = []
    masses: list[float] = []
    for owner in range(int(owners.max()) + 1):
        places = (owners == owner).nonzero()[:, 0]
        ordered = places[log_masses[places].nan_to_num(-math.inf).argsort(descending=True)].tolist()
        own: dict[int, float] = {}
        for place in ordered:
            mass = float(log_masses[place])
            if own and not mass > max(own.values()) - NEGLIGIBLE:
                continue
            same = next((other for other in own if _distance(curvature, place, other) < COINCIDE), None)
            if same is not None:
                own[same] = math.log1p(math.exp(mass - own[same])) + own[same]
            elif len(own) < MAX_PARTS:
                own[place] = mass
        kept += own
        masses += own.values()
    return torch.tensor(kept), torch.tensor(masses, dtype=torch.float64)


def _distance(curvature: Curvature, place: int, other: int) -> float:
    gaussian = curvature.gaussian
    return bhattacharyya(gaussian.at(torch.tensor([place])), gaussian.at(torch.tensor([other])))


def remeasured(evaluator: GradientEvaluator, modes: Modes, run: Run) -> Curvature:
    """Gaussians by the curvature of the parts themselves, from those of `modes`; these where a fit does not settle."""
    slots, everyone = PartSlots(evaluator, modes), torch.arange(len(modes.owners))
    noise = slots.noise(run.stream("components parts"), len(everyone), modes.curvature.gaussian.loc.dtype)

    def gradients(positions: Tensor, points: Tensor) -> Tensor:
        return slots.gradients(everyone[positions], points)

    fit = fitted(modes.curvature.gaussian, gradients, noise)
    settled = fit.agrees & ~fit.cut
    places = settled.nonzero()[:, 0]
    gaussian = modes.curvature.gaussian
    gaussian = gaussian.with_replaced(places, fit.gaussian.at(places)) if len(places) else gaussian
    return Curvature(gaussian, modes.curvature.cut & ~settled, settled, fit.num_gradients)
