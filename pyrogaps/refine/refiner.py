"""`Refiner`: a family, fitted to every datapoint of a chunk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch

from pyrogaps.capture import GradientEvaluator
from pyrogaps.density.data import part_of
from pyrogaps.density.simulate import ToData
from pyrogaps.errors import InputError
from pyrogaps.family import LocalFamily
from pyrogaps.gaussians import MAX_DIM, Curvature, anchor_of
from pyrogaps.guard import warn
from pyrogaps.problem import Problem, Simulated
from pyrogaps.refine.families import Family, Start
from pyrogaps.refine.family_guide import FamilyGuide
from pyrogaps.refine.finetune import FinetunedGuide, announcement
from pyrogaps.refine.gaussian_form import gaussian_form
from pyrogaps.refine.local import Refinable, points_of
from pyrogaps.refine.natural_refinement import NaturalRefinement
from pyrogaps.refine.objective import Evaluator
from pyrogaps.refine.optimise import NUM_TRACE, Optimisation, Progress
from pyrogaps.refine.own import OwnFamily, StatesFamily, start_of
from pyrogaps.refine.restarts import prior_start
from pyrogaps.refine.settings import Refinement
from pyrogaps.refine.states import StatesFit
from pyrogaps.refine.structured import StructuredGuide
from pyrogaps.run import Run
from pyrogaps.streams import Chunk

# Gives the curvature Gaussians of a chunk, which are fitted when they are used.
Anchor = Callable[[], Curvature]


@dataclass(frozen=True)
class Refiner:
    r"""Fits a family to datapoints one by one: $q^*_n = \arg\max_{q \in Q} \mathcal L[q](x_n)$.

    Attributes:
        family: the guide's own family, which starts at the guide's output, or a further one.
        settings: of the optimisation.
    """

    family: OwnFamily | Family
    settings: Refinement

    def fit(
        self,
        problem: Problem,
        chunk: Chunk,
        run: Run,
        name: str = "own",
        start: Start | None = None,
        others: Sequence[Start] = (),
    ) -> tuple[Refinable, Progress]:
        """As `__call__`, for a chunk of a problem; the curvature of log p(x, z) is known there, see `anchor_of`.

        Where every latent is discrete and summed out, the guide is the posterior: there is nothing to refine.
        """
        if isinstance(self.family, StatesFamily):
            return self._fit_states(self.family, problem, chunk, run, others)
        if isinstance(self.family, OwnFamily) and self.family.states is not None:  # in the space of these and z
            return self(problem.scorer, chunk, run, name, start, others)
        if not problem.dim:
            value = problem.evaluator(problem.joint.zeros(len(chunk))[None], chunk.indices).mean().cpu()
            everyone = torch.ones(len(chunk), dtype=torch.bool)
            return cast(Refinable, problem.guided()), Progress(everyone, everyone, value.expand(NUM_TRACE))
        return self(problem.evaluator, chunk, run, name, start, others, partial(anchor_of, problem, chunk, run))

    def _fit_states(
        self, family: StatesFamily, problem: Problem, chunk: Chunk, run: Run, others: Sequence[Start]
    ) -> tuple[Refinable, Progress]:
        """As `fit`, of a guide that draws discrete sites, in the space of these and z."""

        def fit(given: Problem, rows: Chunk, run: Run, others: Sequence[Start]) -> tuple[Refinable, Progress]:
            assert family.inner is not None
            inner = replace(family.inner, density=given.guide_density())
            return replace(self, family=inner).fit(given, rows, run.quiet(), others=others)

        assert family.read is not None
        tolerance, graphs = self.settings.tolerance, family.graphs
        of_latents = None if family.inner is None else fit
        states = StatesFit(problem, family.density, family.read, of_latents, chunk, run, others, tolerance, graphs)
        return states.refined()

    def __call__(
        self,
        evaluator: Evaluator,
        chunk: Chunk,
        run: Run,
        name: str = "own",
        start: Start | None = None,
        others: Sequence[Start] = (),
        anchor: Anchor | None = None,
    ) -> tuple[Refinable, Progress]:
        """q* of the datapoints of a chunk, and how its optimisation went. It is begun at `others` too.

        Guides that are Gaussian in unconstrained space start at the Gaussians with the curvature of log p(x, z), if
        `anchor` gives these, and are refined by natural gradients, see `NaturalRefinement`.

        A further family starts at the Gaussian `start`. Where other guides of a family have `starts_from`, another
        family, that one is refined first: a further family starts at the Gaussian which this amounts to; the guide's
        own starts there or at the guide's output, whichever bound is higher.
        """
        fit = _Fit(self, evaluator, chunk, run, name)
        if isinstance(self.family, OwnFamily):
            refinable = self.family.start(evaluator.joint, chunk, run)
            if isinstance(refinable, FinetunedGuide) and chunk.start == 0:
                note = announcement(refinable, evaluator.joint.num_datapoints, self.settings)
                if note is not None:
                    warn(note)
        else:
            # Where guides start at random, those of two families, or two starts, must not start alike.
            refinable = FamilyGuide(self.family, evaluator.joint, chunk, run.derived(name))
        restart, natural = True, fit.natural(refinable, anchor)
        if natural is None and (before := _starts_from(refinable)):
            # Its further starts have been had there.
            restart = False
            if isinstance(self.family, OwnFamily):
                first = fit.refined_first(before, start, others, anchor)
                there = self.family.start_at(first, evaluator.joint, chunk, run)
                assert there is not None  # what starts from another family can start at a Gaussian
                fit.optimisation(refinable).take_better(there)
            elif start is None or not start.fitted:
                start = fit.refined_first(before, start, others, anchor)
        if start is not None and isinstance(refinable, FamilyGuide) and not isinstance(self.family, OwnFamily):
            refinable.start_at(start)
        progress = (natural or fit.optimisation(refinable)).maximise()
        for attempt in range(1, self.settings.num_starts + len(others) if restart else 1):
            place = attempt - self.settings.num_starts
            point = others[place] if place >= 0 else prior_start(evaluator, chunk, run.stream(f"start {name}"), attempt)
            other = self._started(point, evaluator, chunk, run.derived(name, attempt))
            if other is not None:
                progress = fit.begun_at(other, refinable, progress, attempt)
        for parameter in refinable.parameters:
            parameter.requires_grad_(False)
        if isinstance(refinable, StructuredGuide):
            refinable.forget()
        return refinable, progress

    def for_other_data(self, problem: Problem) -> Problem:
        """`problem` as it can be taken to other data: without a guide that has parameters for its own alone."""
        return self.family.for_other_data(problem) if isinstance(self.family, OwnFamily) else problem

    def over(self, problem: Problem) -> "Refiner":
        """This refiner for the guide of `problem`, the same on other data."""
        return replace(self, family=self.family.over(problem)) if isinstance(self.family, OwnFamily) else self

    def simulated(
        self, problem: Problem, number: int, run: Run, to_data: ToData | None = None
    ) -> tuple[Simulated, "Refiner"]:
        """`problem` on data that the model draws in the shape of `number` of its datapoints, and a refiner for it.

        A guide with parameters for its own datapoints alone is replaced by a fresh one of its class.

        Raises `InputError` where the model cannot be simulated.
        """
        part, _ = part_of(problem.joint.data, number)
        simulated = self.for_other_data(problem).over(part).simulated(run.seed, to_data)
        return simulated, self.over(simulated.problem)

    def _started(self, start: Start, evaluator: Evaluator, chunk: Chunk, run: Run) -> Refinable | None:
        """The family at the Gaussian `start`; None where it cannot start there, which `num_starts` refuses."""
        if isinstance(self.family, OwnFamily):
            started = self.family.start_at(start, evaluator.joint, chunk, run)
            if started is None and self.settings.num_starts > 1:
                raise InputError(
                    "refinement.num_starts: several starts need a guide that consists of Normals with free parameters, "
                    "and this guide does not. Leave num_starts at 1"
                )
            return started
        guide = FamilyGuide(self.family, evaluator.joint, chunk, run)
        guide.start_at(start)
        return guide


@dataclass(frozen=True)
class _Fit:
    """A family fitted to the datapoints of a chunk: what its optimisations have in common."""

    refiner: Refiner
    evaluator: Evaluator
    chunk: Chunk
    run: Run
    name: str

    def optimisation(self, refinable: Refinable, attempt: int = 0) -> Optimisation:
        """By Adam; of a further `attempt`, without the progress bar."""
        settings, run = self.refiner.settings, self.run.quiet() if attempt else self.run
        _, number = points_of(refinable, settings.num_particles)
        density = self.evaluator.bind(self.chunk.indices, number)
        return Optimisation(
            refinable, density, self.chunk, settings, run, f"{self.name} {attempt}" if attempt else self.name
        )

    def natural(self, refinable: Refinable, anchor: Anchor | None) -> NaturalRefinement | None:
        """By natural gradients; None for guides that are not Gaussian, or where no curvature is known."""
        if anchor is None or not isinstance(self.evaluator, GradientEvaluator):
            return None
        form = gaussian_form(refinable, self.evaluator.joint, self.chunk)
        if form is None or form.joint.dim > MAX_DIM:  # there are no full covariances above
            return None
        curvature = anchor()
        return NaturalRefinement(form, curvature, self.evaluator, self.refiner.settings, self.run, self.name)

    def refined_first(
        self, family: Family, start: Start | None, others: Sequence[Start], anchor: Anchor | None
    ) -> Start:
        """The Gaussians that another family's refined guides amount to."""
        first, run = replace(self.refiner, family=family), self.run.quiet()
        refined, _ = first(self.evaluator, self.chunk, run, f"{self.name} start", start, others, anchor)
        return start_of(refined, self.chunk, self.run)

    def begun_at(self, other: Refinable, refinable: Refinable, progress: Progress, attempt: int) -> Progress:
        """Optimise `other`, a further start, and set `refinable` to it where its bound is higher."""
        its_progress = self.optimisation(other, attempt).maximise()
        better = self.optimisation(refinable).take_better(other)
        converged = torch.where(better, its_progress.converged, progress.converged)
        return replace(progress, converged=converged, kept_start=progress.kept_start & ~better)


def _starts_from(refinable: Refinable) -> Callable[..., Any] | None:
    return LocalFamily.of(refinable.guide).starts_from if isinstance(refinable, FamilyGuide) else None
