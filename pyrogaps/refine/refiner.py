"""`Refiner`: a family, fitted to every datapoint of a chunk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pyrogaps.density.data import part_of
from pyrogaps.density.simulate import ToData
from pyrogaps.family import LocalFamily
from pyrogaps.problem import Problem, Simulated
from pyrogaps.refine.families import Family, Start
from pyrogaps.refine.family_guide import FamilyGuide
from pyrogaps.refine.local import Refinable
from pyrogaps.refine.objective import Evaluator
from pyrogaps.refine.optimise import Optimisation, Progress
from pyrogaps.refine.own import OwnFamily, start_of
from pyrogaps.refine.restarts import prior_start
from pyrogaps.refine.settings import Refinement
from pyrogaps.run import Run
from pyrogaps.streams import Chunk


@dataclass(frozen=True)
class Refiner:
    r"""Fits a family to datapoints one by one: $q^*_n = \arg\max_{q \in Q} \mathcal L[q](x_n)$.

    Attributes:
        family: the guide's own family, which starts at the guide's output, or a further one.
        settings: of the optimisation.
    """

    family: OwnFamily | Family
    settings: Refinement

    def __call__(
        self,
        evaluator: Evaluator,
        chunk: Chunk,
        run: Run,
        name: str = "own",
        start: Start | None = None,
        others: Sequence[Start] = (),
    ) -> tuple[Refinable, Progress]:
        """q* of the datapoints of a chunk, and how its optimisation went. It is begun at `others` too.

        A further family starts at the Gaussian `start`. Where guides of a family have `starts_from`, another family,
        that one is refined first: a further family starts at the Gaussian which this amounts to; the guide's own
        starts there or at the guide's output, whichever bound is higher.
        """
        evaluate = evaluator.bind(chunk.indices, self.settings.num_particles)

        def optimisation(refinable: Refinable, name: str, run: Run = run) -> Optimisation:
            return Optimisation(refinable, evaluate, chunk, self.settings, run, name)

        def refined_first(family: Family) -> Start:
            refined, _ = replace(self, family=family)(evaluator, chunk, run.quiet(), f"{name} start", start, others)
            return start_of(refined, chunk, run)

        restart = True
        if isinstance(self.family, OwnFamily):
            refinable = self.family.start(evaluator.joint, chunk, run)
            if before := _starts_from(refinable):
                there = self.family.start_at(refined_first(before), evaluator.joint, chunk, run)
                optimisation(refinable, name).take_better(there)
                restart = False
        else:
            # Where guides start at random, those of two families, or two starts, must not start alike.
            refinable = FamilyGuide(self.family, evaluator.joint, chunk, run.derived(name))
            if before := _starts_from(refinable):
                start = start if start and start.fitted else refined_first(before)
                restart = False
            if start is not None:
                refinable.start_at(start)
        progress = optimisation(refinable, name).maximise()
        # A family that starts from another one has had its further starts there.
        for attempt in range(1, self.settings.num_starts + len(others) if restart else 1):
            place = attempt - self.settings.num_starts
            point = others[place] if place >= 0 else prior_start(evaluator, chunk, run.stream(f"start {name}"), attempt)
            other = self._started(point, evaluator, chunk, run.derived(name, attempt))
            if other is None:
                continue
            its_progress = optimisation(other, f"{name} {attempt}", run.quiet()).maximise()
            better = optimisation(refinable, name).take_better(other)
            converged = torch.where(better, its_progress.converged, progress.converged)
            progress = replace(progress, converged=converged, kept_start=progress.kept_start & ~better)
        for parameter in refinable.parameters:
            parameter.requires_grad_(False)
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
            if not self.family.starts_anywhere(evaluator.joint, chunk, run) and self.settings.num_starts == 1:
                return None
            return self.family.start_at(start, evaluator.joint, chunk, run)
        guide = FamilyGuide(self.family, evaluator.joint, chunk, run)
        guide.start_at(start)
        return guide


def _starts_from(refinable: Refinable) -> Callable[..., Any] | None:
    return LocalFamily.of(refinable.guide).starts_from if isinstance(refinable, FamilyGuide) else None
