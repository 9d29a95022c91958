"""What a ledger says to do: its gaps ranked by nats, with what usually closes each and the evidence it rests on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

# How many standard errors a gap, or what sets two apart, has to exceed before anything is said of it.
CERTAIN = 2.0

REMEDIES: Mapping[str, tuple[str, str]] = {
    "approximation_gap": (
        "the variational family cannot hold the posterior",
        "try a richer family (full covariance, a flow, a mixture); give it to decompose(families=...) first: its "
        "refined bound says what it would gain",
    ),
    "conditioning_gap": (
        "the guide is not shown all that the posterior depends on",
        "show it more: a longer lookahead, a smoother, the withheld inputs",
    ),
    "amortization_gap": (
        "one network for all datapoints falls short of the best guide for each",
        "decompose(split=Split(train_data)) says whether capacity, training or data are to blame",
    ),
    "capacity_gap": (
        "the network cannot express the best guides, however long it is trained",
        "a larger or better suited encoder, or a few steps of refinement from its output",
    ),
    "optimization_gap": (
        "the network is not trained to its end for this model",
        "train it longer, with a learning rate that falls, or steps of its own before the model's (guide_steps)",
    ),
    "generalization_gap": (
        "the network does worse on these data than on those it was trained on",
        "more training data, or a regularised encoder: early stopping on the ELBO, dropout, data simulated from the "
        "model",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One leaf of the tree: its mean and standard error, nats, and its share of the inference gap.

    The error combines that over datapoints with the Monte Carlo error.
    """

    gap: str
    nats: float
    error: float
    share: float

    @property
    def name(self) -> str:
        """The gap in words."""
        return self.gap.replace("_", " ")

    @property
    def certain(self) -> bool:
        """Whether the gap exceeds its error."""
        return self.nats > CERTAIN * self.error

    def __str__(self) -> str:
        told = f"{self.name} {self.nats:.3f} ± {self.error:.3f} nats ({self.share:.0%})"
        cause, remedy = REMEDIES[self.gap]
        if not self.certain:
            return f"{told}: not larger than its error"
        return f"{told}: {cause}. What usually helps: {remedy}."


@dataclass(frozen=True)
class Diagnosis:
    """The leaves of a ledger's tree, the largest first; `print` it.

    Attributes:
        findings: ranked by nats.
        dominant: the name of the largest gap, where it exceeds zero and the next by two standard errors; else None.
        warnings: what the numbers rest on that does not bear weight.
    """

    findings: tuple[Finding, ...]
    dominant: str | None
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        head = self._head(self.findings[0])
        lines = [head, *(f"{number}. {finding}" for number, finding in enumerate(self.findings, 1))]
        return "\n".join([*lines, *(f"Mind: {warning}." for warning in self.warnings)])

    def _head(self, first: Finding) -> str:
        if self.dominant is not None:
            return f"Mostly the {first.name}."
        if not first.certain:
            return "No gap exceeds its error: inference is as good as these data can tell."
        rivals = [finding for finding in self.findings[1:] if not _exceeds(first, finding)]
        names = " and ".join(finding.name for finding in rivals)
        if all(finding.certain for finding in rivals):
            return f"No single cause: the {first.name} is within the errors of the {names}."
        return f"The {first.name} is the largest that exceeds its error; the {names} may be as large."

    __repr__ = __str__


def diagnosis(summary: pd.DataFrame, warnings: tuple[str, ...]) -> Diagnosis:
    """The leaves of the tree in a ledger's summary, ranked."""
    leaves = [name for name in REMEDIES if name in summary.index]
    if "capacity_gap" in leaves:
        leaves.remove("amortization_gap")
    total = float(summary["mean"]["inference_gap"])
    findings = sorted((_finding(name, summary.loc[name], total) for name in leaves), key=lambda f: -f.nats)
    first, others = findings[0], findings[1:]
    dominant = first.certain and all(_exceeds(first, other) for other in others)
    return Diagnosis(tuple(findings), first.gap if dominant else None, warnings)


def _finding(name: str, row: Any, total: float) -> Finding:
    error = float(np.hypot(np.nan_to_num(row["standard_error"]), row["mcse"]))
    return Finding(name, float(row["mean"]), error, float(row["mean"]) / total if total else float("nan"))


def _exceeds(first: Finding, other: Finding) -> bool:
    return first.nats - other.nats > CERTAIN * float(np.hypot(first.error, other.error))
