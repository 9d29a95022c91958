r"""Gaussians at the modes of a posterior by the states of its discrete latents, which the density sums out.

$p(x, z) = \sum_y p(x, y, z)$ has several modes by nature. With few joint states y, a Gaussian is fitted by curvature to
log p(x, y, z) for each, at every datapoint; their Laplace masses approximate p(x, y). States `NEGLIGIBLE` nats below
the largest, of less than 1e-4 of its mass each, get no Gaussian, and Gaussians that nearly coincide become one. This
changes how well the mixture of Gaussians fits, not what is integrated, see `evidence.parts`.
"""

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pyrogaps.capture import GradientEvaluator
from pyrogaps.capture.slots import Slots
from pyrogaps.density import JointDensity
from pyrogaps.density.at_states import DensityAtStates, all_states, num_states
from pyrogaps.gaussians import Curvature, Gaussian, bhattacharyya, fitted, prior_gaussian
from pyrogaps.problem import Problem
from pyrogaps.run import Run
from pyrogaps.streams import BLOCK, Chunk

# Up to this many joint states of a datapoint, each is fitted.
MAX_STATES = 32
# Gaussians nearer than this Bhattacharyya distance become one, and a datapoint keeps the largest few.
COINCIDE, MAX_KEPT = 0.02, 8
# Nats below the largest of a datapoint at which a mass is ignored; the margin allows for Laplace's error.
NEGLIGIBLE = 10.0
NUM_ROUNDS = 3


class StateModes(NamedTuple):
    """Gaussians of B datapoints: the datapoint of each `(M,)`, increasing, the largest first; the Gaussians; the
    logarithms of their masses `(M,)`, in nats; and the evaluations that each datapoint took, `(B,)`.
    """

    owners: Tensor
    curvature: Curvature
    log_masses: Tensor
    num_evaluations: Tensor


def has_few_states(joint: JointDensity) -> bool:
    """Whether a density sums over discrete latents of at most `MAX_STATES` joint states."""
    return bool(joint.enumerated) and num_states(joint.enumerated) <= MAX_STATES


def state_modes(problem: Problem, block: Chunk, run: Run) -> StateModes:
    """A Gaussian for every state that counts, at each datapoint of a block."""
    table = all_states(problem.joint.enumerated)
    number = len(next(iter(table.values())))
    owners = torch.arange(len(block)).repeat_interleave(number)
    states = {name: numbers.repeat(len(block), *[1] * (numbers.dim() - 1)) for name, numbers in table.items()}
    density = DensityAtStates(problem.joint, block.indices[owners], states)
    recorder = run.remembered(
        "states", problem.joint.model, lambda: GradientEvaluator(density, problem.mode, quiet=True)
    )
    evaluator = recorder.over(density)
    start = prior_gaussian(problem, block, run.stream("states prior")).at(owners)
    fits, masses = [], []
    for pairs in torch.arange(len(owners)).split(len(block)):
        slots, everyone = Slots(evaluator, Chunk(int(pairs[0]), int(pairs[-1]) + 1)), torch.arange(len(pairs))
        fit = polished(slots, start.at(pairs), everyone, run.derived("states", block.start, int(pairs[0])))
        fits.append(fit)
        heights = slots.values(everyone, fit.gaussian.loc[None])[0].double()
        masses.append((heights - fit.gaussian.peak.double()).cpu())
    curvature = Curvature.joined(fits)
    evaluations = torch.zeros(len(block), dtype=torch.long).index_add(0, owners, curvature.num_gradients.cpu())
    kept, log_masses = _merged(owners, curvature.gaussian, torch.cat(masses))
    return StateModes(owners[kept], curvature.at(kept), log_masses, evaluations)


def polished(slots: Slots, start: Gaussian, owners: Tensor, run: Run) -> Curvature:
    """Gaussians by curvature from `start`, one for each of `owners` `(K,)`, by passes that move to the mode nearby."""
    parts = []
    for part, positions in enumerate(torch.arange(len(owners)).split(BLOCK)):
        own, fit, number = owners[positions], start.at(positions), torch.zeros(len(positions), dtype=torch.long)
        for attempt in range(NUM_ROUNDS):
            noise = slots.noise(run.stream(f"explore probes {attempt} {part}"), len(own), start.loc.dtype)
            settled = fitted(fit, partial(_gradients, slots, own), noise)
            fit, number = settled.gaussian, number + settled.num_gradients
            if settled.agrees.all():
                break
        parts.append(replace(settled, num_gradients=number))
    return Curvature.joined(parts)


def _gradients(slots: Slots, owners: Tensor, places: Tensor, points: Tensor) -> Tensor:
    return slots.gradients(owners[places], points)


def _merged(owners: Tensor, gaussian: Gaussian, log_masses: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the Gaussians that are kept, owner by owner, largest first, and the logarithms of their masses."""

    def near(place: int, other: int) -> bool:
        pair = gaussian.at(torch.tensor([place])), gaussian.at(torch.tensor([other]))
        return bhattacharyya(*pair) < COINCIDE

    kept: list[int] = []
    masses: list[float] = []
    for owner in range(int(owners.max()) + 1):
        places = (owners == owner).nonzero()[:, 0]
        own: dict[int, float] = {}
        for place in places[log_masses[places].nan_to_num(-math.inf).argsort(descending=True)].tolist():
            mass = float(log_masses[place])
            if own and not mass > max(own.values()) - NEGLIGIBLE:
                continue
            same = next((other for other in own if near(place, other)), None)
            if same is not None:
                own[same] += math.log1p(math.exp(mass - own[same]))
            elif len(own) < MAX_KEPT:
                own[place] = mass
        kept += own
        masses += own.values()
    return torch.tensor(kept), torch.tensor(masses, dtype=torch.float64)
