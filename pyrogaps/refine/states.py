r"""A guide's own family where it draws discrete sites y: q(y) q(z | y), freed for every datapoint.

Given joint state k of y, z has the bound $A_k = \mathbb E_{q(z|y_k)} [\log p(x_n, y_k, z) - \log q(z \mid y_k)]$, and

$$\mathcal L[q] = \sum_k q_k (A_k - \log q_k) = \log \sum_k e^{A_k} - \mathrm{KL}(q \,\|\, \mathrm{softmax}(A)).$$

If q(z | x, y) depends on y, each A_k is highest by itself: z is refined against log p(x_n, y_k, z) for every k, then q
is softmax(A), and L[q*] = log-sum-exp of the best A, which no other member of the family exceeds.

If it does not depend on all of y, joint states fall in cells with one q(z) each. Given q, that of a cell maximises
$\sum_{k \in c} q(k \mid c)\, \mathbb E_{q(z)} \log p(x_n, y_k, z)$ plus its entropy; given the q(z), q is the best of
its family for A, see `tables`. The two steps alternate. Each raises the bound, to an optimum that may be local: they
are begun at the guide's own q(y), and at the states that are best alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrogaps.bounds import refuse_nan
from pyrogaps.capture import GradientEvaluator
from pyrogaps.density import GuideDensity, JointDensity
from pyrogaps.density.draws import BlockedGuide, Posterior
from pyrogaps.density.given_states import Cells, GivenStatesGuide, StatesDensity, columns_of
from pyrogaps.density.guide_states import GuideStates, element_tables
from pyrogaps.density.local import Draws
from pyrogaps.problem import Problem
from pyrogaps.refine.families import Start
from pyrogaps.refine.local import Refinable, keep_where
from pyrogaps.refine.optimise import NUM_TRACE, Progress
from pyrogaps.refine.states_guide import StartPosterior, StatesGuide, StatesSpace
from pyrogaps.refine.tables import Factors, elbo_of
from pyrogaps.run import Run
from pyrogaps.streams import Chunk

NUM_PEAKED, NUM_ROUNDS = 3, 8
NUM_DRAWS, NUM_BLOCKS = 64, 4  # of z, by which joint states are weighed
NEGLIGIBLE = 1e-3  # probability of a cell whose guides need not have converged
SAME = 1e-6  # probabilities

# Fits the guide's own family of a problem of z alone to a chunk, from further starts too.
Fit = Callable[[Problem, Chunk, Run, Sequence[Start]], tuple[Refinable, Progress]]


@dataclass(frozen=True)
class Latents:
    """Guides of z for all cells of the datapoints of a chunk, and whether each converged or kept its start `(B, C)`."""

    guides: list[Refinable]
    converged: Tensor
    kept: Tensor


@dataclass(frozen=True)
class Reached:
    """Where a start led to: guides of z, log q(y) `(B, K)`, the bound `(B,)`, and whether the rounds settled `(B,)`."""

    latents: Latents
    log_weights: Tensor
    bound: Tensor
    settled: Tensor


@dataclass(frozen=True)
class StatesFit:
    """The family fitted to the datapoints of a chunk.

    Attributes:
        problem: its `scored` density is that of y and z.
        density, read: the guide, and what depends on what in it.
        fit: fits guides of z; None where there is no z.
        chunk, run: as for `Refiner`.
        others: further starts of z.
        tolerance: what a round may still gain where the rounds have settled, in nats.
        graphs: records of densities of z, kept from chunk to chunk.
    """

    problem: Problem
    density: GuideDensity
    read: GuideStates
    fit: Fit | None
    chunk: Chunk
    run: Run
    others: Sequence[Start]
    tolerance: float
    graphs: dict[Any, Any]

    def refined(self) -> tuple[StatesGuide, Progress]:
        """The best of the family for every datapoint, and how its refinement went."""
        with torch.no_grad():
            own = element_tables(self.density, self.read.states, self.chunk.indices).double()
            before, reached = self._without_latents(own) if self.fit is None else self._with_latents(own)
            probability = reached.log_weights.exp()
            of_cell = torch.zeros_like(reached.latents.kept, dtype=probability.dtype)
            of_cell.index_add_(1, self._cell, probability)
            negligible = of_cell < NEGLIGIBLE
            same = (probability - own.sum(-1).exp()).abs().amax(1) < SAME
            progress = Progress(
                reached.settled & (reached.latents.converged | negligible).all(1),
                same & (reached.latents.kept | negligible).all(1),
                _between(before, reached.bound),
            )
            space = StatesSpace(self.density.joint, self.read.states, self._cell)
            return StatesGuide(space, self.chunk.start, reached.log_weights, reached.latents.guides), progress

    def _without_latents(self, own: Tensor) -> tuple[Tensor, Reached]:
        """The guide's bounds and the best, both exact, where there is nothing but y: A is log p(x, y)."""
        scored, states = self.density.joint, self.read.states
        flat = scored.zeros(len(states)).index_copy(1, columns_of(scored, drawn=True), states.to(scored.zeros(1)))
        values = scored(flat[:, None].expand(-1, len(self.chunk), -1), self.chunk.indices)
        bounds = refuse_nan(values.double(), self.chunk.indices).T
        log_weights, bound = self._factors.best(bounds, own)
        every = torch.ones(len(self.chunk), int(self._cell.max()) + 1, dtype=torch.bool)
        return elbo_of(bounds, own.sum(-1)), Reached(Latents([], every, every), log_weights, bound, every[:, 0])

    def _with_latents(self, own: Tensor) -> tuple[Tensor, Reached]:
        """The guide's bounds, and what refinement reaches."""
        before = elbo_of(self._bounds(self._own_latents(), self._cells), own.sum(-1))
        return before, self._alternating(own) if self._cells.shape[1] > 1 else self._by_state(own)

    def _by_state(self, own: Tensor) -> Reached:
        """Every joint state has guides of z of its own: each is refined by itself, and q(y) is the best for them."""
        latents, bounds = self._alone()
        log_weights, bound = self._factors.best(bounds, own)
        return Reached(latents, log_weights, bound, torch.ones_like(bound, dtype=torch.bool))

    def _alone(self) -> tuple[Latents, Tensor]:
        """Guides of z for every joint state by itself, and their bounds A `(B, K)`.

        The modes of p(x, z) that further starts lie at are mostly those of single states. Only those starts are taken
        that are better for some state than what was reached without them.
        """
        singles = torch.arange(len(self.read.states))[:, None]
        weights = torch.ones(len(self.chunk), *singles.shape)
        latents = self._latents(singles, weights, "alone", ())
        bounds = self._bounds(latents.guides, singles)
        better = [start for start in self.others if bool((self._at_start(start) > bounds + self.tolerance).any())]
        if not better:
            return latents, bounds
        latents = self._latents(singles, weights, "alone, other starts", better)
        return latents, self._bounds(latents.guides, singles)

    def _at_start(self, start: Start) -> Tensor:
        """A `(B, K)` of the Gaussians `start` themselves, whatever the state."""
        singles = torch.arange(len(self.read.states))[:, None]
        parts = self._parts(singles, torch.ones(len(self.chunk), *singles.shape))
        repeats = 1 if self._whole else len(singles)
        guides = [StartPosterior(part.joint, start, self.chunk.start, repeats) for part, _ in parts]
        return self._bounds(guides, singles).nan_to_num(nan=-torch.inf)

    def _alternating(self, own: Tensor) -> Reached:
        """Joint states share guides of z: the best of what several starts lead to."""
        order = self._alone()[1][:, self._cells].argsort(-1, descending=True)
        starts = [self._within_cells(own.sum(-1))]
        for rank in range(min(NUM_PEAKED, order.shape[-1])):
            starts.append(torch.zeros_like(starts[0]).scatter(-1, order[..., rank, None], 1.0))
        reached = [self._alternated(weights, own, f"start {number}") for number, weights in enumerate(starts)]
        best = reached[0]
        for other in reached[1:]:
            best = self._better(best, other)
        return best

    def _alternated(self, weights: Tensor, own: Tensor, label: str) -> Reached:
        """Guides of z for the shares `(B, C, J)` of joint states in cells, then q(y) for these, and again."""
        best: Reached | None = None
        for number in range(NUM_ROUNDS):
            latents = self._latents(self._cells, weights, f"{label} {number}", ())
            log_weights, bound = self._factors.best(self._bounds(latents.guides, self._cells), own)
            gained = torch.full_like(bound, torch.inf) if best is None else bound - best.bound
            reached = Reached(latents, log_weights, bound, ~(gained > self.tolerance / 4))
            best = reached if best is None else replace(self._better(best, reached), settled=reached.settled)
            if bool(reached.settled.all()):
                break
            weights = self._within_cells(log_weights)
        assert best is not None
        return best

    def _better(self, best: Reached, other: Reached) -> Reached:
        """Of each datapoint what has the higher bound; the guides of `best` are set to it."""
        better = other.bound > best.bound
        for mine, its in zip(best.latents.guides, other.latents.guides, strict=True):
            rows = better if self._whole else better.repeat_interleave(best.latents.kept.shape[1])
            keep_where(rows, [parameter.detach() for parameter in its.parameters], mine)
        pick = better[:, None]
        latents = Latents(
            best.latents.guides,
            torch.where(pick, other.latents.converged, best.latents.converged),
            torch.where(pick, other.latents.kept, best.latents.kept),
        )
        return Reached(
            latents,
            torch.where(pick, other.log_weights, best.log_weights),
            torch.where(better, other.bound, best.bound),
            torch.where(better, other.settled, best.settled),
        )

    @property
    def _cells(self) -> Tensor:
        """Positions `(C, J)` of the joint states."""
        return self.read.cells[0]

    @property
    def _cell(self) -> Tensor:
        """The cell of each joint state, `(K,)`."""
        return self.read.cells[1]

    @property
    def _factors(self) -> Factors:
        return Factors(self.read.states, self.read.parents)

    @property
    def _whole(self) -> bool:
        """Whether there is no plate: then rows are runs of their own."""
        return self.density.joint.plate is None

    def _within_cells(self, log_weights: Tensor) -> Tensor:
        """The shares `(B, C, J)` of joint states in the probabilities of their cells."""
        own = log_weights[:, self._cells]
        # A cell of probability 0 has no shares; any will do.
        return torch.where(own.amax(-1, keepdim=True) > -torch.inf, own, torch.zeros_like(own)).softmax(-1)

    def _parts(self, cells: Tensor, weights: Tensor) -> list[tuple[Problem, Chunk]]:
        """Problems of z alone and rows of them that together are the chunk in `cells`: one, or without a plate, where a
        run holds one row, one for each cell.
        """
        if not self._whole:
            rows = Chunk(self.chunk.start * len(cells), self.chunk.stop * len(cells))
            return [(self._problem(cells, weights), rows)]
        each = torch.arange(len(cells)).split(1)
        return [(self._problem(cells[cell], weights[:, cell]), self.chunk) for cell in each]

    def _problem(self, cells: Tensor, weights: Tensor) -> Problem:
        """The problem of z alone whose datapoints are the chunk's rows in `cells` `(C, J)`."""
        scored = self.density.joint
        joint = StatesDensity.of(scored, Cells(self.read.states[cells]), weights.to(scored.dtype), self.chunk.start)
        guide = GivenStatesGuide(self.density, joint, factorised=self.read.factorised)
        evaluator = GradientEvaluator(joint, self.problem.mode, graphs=self.graphs)
        evaluators: dict[tuple[JointDensity, bool], GradientEvaluator] = {(joint, False): evaluator}
        model, mode = self.problem.model, self.problem.mode
        return Problem(model, self.density.guide, joint, guide, mode, _evaluators=evaluators)

    def _latents(self, cells: Tensor, weights: Tensor, label: str, others: Sequence[Start]) -> Latents:
        """Guides of z in `cells`, refined for the weights `(B, C, J)` of the joint states there."""
        number, shape = len(cells), (len(self.chunk), len(cells))
        run, parts = self.run.derived("states", label), self._parts(cells, weights)
        repeats = number // len(parts)
        spread = [
            Start(start.loc.repeat_interleave(repeats, 0), start.scale.repeat_interleave(repeats, 0), start.fitted)
            for start in others
        ]
        assert self.fit is not None
        fits = [self.fit(part, rows, run.derived(place), spread) for place, (part, rows) in enumerate(parts)]
        converged = torch.cat([progress.converged for _, progress in fits]).reshape(shape)
        kept = torch.cat([progress.kept_start for _, progress in fits]).reshape(shape)
        return Latents([guide for guide, _ in fits], converged, kept)

    def _own_latents(self) -> list[Posterior]:
        """q(z | x, y) as the guide has it."""
        weights = torch.ones(len(self.chunk), *self._cells.shape)
        return [part.guided() for part, _ in self._parts(self._cells, weights)]

    def _bounds(self, guides: Sequence[Posterior], cells: Tensor) -> Tensor:
        """A `(B, K)`, in nats, for guides of z in `cells`; on the same random numbers whatever is compared."""
        number = len(self.read.states)
        singles = torch.arange(number)[:, None]
        evaluator = self._problem(singles, torch.ones(len(self.chunk), number, 1)).evaluator
        rows = Chunk(self.chunk.start * number, self.chunk.stop * number).indices
        cell = torch.empty(number, dtype=torch.long)
        cell[cells] = torch.arange(len(cells))[:, None].expand_as(cells)
        place = (torch.arange(len(self.chunk))[:, None] * len(cells) + cell).flatten()
        total = torch.zeros(len(rows), dtype=torch.float64)
        for first in range(NUM_BLOCKS):
            z, log_q = (part[:, place] for part in self._drawn(guides, len(cells), first))
            (values,) = evaluator.bind(rows, NUM_DRAWS).values(z.contiguous())
            weights = refuse_nan(values.double() - log_q.double(), rows // number)
            total = total.to(weights) + weights.mean(0) / NUM_BLOCKS
        return total.reshape(len(self.chunk), number)

    def _drawn(self, guides: Sequence[Posterior], number: int, first: int) -> Draws:
        """Draws of z in all of so many cells, `(S, B * number, dim)`, and their log q."""
        rows = Chunk(self.chunk.start * number, self.chunk.stop * number)
        pairs = []
        for place, guide in enumerate(guides):
            stream = self.run.stream(f"states {place}")
            pairs.append(BlockedGuide(guide, self.chunk if self._whole else rows).sample(NUM_DRAWS, stream, first))
        return torch.cat([z for z, _ in pairs], 1), torch.cat([log_q for _, log_q in pairs], 1)


def _between(before: Tensor, after: Tensor) -> Tensor:
    """Where the mean bound began and ended, as `NUM_TRACE` points."""
    first, last = (bound.nan_to_num(neginf=0.0).mean().cpu() for bound in (before, after))
    return first + (last - first) * torch.linspace(0, 1, NUM_TRACE, dtype=torch.float64)
