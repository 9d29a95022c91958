"""L[q*_C] of a chunk of datapoints: of the shared posterior, or of a reference guide with the same conditions."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from pyrogaps.bounds import Density, chunk_log_weights
from pyrogaps.conditioning.conditions import Lookahead, Shown, declared
from pyrogaps.conditioning.leaks import check_no_leak
from pyrogaps.conditioning.settings import Conditioning
from pyrogaps.conditioning.shared import Sharing, sharing_of
from pyrogaps.density import GuideDensity
from pyrogaps.density.draws import probe
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.evidence import AIS
from pyrogaps.log_weights import mean_estimate
from pyrogaps.problem import Problem
from pyrogaps.refine import Refiner
from pyrogaps.run import Run
from pyrogaps.streams import Chunk

Quantities = dict[str, tuple[str, str]]


class ConditioningMeasure(Protocol):
    """A measurement of L[q*_C]: `arrays` include `elbo_shared`, and `quantities` describe them."""

    @property
    def stage(self) -> str: ...

    @property
    def quantities(self) -> Quantities: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    def arrays(self, chunk: Chunk) -> dict[str, Tensor]:
        """Columns over the datapoints of `chunk`, nats."""
        ...

    def probe(self, chunk: Chunk) -> Tensor:
        """Numbers, in double precision, that change with the inputs other than model and guide."""
        ...


@dataclass(frozen=True)
class SharedMeasure:
    """L[q*_C] of the shared posterior, fitted by block, so that results do not depend on the chunk size."""

    sharing: Sharing
    stage: ClassVar[str] = "completing the data and refining the shared posterior"
    quantities: ClassVar[Quantities] = {
        "elbo_shared": ("Monte Carlo ELBO of the shared posterior", "lower bound of L[q*_C], on average"),
        "elbo_on_completions": (
            "Monte Carlo ELBO of the shared posterior on completed data",
            "lower bound of L[q*_C], on average",
        ),
    }

    @property
    def settings(self) -> dict[str, Any]:
        return asdict(self.sharing.settings)

    def probe(self, chunk: Chunk) -> Tensor:
        partial = self.sharing.latents.partial
        with torch.no_grad():
            return partial(partial.zeros(len(chunk))[None], chunk.indices).double().flatten()

    def arrays(self, chunk: Chunk) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {}
        for block in chunk.blocks():
            shared = self.sharing.fit(block)
            columns = {
                "elbo_shared": shared.elbo.value,
                "elbo_shared_mcse": shared.elbo.mcse,
                "elbo_on_completions": shared.on_completions.value,
                "elbo_on_completions_mcse": shared.on_completions.mcse,
                "overfitting": shared.overfitting,
                "shared_converged": shared.converged,
                "completions_ess": shared.completions.ess,
                "num_completions": torch.full((len(block),), len(shared.completions)),
            }
            for name, column in columns.items():
                parts.setdefault(name, []).append(column)
        return {name: torch.cat(columns) for name, columns in parts.items()}


@dataclass(frozen=True)
class ReferenceMeasure:
    """L[q*_C] of a reference guide with the same conditions, as good as training could make it."""

    density: GuideDensity
    joint: Density
    num_particles: int
    run: Run
    stage: ClassVar[str] = "ELBO of the reference guide"
    quantities: ClassVar[Quantities] = {
        "elbo_shared": ("Monte Carlo ELBO of the reference guide", "lower bound of L[q*_C], on average"),
    }

    @property
    def settings(self) -> dict[str, Any]:
        return {"reference": type(self.density.guide).__name__}

    def probe(self, chunk: Chunk) -> Tensor:
        return probe(self.density, self.density.joint, chunk)

    def arrays(self, chunk: Chunk) -> dict[str, Tensor]:
        weights = chunk_log_weights(self.joint, self.density, chunk, self.num_particles, self.run.stream("reference"))
        estimate = mean_estimate(weights)
        return {"elbo_shared": estimate.value, "elbo_shared_mcse": estimate.mcse}


def conditioning_measure(
    problem: Problem,
    settings: Conditioning,
    evidence: AIS,
    refiner: Refiner,
    num_particles: int,
    run: Run,
    reference: Program | None,
) -> ConditioningMeasure | None:
    """The measurement of a conditioning gap; None where all of x is shown, or a lookahead has no reference.

    Raises `InputError` where the guide or the reference uses data that it declares as not shown, and for a reference
    whose declaration differs from the guide's.
    """
    density = problem.guide_density()
    declaration = declared(density.guide)
    if isinstance(declaration, Shown) and (drawn := density.joint.structure.drawn):
        raise InputError(
            f"site '{drawn[0]}': the conditioning gap of a guide that draws discrete latents is not measured. Leave "
            "the site out of the guide, where it is summed out exactly, or remove the guide's conditions"
        )
    if declaration is not None:
        check_no_leak(density, declaration)
    if isinstance(declaration, Shown):
        if reference is not None:
            raise InputError(
                "reference: has no effect, because a guide with conditions needs no reference guide. Leave reference "
                "out"
            )
        return SharedMeasure(sharing_of(problem, declaration, evidence, refiner, settings, num_particles, run))
    if reference is None:
        return None
    if not isinstance(declaration, Lookahead):
        raise InputError("reference: has no effect, because the guide declares no lookahead. Leave reference out")
    if declared(reference) != declaration:
        raise InputError(
            f"reference: it must declare the same lookahead as the guide. The guide declares {declaration}, but the "
            f"reference declares {declared(reference)}"
        )
    best = GuideDensity(reference, None, density.joint)
    check_no_leak(best, declaration)
    joint: Density = problem.evaluator if best.joint is problem.joint else best.joint
    return ReferenceMeasure(best, joint, num_particles, run)
