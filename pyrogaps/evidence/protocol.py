"""`Evidence` and `Measurement`: what every way to log p(x) has in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrogaps.density.draws import Posterior
from pyrogaps.errors import InputError, counted
from pyrogaps.evidence.reliability import reliability_of
from pyrogaps.log_weights import Estimate
from pyrogaps.problem import Problem
from pyrogaps.refine import Refiner
from pyrogaps.run import Run
from pyrogaps.streams import Chunk

# Chains at a time; more take turns, so that memory does not grow with their number.
MAX_CHAINS = 64
Columns = Mapping[str, NDArray[Any]]


class Measured(NamedTuple):
    """What was measured of the B datapoints of a chunk.

    Attributes:
        columns: `(B,)` each: `log_evidence` and its Monte Carlo standard error `log_evidence_mcse`, in nats, and
            whatever else a ledger should hold. `log_evidence_reliable`, a boolean, is where that error can be trusted.
            Without it an exact log p(x) is reliable where it is finite, and that of any other evidence not examined.
        log_weights: those that log p(x) was estimated from, `(S, B)` or, where datapoints have different numbers of
            them, a tensor for each; None where there are none.
        traces: numbers along a path, `(T,)` each, means over the datapoints of the chunk.

    Example:
        >>> import torch, pyrogaps as pg
        >>> exact, errors = torch.tensor([-1.2, -3.4]), torch.zeros(2)
        >>> sorted(pg.Measured({"log_evidence": exact, "log_evidence_mcse": errors}).columns)
        ['log_evidence', 'log_evidence_mcse']
    """

    columns: dict[str, Tensor]
    log_weights: Tensor | Sequence[Tensor] | None = None
    traces: Mapping[str, Tensor] = {}


def checked_measured(measured: Any, evidence: Any, chunk: Chunk) -> Measured:
    """What a `Measurement.measure` returned, refused by name where it is no `Measured` with both columns."""
    name = f"evidence: measure of {type(evidence).__name__}"
    if not isinstance(measured, Measured):
        raise InputError(
            f"{name} returns a {type(measured).__name__}. Return "
            'pyrogaps.Measured({"log_evidence": value, "log_evidence_mcse": error})'
        )
    for column in ("log_evidence", "log_evidence_mcse"):
        if column not in measured.columns:
            raise InputError(f"{name} returns no column '{column}'. Add it, a tensor with a number for each datapoint")
    for column, values in measured.columns.items():
        if tuple(values.shape) != (len(chunk),):
            raise InputError(
                f"{name} returns '{column}' of shape {tuple(values.shape)} for {counted(len(chunk), 'datapoint')}. "
                f"Return shape {(len(chunk),)}"
            )
    return measured


@dataclass(frozen=True)
class Measurement:
    """Measures log p(x_n) of the datapoints of one problem. Subclass it with `measure`, and whatever else applies.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> from pyrogaps.run import Run
        >>> measurement = pg.Ladder().prepare(pg.Problem.of(model, guide, x), Run(0))
        >>> measurement.estimator
        'importance sampling or AIS'
    """

    evidence: Any
    problem: Problem
    run: Run
    direction: ClassVar[str] = "lower bound of log p(x)"

    @property
    def estimator(self) -> str:
        """What stands beside log p(x) in a table."""
        return type(self.evidence).__name__

    def measure(self, chunk: Chunk, refined: Posterior | None = None) -> Measured:
        """log p(x_n) of the datapoints of a chunk; `refined` is the guide's own family fitted to each of them."""
        raise NotImplementedError

    def two_sided(self, chunk: Chunk, refined: Posterior | None, exact: Tensor, above: Any) -> tuple[Measured, Tensor]:
        """`measure`, and -log w `(S, B)` of AIS in reverse, where E[1/w] = 1/p(x).

        It starts at `exact` posterior draws `(B, dim)`; `above` is its measurement.
        """
        return self.measure(chunk, refined), above.negative_log_weights(chunk, refined, exact)

    def over(self, problem: Problem, run: Run) -> "Measurement":
        """The same measurement, with the same decisions, of another data set."""
        return replace(self, problem=problem, run=run)

    def describe(self) -> dict[str, Any]:
        """Settings and decisions, as plain values. The ledger keeps them, and chunks in a cache hold for them alone."""
        return settings_of(self.evidence)

    def notes(self, columns: Columns) -> list[str]:
        """Lines below a ledger's table: how log p(x) was measured, from the columns of all datapoints."""
        return []

    def cautions(self, columns: Columns) -> list[str]:
        """Reasons not to trust log p(x), from the columns of all datapoints."""
        return []

    def estimate(self, parts: Sequence[Measured]) -> Estimate:
        """What `log_evidence` returns, from the measurements of all chunks."""
        columns = joined(parts)
        declared = reliability_of(columns, self.direction)
        return Estimate(columns["log_evidence"], columns["log_evidence_mcse"], self.direction, declared=declared)


class Evidence(ABC):
    """A way to log p(x_n). Subclass it as a frozen dataclass of settings, with `prepare`.

    Pass an instance to `decompose(evidence=...)` or `log_evidence(evidence=...)`, or name the class in a recipe:
    `evidence: {class_path: my.module.MyEvidence, init_args: {...}}`.

    Example:
        >>> import torch, pyrogaps as pg
        >>> isinstance(pg.Ladder(), pg.Evidence), isinstance(pg.Bridge(), pg.Evidence)
        (True, True)
    """

    more: ClassVar[str] = "Spend more on the evidence"
    """How to spend more on it, in words."""

    @property
    def num_chains_at_once(self) -> int:
        """Chains or draws of a datapoint that are held at once, by which chunks are sized."""
        return MAX_CHAINS

    @property
    def num_log_weights(self) -> int:
        """Log-weights of a datapoint that are held at once."""
        return 0

    @property
    def needs_refined(self) -> bool:
        """Whether `Measurement.measure` needs the guide's own family refined."""
        return False

    @property
    def reverse(self) -> "Evidence | None":
        """The AIS that bounds log p(x) from above on simulated data, in reverse; None: `AIS()`."""
        return None

    @abstractmethod
    def prepare(self, problem: Problem, run: Run, refine: Refiner | None = None) -> Measurement:
        """A measurement of `problem`, with what has to be found out before: `refine` fits the guide's own family."""


def settings_of(evidence: Any) -> dict[str, Any]:
    """The settings of an evidence, as plain values, with its class."""
    settings = asdict(evidence) if is_dataclass(evidence) and not isinstance(evidence, type) else {}
    return {"class": type(evidence).__name__, **settings}


def joined(parts: Sequence[Measured]) -> dict[str, Tensor]:
    """The columns of all chunks, one after the other, on the CPU."""
    return {name: torch.cat([part.columns[name].cpu() for part in parts]) for name in parts[0].columns}
