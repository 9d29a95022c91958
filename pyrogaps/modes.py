r"""Further modes of a posterior, found by chains from the prior, with a Gaussian at each.

The anchor, a fit that starts at the guide, finds one mode, and its draws do not show whether there are others. Here
chains are annealed from the prior, independently of the guide. Those that end far from the anchor are polished by
passes of curvature. Ends that are distinct from the anchor, and from each other, are further modes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from pyrogaps.annealing.loop import WARM_UP, AdaptedStepSizes, pilot, schedule
from pyrogaps.annealing.rotations import Rotation
from pyrogaps.capture.slots import POINTS, Slots, of_datapoints
from pyrogaps.errors import InputError
from pyrogaps.gaussians import Curvature, Gaussian, anchor_of, bhattacharyya, prior_gaussian
from pyrogaps.problem import Problem
from pyrogaps.run import Run
from pyrogaps.state_modes import NEGLIGIBLE, has_few_states, polished, state_modes
from pyrogaps.streams import BLOCK, Chunk, derive_seed

Result = TypeVar("Result")
# Chains per datapoint, in whole slots. A mode with a tenth of the mass is missed with probability 3%.
NUM_CHAINS, NUM_TEMPERATURES, ACCEPTANCE = 2 * POINTS, 32, 0.8
# An end is far from the anchor where its whitened distance exceeds that of typical draws, sqrt(dim), by this.
FAR = 3.0
MAX_STARTS = 8
# Nats, times 1 + sqrt(dim), by which log p(x, z) at an end may exceed the anchor's Gaussian.
EXCESS = 1.25
# First scales: this share of the prior's where the anchor's are unknown; of the anchor's for modes inside it. Passes
# widen what is too narrow, and leave a mode that they are wider than.
NARROW, INSIDE = 0.1, 0.03
# Of what the anchor's Gaussian makes of p(x, z) at its mean, and at this share of the ends, the lower counts: some of
# these may lie in a narrower mode.
LOWER = 0.25
# Gaussians above this Bhattacharyya distance are distinct: they overlap by less than exp(-1).
DISTINCT = 1.0
# A mode was missed where the gain exceeds this many nats and this many standard errors.
LEAST, CERTAIN = 0.03, 3.0


@dataclass(frozen=True)
class Modes:
    """Gaussians at the modes of the posteriors of B datapoints, M in all.

    Attributes:
        owners: `(M,)`, the datapoint of each, increasing. The first Gaussian of every datapoint is its anchor.
        curvature: the Gaussians.
        log_masses: `(M,)`, the logarithm of the integral of p(x, z) about each, in nats, by Laplace's method.
        num_evaluations: `(B,)`, what finding them took.
        complete: `(B,)`, whether every chain that counts ended near one of them: else there may be more.
    """

    owners: Tensor
    curvature: Curvature
    log_masses: Tensor
    num_evaluations: Tensor
    complete: Tensor

    @property
    def several(self) -> Tensor:
        """The datapoints with more than one mode."""
        return (torch.bincount(self.owners, minlength=len(self.num_evaluations)) > 1).nonzero()[:, 0]

    def of(self, positions: Tensor) -> "Modes":
        """The modes of the datapoints at `positions` (increasing), renumbered from 0."""
        places = torch.full((len(self.num_evaluations),), -1)
        places[positions] = torch.arange(len(positions))
        kept = (places[self.owners] >= 0).nonzero()[:, 0]
        curvature = self.curvature.at(kept)
        evaluations, complete = self.num_evaluations[positions], self.complete[positions]
        return Modes(places[self.owners[kept]], curvature, self.log_masses[kept], evaluations, complete)

    def ranked(self, rank: int) -> Gaussian:
        """The Gaussian number `rank` of every datapoint; its anchor where there are fewer."""
        places = [(self.owners == owner).nonzero()[:, 0].tolist() for owner in range(len(self.num_evaluations))]
        return self.curvature.gaussian.at(torch.tensor([own[rank] if rank < len(own) else own[0] for own in places]))

    @property
    def most(self) -> int:
        """The largest number of modes of a datapoint."""
        return int(torch.bincount(self.owners).max())


@dataclass(frozen=True)
class Contested:
    """Datapoints whose posteriors have several modes: a problem of these alone, their modes, and their indices."""

    problem: Problem
    modes: Modes
    indices: Tensor


def examine(
    problem: Problem, number: int, run: Run, measure: Callable[[Contested, Run], Result], *, alone: bool = False
) -> tuple[Tensor, list[tuple[Tensor, Result]]]:
    """Look for modes of a random sample of `number` datapoints of a problem, all if there are no more.

    Returns the indices of the sample `(n,)` and, for datapoints with more than one mode, in parts, their indices and
    the result of `measure`, with a run of its own. Nothing is examined if the prior cannot be sampled.
    `alone`: every process does all of it, see `Run.map_alone`.
    """
    nothing: tuple[Tensor, list[tuple[Tensor, Result]]] = torch.empty(0, dtype=torch.long), []
    if not problem.dim:
        return nothing
    indices, before = sample(problem.num_datapoints, number, run.seed), run
    sampled, run = problem.at(indices), replace(run.derived("examined"), batch_size=BLOCK)

    def examined(chunk: Chunk) -> tuple[list[tuple[Tensor, Result]], Tensor] | None:
        try:
            wide = prior_gaussian(sampled, chunk, run.stream("explore prior"))
        except InputError:
            return None
        # Where all are examined, their anchors may be known already.
        anchor = anchor_of(sampled, chunk, before if sampled is problem else run)
        known = modes_by_states(sampled, chunk, run) if has_few_states(sampled.joint) else None
        modes = explore(sampled, anchor, chunk, run, wide, known)
        done = indices[chunk.indices]
        if not len(several := modes.several):
            return [], done
        places = chunk.indices[several]
        contested = Contested(sampled.at(places), modes.of(several), indices[places])
        try:
            return [(contested.indices, measure(contested, run.derived(chunk.start)))], done
        except InputError:  # a density that fails far out must not cost the ledger: these count as not examined
            return [], done[~torch.isin(done, contested.indices)]

    parts = [part for part in (run.map_alone if alone else run.map)(examined, sampled.joint) if part is not None]
    if not parts:
        return nothing
    return torch.cat([done for _, done in parts]), [result for results, _ in parts for result in results]


def sample(num_datapoints: int, number: int, seed: int) -> Tensor:
    """A random sample of `number` datapoints, increasing; all if there are no more."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "sample"))
    return torch.randperm(num_datapoints, generator=generator)[:number].sort().values


