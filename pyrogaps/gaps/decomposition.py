"""`Decomposition`: what `decompose` measures of a problem, and how; checked before anything is measured."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from pyrogaps import memory, processes
from pyrogaps.chunk_cache import chunk_size
from pyrogaps.conditioning import Conditioning, conditioning_measure, declared
from pyrogaps.density.copies import copied
from pyrogaps.density.remarks import quoted
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.evidence import AIS, Evidence, Ladder, Measurement
from pyrogaps.evidence.exact import prepared
from pyrogaps.gaps.amortization import with_split
from pyrogaps.gaps.assemble import assemble, with_gaps
from pyrogaps.gaps.certificate import Certificate
from pyrogaps.gaps.certify import certify, check_certifiable, check_size
from pyrogaps.gaps.facts import with_facts
from pyrogaps.gaps.ledger import GapLedger
from pyrogaps.gaps.measure import OWN, Measure, reached
from pyrogaps.gaps.other_starts import with_other_starts
from pyrogaps.gaps.retrain import Split, trainable
from pyrogaps.gaps.sizes import Sizes, sizes_of
from pyrogaps.gaps.terms import Term, approximation_direction
from pyrogaps.problem import Problem
from pyrogaps.refine import OwnFamily, Refinement, Refiner, own_family
from pyrogaps.refine.families import Family
from pyrogaps.refine.same import is_own_family
from pyrogaps.run import Run
from pyrogaps.streams import BLOCK, Chunk
from pyrogaps.training import rehearse_training
from pyrogaps.version import __version__

SAME = "the family '{name}' is the guide's own family, so its rows estimate the same values again"
REHEARSED = 2  # steps and draws
QUANTITIES = {
    "elbo": ("Monte Carlo ELBO of the guide", "unbiased"),
    "iwae": ("importance weights of the guide", "lower bound of log p(x)"),
    "elbo_refined": ("Monte Carlo ELBO of the refined guide", "lower bound of L[q*]"),
}


@dataclass(frozen=True)
class Decomposition:
    """A problem, and the arguments of `decompose` for it."""

    problem: Problem
    families: Mapping[str, Family] = field(default_factory=dict)
    evidence: Evidence = field(default_factory=Ladder)
    refinement: Refinement = field(default_factory=Refinement)
    conditioning: Conditioning = field(default_factory=Conditioning)
    reference: Program | None = None
    split: Split | None = None
    certificate: Certificate | None = None
    num_particles: int = 1000
    batch_size: int | None = None
    max_memory: int | str | None = None
    seed: int = 0
    progress: bool = True
    cache: Path | None = None
    referee: int = 0

    def __post_init__(self) -> None:
        if OWN in self.families:
            raise InputError(f"families: '{OWN}' is the name of the guide's own family. Choose another")
        if self.split is not None and self.problem.plate is None:
            raise InputError("split: the model has no data plate, so its guide is not amortized. Leave split out")
        if self.split is not None and (given := self.problem.joint.structure.estimates) is not None:
            raise InputError(
                f"split: the guide has point estimates of {quoted(given.names)}, which retraining would move. Leave "
                "split out, or make them parameters of the model (pyro.param)"
            )
        if self.split is not None:
            if summed := self.problem.scored.enumerated:
                raise InputError(
                    f"split: the guide does not draw {quoted(summed)}, and training it on would not sum them out. Draw "
                    "them in the guide, or leave split out"
                )
            copy = copied(trainable(self.problem.guide))
            self.problem.with_guide(copy)  # which runs the copy
            if not isinstance(self.problem.guide, nn.Module):  # whose modules may not all have been found
                training = replace(self.split.retraining.training, freeze_model=True)
                rehearse_training(self.problem.model, copy, self.split.train_data, None, training, self.seed)
        if self.certificate is not None:
            check_size(self.problem.joint, self.certificate, self.max_memory)

    def ledger(self, terms: Sequence[Term]) -> GapLedger:
        """Measure everything."""
        with memory.limited(self._sizes.working_set):
            run = self._run
            bounds, on_training = self._bounds(self.problem, run), run.derived("training data")
            training = None if self.split is None else self._bounds(self._training_problem(self.split), on_training)
            measure = replace(bounds, evidence=self._measurement(run, bounds.refiner))
            provenance = _provenance(measure, run)
            results = run.map_kept(
                measure, self.problem.joint, provenance, measure.fingerprint, measure.num_stages, reached
            )
            if self.referee:
                results, provenance["examined"] = with_other_starts(results, measure, self.referee, run)
            ledger = assemble(results, measure, provenance, terms, run)
            if self.split is not None and training is not None:
                training = replace(training, families={})
                ledger = with_gaps(with_split(ledger, self.split, training, on_training), terms)
            if self.certificate is not None:
                ledger = replace(ledger, certificate=certify(measure, ledger.per_datapoint, self.certificate, run))
            return with_facts(ledger, self.problem, run)

    def rehearse(self) -> None:
        """Raise what `ledger` would raise, as far as a few steps and draws of the first datapoints can tell."""
        short = replace(self.refinement, num_steps=REHEARSED, num_particles=REHEARSED, num_selection=REHEARSED)
        with memory.limited(self._sizes.working_set):
            bounds = replace(self, refinement=short, num_particles=REHEARSED)._bounds(self.problem, self._run)
            first = Chunk(0, min(BLOCK, self.problem.num_datapoints))
            replace(bounds, conditioned=None).bounds(first, replace(self._run, progress=False))
            self._measurement(self._run)
            if self.split is not None:
                self._training_problem(self.split)

    @cached_property
    def _sizes(self) -> Sizes:
        kept = processes.first(lambda: chunk_size(self.cache, self.problem.num_datapoints))
        return sizes_of(
            self.problem.joint,
            self.evidence,
            self.num_particles,
            self.batch_size,
            self.max_memory,
            kept,
            self.refinement.num_particles,
        )

    @property
    def _run(self) -> Run:
        return Run(self.seed, self._sizes.batch_size, self.progress, self.cache)

    def _bounds(self, problem: Problem, run: Run) -> Measure:
        """Measures the bounds of a problem; refused where these cannot be certified."""
        refiner = Refiner(own_family(problem.guide_density()), self.refinement)
        annealing = self.evidence if isinstance(self.evidence, AIS) else AIS()
        conditioned = conditioning_measure(
            problem, self.conditioning, annealing, refiner, self.num_particles, run, self.reference
        )
        measure = Measure(problem, refiner, self.families, None, conditioned, self.num_particles)
        if self.certificate is not None:
            check_certifiable(measure)
        return measure

    def _measurement(self, run: Run, refiner: Refiner | None = None) -> Measurement:
        """What measures log p(x)."""
        measurement = prepared(self.evidence, self.problem, run, refiner)
        if not isinstance(measurement, Measurement):
            name = f"{type(self.evidence).__name__}.prepare"
            raise InputError(
                f"evidence: {name} returns a {type(measurement).__name__}. Return a subclass of pyrogaps.Measurement"
            )
        return measurement

    def _training_problem(self, split: Split) -> Problem:
        problem = self.problem
        return Problem.of(problem.model, problem.guide, split.measured(problem.model)[0], problem.plate, problem.mode)


def _provenance(measure: Measure, run: Run) -> dict[str, Any]:
    """What was measured and by what, as plain values."""
    problem, conditioned, evidence = measure.problem, measure.conditioned, measure.evidence
    assert evidence is not None
    estimators = QUANTITIES | ({} if conditioned is None else conditioned.quantities)
    estimators |= {
        "log_evidence": (evidence.estimator, evidence.direction),
        "family_approximation_gap": ("log p(x) - L[q*]", approximation_direction(evidence.direction)),
    }
    own = measure.refiner.family
    same = [name for name, family in measure.families.items() if is_own_family(own, family, problem, run)]
    return {
        "quantities": {
            name: {"estimator": estimator, "direction": direction}
            for name, (estimator, direction) in estimators.items()
        },
        "own_family": own.kind if isinstance(own, OwnFamily) else None,
        "amortized": isinstance(own, OwnFamily) and own.amortized and problem.num_datapoints > 1,
        "evidence": evidence.describe(),
        "refinement": asdict(measure.refiner.settings),
        "families": {name: getattr(family, "__name__", repr(family)) for name, family in measure.families.items()},
        "same_families": same,
        "num_particles": measure.num_particles,
        "num_datapoints": problem.num_datapoints,
        "dim": problem.dim,
        "plate": problem.plate,
        "mode": problem.mode,
        "shown": None if (shown := declared(problem.guide)) is None else str(shown),
        "conditioning": None if conditioned is None else conditioned.settings,
        "remarks": [*problem.remarks, *(SAME.format(name=name) for name in same)],
        "unnormalised_likelihood": list(problem.joint.unnormalised),
        "seed": run.seed,
        "dtype": str(problem.joint.dtype).removeprefix("torch."),
        "device": problem.joint.device.type,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "pyrogaps": __version__}
    for package in ("pyro-ppl", "torch", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
