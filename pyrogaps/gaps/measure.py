"""What is measured of each chunk of datapoints: the guide's bounds, refinements, evidence."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrogaps.bounds import chunk_log_weights
from pyrogaps.chunk_cache import Arrays
from pyrogaps.conditioning import ConditioningMeasure
from pyrogaps.density.draws import Posterior, probe
from pyrogaps.evidence import Measurement
from pyrogaps.evidence.protocol import checked_measured
from pyrogaps.gaps.finite import refuse_nan
from pyrogaps.log_weights import Estimate, log_mean_exp_estimate, mean_estimate
from pyrogaps.problem import Problem
from pyrogaps.refine import OwnFamily, Refiner
from pyrogaps.refine.families import Family, Start
from pyrogaps.refine.own import start_of
from pyrogaps.run import Run
from pyrogaps.streams import Chunk

OWN = "own"
# Of an array that is a mean over the datapoints of a chunk, such as the ELBO along a refinement.
TRACE = "traces/"


@dataclass(frozen=True)
class Measure:
    """Measures everything of a chunk that a ledger holds, in order.

    Attributes:
        problem: model, guide and data.
        refiner: fits the guide's own family.
        families: further families to refine, by name.
        evidence: measures log p(x); None where only bounds are measured.
        conditioned: measures L[q*_C]; None where that is not measured.
        num_particles: draws for each bound.
    """

    problem: Problem
    refiner: Refiner
    families: Mapping[str, Family]
    evidence: Measurement | None
    conditioned: ConditioningMeasure | None
    num_particles: int

    @property
    def num_stages(self) -> int:
        """Stages of a chunk that the progress bar counts."""
        return 3 + len(self.families) + (self.conditioned is not None)

    def __call__(self, chunk: Chunk, run: Run) -> Arrays:
        """All columns of the ledger, and traces, for a chunk."""
        arrays, own = self.bounds(chunk, run)
        if self.evidence is not None:
            run.bar.stage("log p(x)")
            measured = checked_measured(self.evidence.measure(chunk, own), self.evidence.evidence, chunk)
            traces = {TRACE + name: trace for name, trace in measured.traces.items()}
            arrays = {**arrays, **as_arrays(measured.columns | traces)}
        refuse_nan(arrays, chunk)
        return arrays

    def bounds(self, chunk: Chunk, run: Run) -> tuple[Arrays, Posterior]:
        """The columns of a chunk without log p(x), and the refined guide of its own family."""
        run.bar.stage("ELBO of the guide")
        problem, number = self.problem, self.num_particles
        weights = chunk_log_weights(problem.scorer, problem.guided(), chunk, number, run.stream("elbo"))
        elbo, iwae = mean_estimate(weights), log_mean_exp_estimate(weights)
        refined, own = self.refined(chunk, run)
        arrays = {
            **columns_of("elbo", elbo),
            **columns_of("iwae", iwae),
            **self._conditioned(chunk, run),
            "khat": iwae.khat,
            "ess": iwae.ess,
        }
        return as_arrays(arrays | refined), own

    def refined(
        self, chunk: Chunk, run: Run, others: Callable[[Refiner], Sequence[Start]] = lambda refiner: ()
    ) -> tuple[dict[str, Tensor | None], Posterior]:
        """The columns of the refined families, and the refined guide of the own family; `others` gives further starts
        of a family's refinement.
        """
        problem, number = self.problem, self.num_particles
        posteriors, bounds, proposals, progress, start = [], [], [], [], None
        families: dict[str, OwnFamily | Family] = {OWN: self.refiner.family, **self.families}
        for name, family in families.items():
            run.bar.stage("refining the guide's own family" if name == OWN else f"refining {name}")
            refiner = Refiner(family, self.refiner.settings)
            posterior, its_progress = refiner.fit(problem, chunk, run, name, start, others(refiner))
            start = start_of(posterior, chunk, run) if name == OWN else start
            density = problem.evaluator_of(problem.density_of(posterior))
            weights = chunk_log_weights(density, posterior, chunk, number, run.stream(f"refined {name}"))
            posteriors.append(posterior)
            bounds.append(mean_estimate(weights))
            proposals.append(log_mean_exp_estimate(weights))
            progress.append(its_progress)
        columns: dict[str, Tensor | None] = {
            "elbo_refined": torch.stack([bound.value for bound in bounds], 1),
            "elbo_refined_mcse": torch.stack([bound.mcse for bound in bounds], 1),
            "khat_refined": torch.stack([weights.khat for weights in proposals if weights.khat is not None], 1),
            "ess_refined": torch.stack([weights.ess for weights in proposals if weights.ess is not None], 1),
            "converged": torch.stack([part.converged for part in progress], 1),
            "kept_start": torch.stack([part.kept_start for part in progress], 1),
            f"{TRACE}refined_elbo": torch.stack([part.trace for part in progress]),
        }
        return columns, posteriors[0]

    def _conditioned(self, chunk: Chunk, run: Run) -> dict[str, Tensor]:
        if self.conditioned is None:
            return {}
        run.bar.stage(self.conditioned.stage)
        return self.conditioned.arrays(chunk)

    def fingerprint(self, chunk: Chunk) -> Tensor:
        """Numbers that change with the data and the parameters that a chunk's columns rest on."""
        own = probe(self.problem.guided(), self.problem.scored, chunk)
        return own if self.conditioned is None else torch.cat([own, self.conditioned.probe(chunk)])


def reached(arrays: Arrays) -> dict[str, Any]:
    """What the progress bar shows of a chunk."""
    # On training data there is no evidence: the refined bound stands in its place.
    return {"L[q]": arrays["elbo"], "log p(x)": arrays.get("log_evidence", arrays["elbo_refined"][:, 0])}


def columns_of(name: str, estimate: Estimate) -> dict[str, Tensor]:
    """An estimate and its Monte Carlo error, as columns of the ledger."""
    return {name: estimate.value, f"{name}_mcse": estimate.mcse}


def as_arrays(tensors: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """The tensors there are, as arrays."""
    return {name: value.detach().cpu().numpy() for name, value in tensors.items() if value is not None}