def modes_by_states(problem: Problem, block: Chunk, run: Run) -> Modes:
    """A mode for every state of the discrete latents of the datapoints of a block, see `state_modes`."""
    owners, curvature, log_masses, evaluations = state_modes(problem, block, run)
    return Modes(owners, curvature, log_masses, evaluations, torch.ones(len(block), dtype=torch.bool))


def explore(
    problem: Problem, anchor: Curvature, block: Chunk, run: Run, wide: Gaussian, known: Modes | None = None
) -> Modes:
    """The modes of the datapoints of a block, the `anchor` of each first; chains start at the Gaussians `wide`.

    Modes that are `known` already take the place of the anchor, and all of them are kept.
    """
    slots = Slots(problem.evaluator, block)
    ends = _chain_ends(slots, wide, run)
    everyone = torch.arange(len(block))
    own = everyone if known is None else known.owners
    anchor = anchor if known is None else known.curvature
    # An anchor that was cut says nothing about scales: those of the prior stand in.
    scales = anchor.gaussian.scaled_as(wide.at(own).widened(NARROW), anchor.cut)
    values, peaks = slots.values(everyone, ends), slots.values(own, anchor.gaussian.loc[None])
    # Where p(x, z) exceeds what the Gaussians make of it, a narrower mode may lie within their reach.
    fall = 0.5 * anchor.gaussian.whiten(ends[:, own]).double().square().sum(-1)
    expected = _by_owner(peaks.double() - fall, own, lambda column: column.logsumexp(1))
    cut = _by_owner(anchor.cut[None], own, lambda column: column.all(1))
    levels = values.double() - expected
    level = levels.nan_to_num(-math.inf).quantile(LOWER, dim=0, interpolation="lower").clamp(max=0.0)
    unexplained = cut | (levels - level > EXCESS * (1 + slots.dim**0.5))
    far = _by_owner(_beyond(scales, ends[:, own]), own, lambda column: column.all(1))
    first = torch.searchsorted(own, everyone)
    owners, points, inside = _starts(scales.at(first), far, far | unexplained, ends, values)
    evaluations = torch.full((len(block),), NUM_CHAINS * (NUM_TEMPERATURES + WARM_UP + 2))
    found = [anchor]
    if len(owners):
        narrower = torch.where(inside & ~anchor.cut[first][owners], INSIDE, 1.0).to(points)
        start = replace(scales.at(first[owners]), loc=points).widened(narrower)
        fits = polished(slots, start, owners, run)
        evaluations.index_add_(0, owners, fits.num_gradients)
        # What has not settled is on its way to a mode. Where the anchor has not either, nothing better is known.
        settled = (fits.agrees | ~anchor.agrees[first][owners]).nonzero()[:, 0].cpu()
        owners = owners[settled]
        found.append(fits.at(settled))
    owners, curvature = torch.cat([own, owners]), Curvature.joined(found)
    heights = slots.values(owners, curvature.gaussian.loc[None])[0].double()
    log_masses = (heights - curvature.gaussian.peak.double()).cpu()
    if known is not None:
        log_masses[: len(own)] = known.log_masses
        evaluations = evaluations + known.num_evaluations
    kept = _distinct(owners, curvature.gaussian, log_masses, len(own))
    owners, curvature = owners[kept], curvature.at(kept)
    complete = _complete(owners, curvature.gaussian, ends, values)
    return Modes(owners, curvature, log_masses[kept], evaluations, complete)


