"""What a ledger says to do: its gaps ranked by nats, with what usually closes each and the evidence it rests on."""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

import numpy as np
import xarray as xr

from pyrogaps.gaps.terms import combined_error, leaves, root
from pyrogaps.tables import html_lines

# How many standard errors a gap, or what sets two apart, has to exceed before anything is said of it.
CERTAIN = 2.0


@dataclass(frozen=True)
class Finding:
    """One leaf of the tree: its mean and standard error, nats, and its share of the inference gap; NaN where that is
    not larger than its error.

    The error combines that over datapoints with the Monte Carlo error. `gap` is the id of its term, `name` its label.
    """

    gap: str
    nats: float
    error: float
    share: float
    name: str
    cause: str
    remedy: str

    @property
    def certain(self) -> bool:
        """Whether the gap exceeds its error."""
        return self.nats > CERTAIN * self.error

    def __str__(self) -> str:
        if np.isnan(self.nats):
            return f"{self.name}: not measured"
        share = "" if np.isnan(self.share) else f" ({self.share:.0%})"
        size = f"{self.name} {self.nats:.3f} ± {self.error:.3f} nats{share}"
        if not self.certain:
            return f"{size}: not larger than its error"
        cause, remedy = self.cause or "a large gap", self.remedy
        return f"{size}: {cause}." + (f" What usually helps: {remedy}." if remedy else "")


@dataclass(frozen=True)
class Diagnosis:
    """What cannot be trusted in a ledger, and the leaves of its tree, the largest first; `print` it.

    Attributes:
        findings: ranked by nats.
        dominant: the name of the largest gap, where it exceeds zero and the next by two standard errors; else None.
        warnings: reasons not to trust the numbers.
        finite: whether all datapoints have finite bounds; the gaps are means over those that have.
        total: the inference gap and its error, nats.
        remarks: what of model and guide is left out of the numbers.
    """

    findings: tuple[Finding, ...]
    dominant: str | None
    warnings: tuple[str, ...]
    finite: bool = True
    total: tuple[float, float] = (float("nan"), float("nan"))
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        warnings = (f"Warning: {warning}." for warning in self.warnings)
        return "\n".join([*warnings, self.ranking, *(f"Note: {remark}." for remark in self.remarks)])

    @property
    def ranking(self) -> str:
        """The verdict and the gaps, the largest first, without warnings and notes."""
        ranked = (f"{number}. {finding}" for number, finding in enumerate(self.findings, 1))
        return "\n".join([self.verdict, *self.caveats, *ranked])

    @property
    def caveats(self) -> tuple[str, ...]:
        """Why there are no shares of the inference gap; none where there are."""
        return (*_without_shares(*self.total),)

    @property
    def verdict(self) -> str:
        """Which gap dominates, in one sentence."""
        if not self.finite:
            return "Not all datapoints have finite bounds: see the warning above before any gap of the others."
        if self.dominant is not None:
            return f"Mostly the {self.findings[0].name}."
        certain = [finding for finding in self.findings if finding.certain]
        if not certain:
            return "No gap exceeds its error: these data show no loss from inference."
        first = certain[0]
        rivals = [finding for finding in self.findings if finding is not first and not _exceeds(first, finding)]
        names = " and ".join(finding.name for finding in rivals)
        if all(finding.certain for finding in rivals):
            return f"No single cause: the {first.name} and the {names} do not differ by more than their errors."
        return f"The {first.name} is the largest gap that exceeds its error, but the {names} may be as large."

    __repr__ = __str__

    def _repr_html_(self) -> str:
        above = html_lines([f"{warning}." for warning in self.warnings], self.verdict, ())
        without = "".join(f"<p>{escape(line)}</p>" for line in self.caveats)
        findings = "".join(f"<li>{escape(str(finding))}</li>" for finding in self.findings)
        notes = html_lines((), "", [f"{remark}." for remark in self.remarks])
        return f'<div class="pyrogaps">{above}{without}<ol>{findings}</ol>{notes}</div>'


def diagnosis(
    gaps: xr.Dataset, warnings: tuple[str, ...], *, finite: bool = True, remarks: tuple[str, ...] = ()
) -> Diagnosis:
    """The leaves of a ledger's tree of gaps, ranked; see `Diagnosis`."""
    total = _size(gaps.sel(gap=root(gaps)))
    findings = sorted((_finding(gaps.sel(gap=name), total) for name in leaves(gaps)), key=lambda f: -f.nats)
    first, others = findings[0], findings[1:]
    dominant = first.certain and all(_exceeds(first, other) for other in others)
    return Diagnosis(tuple(findings), first.gap if dominant else None, warnings, finite, total, remarks)


def _finding(row: xr.Dataset, total: tuple[float, float]) -> Finding:
    nats, error = _size(row)
    share = nats / total[0] if total[0] > CERTAIN * total[1] else float("nan")
    words = (str(row[name].item()) for name in ("label", "cause", "remedy"))
    return Finding(str(row["gap"].item()), nats, error, share, *words)


def _size(row: xr.Dataset) -> tuple[float, float]:
    """Mean of a gap and its standard error over datapoints and draws, nats."""
    return float(row["mean"]), combined_error(row["standard_error"], row["mcse"])


def _without_shares(nats: float, error: float) -> Iterator[str]:
    """Why there are no shares of an inference gap; nothing where there are."""
    size = f"The inference gap is {nats:.3f} ± {error:.3f} nats"
    if nats < -CERTAIN * error:
        yield f"{size}: negative, so log p(x) is measured too low. Spend more on evidence before you trust any gap."
    elif nats <= CERTAIN * error:
        yield f"{size}: not larger than its error, so no gap is given as a share of it."


def _exceeds(first: Finding, other: Finding) -> bool:
    return first.nats - other.nats > CERTAIN * float(np.hypot(first.error, other.error))
