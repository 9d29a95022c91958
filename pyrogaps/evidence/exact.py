"""log p(x) where every latent is discrete and summed out: it is the density itself."""

from dataclasses import dataclass

import torch

from pyrogaps.density.draws import Posterior
from pyrogaps.evidence.protocol import Evidence, Measured, Measurement
from pyrogaps.log_weights import rounding_error
from pyrogaps.problem import Problem
from pyrogaps.refine import Refiner
from pyrogaps.run import Run
from pyrogaps.streams import Chunk


@dataclass(frozen=True)
class Enumeration(Evidence):
    """log p(x_n) as the sum over all states, which takes the place of any evidence where no latent is continuous."""

    def prepare(self, problem: Problem, run: Run, refine: Refiner | None = None) -> "EnumerationMeasurement":
        return EnumerationMeasurement(self, problem, run)


@dataclass(frozen=True)
class EnumerationMeasurement(Measurement):
    """log p(x_n) by enumeration. The Monte Carlo error is that of rounding."""

    evidence: Enumeration
    direction = "exact"

    @property
    def estimator(self) -> str:
        return "enumeration"

    def measure(self, chunk: Chunk, refined: Posterior | None = None) -> Measured:
        joint = self.problem.joint
        nowhere = joint.zeros(len(chunk))[None]  # the one point of a space without dimensions
        with torch.no_grad():
            value = joint(nowhere, chunk.indices)
        return Measured({"log_evidence": value[0].double(), "log_evidence_mcse": rounding_error(value)})


def prepared(evidence: Evidence, problem: Problem, run: Run, refine: Refiner | None = None) -> Measurement:
    """What measures log p(x_n) by an evidence; by enumeration where all latents are discrete."""
    return (evidence if problem.dim else Enumeration()).prepare(problem, run, refine)