def _by_owner(columns: Tensor, owners: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """`reduce` of the columns `(S, M)` of every owner: `(S, B)`."""
    if len(owners) == int(owners[-1]) + 1:  # one for each
        return columns
    return torch.stack([reduce(columns[:, owners == owner]) for owner in range(int(owners[-1]) + 1)], 1)


def _beyond(gaussian: Gaussian, points: Tensor) -> Tensor:
    """Whether points `(S, M, dim)` are farther from M Gaussians than typical draws, `(S, M)`."""
    whitened, dim = gaussian.whiten(points).double(), points.shape[-1]
    typical = dim**0.5 if gaussian.active is None else gaussian.active.sum(-1).double().sqrt()
    beyond: Tensor = whitened.norm(dim=-1) > typical + FAR
    return beyond


def _chain_ends(slots: Slots, wide: Gaussian, run: Run) -> Tensor:
    """Where chains from the Gaussians `wide` end, `(NUM_CHAINS, B, dim)`. Their steps adapt all the way: no weights."""
    betas, each, ends = schedule("linear", NUM_TEMPERATURES), NUM_CHAINS // POINTS, []
    owners = torch.arange(len(slots.block)).repeat_interleave(each)
    for number, (batch, kept) in enumerate(slots.batches(owners)):
        noise = slots.noise(run.stream(f"explore {number}"), len(batch), wide.loc.dtype)
        move = Rotation(wide.at(batch), slots.at(batch), 1)
        state = move.start_at(noise.normal(POINTS, slots.dim))
        steps = AdaptedStepSizes(move.adaptation, ACCEPTANCE, state.position)
        for reached in pilot(move, state, betas, steps, noise):
            state = reached.state
        ends.append(move.points(state)[:, :kept])
    return of_datapoints(torch.cat(ends, 1), each)


def _starts(
    scales: Gaussian, far: Tensor, eligible: Tensor, ends: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Ends that are `eligible` `(NUM_CHAINS, B)` as starts, and far from each other, in `scales`.

    There are at most `MAX_STARTS` of a datapoint, as owners `(K,)`, points `(K, dim)`, and whether they are within
    reach of the anchor, not `far`, `(K,)`. The highest is first; next comes the one that is farthest from those chosen.
    """
    owners, points, inside = [], [], []
    for owner in range(ends.shape[1]):
        open_ = (eligible[:, owner] & torch.isfinite(values[:, owner])).nonzero()[:, 0]
        if not len(open_):
            continue
        whitened = scales.at(torch.tensor([owner])).whiten(ends[:, owner : owner + 1])[:, 0].double()
        chosen = [int(open_[values[open_, owner].argmax()])]
        while len(chosen) < MAX_STARTS:
            apart = torch.cdist(whitened[open_], whitened[chosen]).min(1).values
            if not float(apart.max()) > FAR:
                break
            chosen.append(int(open_[apart.argmax()]))
        owners += [owner] * len(chosen)
        points += [ends[end, owner] for end in chosen]
        inside += [not bool(far[end, owner]) for end in chosen]
    starts = torch.stack(points) if points else ends[0, :0]
    return torch.tensor(owners, dtype=torch.long), starts, torch.tensor(inside, dtype=torch.bool)


def _complete(owners: Tensor, gaussian: Gaussian, ends: Tensor, values: Tensor) -> Tensor:
    """Whether all ends of each datapoint, but those whose log p(x, z) is negligible, lie near one of its Gaussians."""
    dim = ends.shape[-1]
    distances = gaussian.whiten(ends[:, owners]).double().norm(dim=-1)  # (S, M)
    nearest = torch.stack([distances[:, owners == owner].amin(1) for owner in range(ends.shape[1])], 1)
    counts = values > values.nan_to_num(-math.inf).amax(0) - (NEGLIGIBLE + dim)
    complete: Tensor = ((nearest <= dim**0.5 + FAR) | ~counts).all(0)
    return complete.cpu()


def _distinct(owners: Tensor, gaussian: Gaussian, log_masses: Tensor, known: int) -> Tensor:
    """The `known` first Gaussians and, from the largest mass down, those that are distinct from all before: places
    `(M,)`, owner by owner.
    """

    def apart(place: int, other: int) -> float:
        return bhattacharyya(gaussian.at(torch.tensor([place])), gaussian.at(torch.tensor([other])))

    kept: list[int] = []
    for owner in range(int(owners.max()) + 1):
        places = (owners == owner).nonzero()[:, 0].tolist()
        own = [place for place in places if place < known]
        finite = [place for place in places if place >= known and math.isfinite(log_masses[place])]
        least = max(map(float, log_masses[[*own, *finite]].nan_to_num(-math.inf))) - NEGLIGIBLE
        for place in sorted(finite, key=lambda place: -float(log_masses[place])):
            if log_masses[place] >= least and all(apart(place, other) > DISTINCT for other in own):
                own.append(place)
        kept += own
    return torch.tensor(kept)


@dataclass(frozen=True)
class Gain:
    """By how much a bound rises at contested datapoints when all modes are taken into account, in nats.

    Attributes:
        value, error: `(m,)`, of the contested datapoints, with standard errors; others examined gain 0. Or
            `(m, F)`, of several bounds, see `by_column`.
        number: of datapoints examined.
    """

    value: Tensor
    error: Tensor
    number: int

    @classmethod
    def none(cls, number: int = 0) -> "Gain":
        """Of `number` datapoints without several modes."""
        return cls(torch.empty(0), torch.empty(0), number)

    @classmethod
    def between(cls, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], number: int) -> "Gain":
        """From two estimates with their standard errors; what is infinite in both gains nothing."""
        value = torch.nan_to_num(new[0].double() - old[0].double(), nan=0.0)
        return cls(value, new[1].double().hypot(old[1].double()), number)

    @property
    def by_column(self) -> "list[Gain]":
        """That of each of several bounds."""
        return [Gain(value, error, self.number) for value, error in zip(self.value.T, self.error.T, strict=True)]

    @property
    def mean(self) -> float:
        """Over all examined: of what is found or, where only all together are, of all."""
        gained = self.value[self.found] if self.found.any() else self.value
        return float(gained.sum()) / max(self.number, 1)

    @property
    def found(self) -> Tensor:
        """Where it is larger than `LEAST` and `CERTAIN` standard errors, `(m,)`."""
        return (self.value > LEAST) & (self.value > CERTAIN * self.error)

    @property
    def count(self) -> int:
        """Number of datapoints that gain; at least 1 if their mean over the examined does."""
        if self.found.any():
            return int(self.found.sum())
        return int(self.mean > CERTAIN * float(self.error.norm()) / max(self.number, 1) and self.mean > LEAST / 2)

    @property
    def accepted(self) -> Tensor:
        """Where the value from all modes replaces that from one, `(m,)`: unless it is clearly lower.

        Always taking the higher of two estimates would be biased.
        """
        return ~(self.value < -CERTAIN * self.error)
