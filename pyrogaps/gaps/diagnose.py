"""What a ledger says to do: its gaps ranked by nats, with what usually closes each and the evidence it rests on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np
import xarray as xr

from pyrogaps.evidence.reliability import UNEXAMINED
from pyrogaps.gaps.savings import Saving
from pyrogaps.gaps.terms import APPROXIMATION, CERTAIN, RICHER, combined_error, leaves_below, ranked, root
from pyrogaps.tables import html_lines, number

Doubts = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Finding:
    """A gap: its mean and error, nats, and its share of the inference gap; NaN where that is not larger than its error.

    The error combines the standard error over datapoints with the Monte Carlo error: the root of the sum of their
    squares. `gap` is the id of its term, `name` its label. `parent` is the id of the gap that it is ranked within;
    empty for those of the first rank. `doubt` is why there is no verdict on it; empty where there is one. `measured`
    is what further families would save of it.
    """

    gap: str
    nats: float
    error: float
    share: float
    name: str
    cause: str
    remedy: str
    parent: str = ""
    doubt: str = ""
    measured: str = ""

    @property
    def certain(self) -> bool:
        """Whether the gap can be trusted and exceeds its error."""
        return not self.doubt and self.nats > CERTAIN * self.error

    def __str__(self) -> str:
        if np.isnan(self.nats):
            return f"{self.name}: not measured"
        share = "" if np.isnan(self.share) else f" ({self.share:.0%})"
        size = f"{self.name} {number(self.nats, 3)} ± {self.error:.3f} nats{share}"
        measured = f" Measured: {self.measured}." if self.measured else ""
        if self.doubt:
            return f"{size}: no verdict, because {self.doubt}" + f".{measured}" * bool(measured)
        if not self.certain:
            return f"{size}: not larger than its error"
        remedy = f" What usually helps: {self.remedy}." if self.remedy else ""
        return f"{size}: {self.cause or 'a large gap'}.{remedy}{measured}"


@dataclass(frozen=True)
class Diagnosis:
    """What cannot be trusted in a ledger, and its gaps, the largest first; `print` it.

    Ranked are the approximation, conditioning and amortization gap, and the global gap where datapoints share latents.
    The parts of a split amortization gap are ranked within it, so that a split does not change the verdict.

    Attributes:
        findings: ranked by nats; each is followed by its parts, ranked too, whose `parent` it is.
        dominant: the id of the largest gap, where it exceeds zero and the next by two standard errors; else None.
            Without a verdict, because too few datapoints can be trusted, it is None.
        warnings: reasons not to trust the numbers.
        finite: whether all datapoints have finite bounds; the gaps are means over those that have.
        total: the inference gap and its error, nats.
        remarks: what of model and guide is left out of the numbers.
        doubts: why there is no verdict, each with its remedy; empty where there is one.
        savings: what each further family would save of the approximation gap, the largest first.
        examined: whether the evidence says where log p(x) can be trusted.
        of_trusted: without a verdict on all datapoints, the number of those that can be trusted, if they are half of
            them or more, and the verdict on these.
    """

    findings: tuple[Finding, ...]
    dominant: str | None
    warnings: tuple[str, ...]
    finite: bool = True
    total: tuple[float, float] = (float("nan"), float("nan"))
    remarks: tuple[str, ...] = ()
    doubts: tuple[tuple[str, str], ...] = ()
    savings: tuple[Saving, ...] = ()
    examined: bool = True
    of_trusted: tuple[int, str] | None = None

    def __str__(self) -> str:
        warnings = (f"Warning: {warning}." for warning in self.warnings)
        return "\n".join([*warnings, self.ranking, *(f"Note: {note}." for note in self._notes)])

    @property
    def _notes(self) -> tuple[str, ...]:
        return self.remarks if self.examined else (*self.remarks, UNEXAMINED)

    def dominant_within(self, gap: str) -> str | None:
        """The id of the largest part of a gap, as `dominant` among its parts."""
        return _dominant(self.within(gap))

    def within(self, gap: str = "") -> list[Finding]:
        """The parts of a gap, the largest first; by default the gaps of the first rank."""
        return [finding for finding in self.findings if finding.parent == gap]

    @property
    def ranking(self) -> str:
        """The verdict and the gaps, the largest first, without warnings and notes."""
        return "\n".join([self.verdict, *self.caveats, *self._ranked()])

    def _ranked(self) -> Iterator[str]:
        for place, finding in enumerate(self.within(), 1):
            yield f"{place}. {finding}"
            yield from (f"   - {part}" for part in self.within(finding.gap))

    @property
    def caveats(self) -> tuple[str, ...]:
        """Why there are no shares of the inference gap; none where there are."""
        return () if self.doubts or self.negative else (*_without_shares(*self.total),)

    @property
    def negative(self) -> bool:
        """Whether the inference gap is negative beyond its error, which no true one is."""
        return _is_negative(*self.total)

    @property
    def verdict(self) -> str:
        """Which gap dominates, in one sentence, and in another which of its parts."""
        if not self.finite:
            return "Not all datapoints have finite bounds: see the warning above before any gap of the others."
        if self.negative:
            return " ".join(_without_shares(*self.total))
        if self.doubts:
            reasons, remedies = zip(*self.doubts, strict=True)
            words = [f"No verdict: {' and '.join(reasons)}.", *(f"{remedy}." for remedy in remedies)]
            if self.of_trusted:
                trusted, verdict = self.of_trusted
                words.append(f"Of the {trusted:,} that can be trusted: {verdict[:1].lower()}{verdict[1:]}")
            return " ".join(words)
        first = _sentence(self.within()) or "no gap exceeds its error: these data show no loss from inference"
        sentences = [f"{first[:1].upper()}{first[1:]}."]
        for finding in self.within():
            if finding.certain and (parts := self.within(finding.gap)):
                sentences.append(f"Within the {finding.name}, {_sentence(parts) or 'no part exceeds its error'}.")
        return " ".join(sentences)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        above = html_lines([f"{warning}." for warning in self.warnings], self.verdict, ())
        without = "".join(f"<p>{escape(line)}</p>" for line in self.caveats)
        findings = "".join(f"<li>{escape(str(finding))}{self._html_parts(finding)}</li>" for finding in self.within())
        notes = html_lines((), "", [f"{note}." for note in self._notes])
        return f'<div class="pyrogaps">{above}{without}<ol>{findings}</ol>{notes}</div>'

    def _html_parts(self, finding: Finding) -> str:
        parts = "".join(f"<li>{escape(str(part))}</li>" for part in self.within(finding.gap))
        return f"<ul>{parts}</ul>" if parts else ""


def diagnosis(
    gaps: xr.Dataset,
    warnings: tuple[str, ...],
    *,
    finite: bool = True,
    remarks: tuple[str, ...] = (),
    doubts: Doubts | None = None,
    savings: Sequence[Saving] = (),
    examined: bool = True,
) -> Diagnosis:
    """The gaps of a ledger, ranked; see `Diagnosis`. `doubts` has reasons why there is no verdict on a gap, with their
    remedies, by the gap's id.
    """
    doubts, whole, names = doubts or {}, root(gaps), ranked(gaps)
    total = _size(gaps.sel(gap=whole))
    known = {name: doubts.get(name, {}) for name in (whole, *names)}
    nats = float("nan") if known[whole] or total[0] <= CERTAIN * total[1] else total[0]

    def ordered(names: Sequence[str], parent: str = "") -> list[Finding]:
        found = [_finding(gaps.sel(gap=name), nats, parent, known[parent or name], savings) for name in names]
        return sorted(found, key=lambda finding: -finding.nats)

    first, findings = ordered(names), list[Finding]()
    for own in first:
        parts = ordered(leaves_below(gaps, own.gap), own.gap)
        findings += [replace(own, remedy="") if parts else own, *parts]  # the remedies are those of the parts
    reasons = {reason: remedy for of_gap in known.values() for reason, remedy in of_gap.items()}
    dominant = None if reasons or _is_negative(*total) else _dominant(first)
    known_reasons = tuple(reasons.items())
    return Diagnosis(
        tuple(findings), dominant, warnings, finite, total, remarks, known_reasons, tuple(savings), examined
    )


def _finding(
    row: xr.Dataset, total: float, parent: str, doubts: Mapping[str, str], savings: Sequence[Saving]
) -> Finding:
    nats, error = _size(row)
    gap, label, cause, remedy = (str(row[name].item()) for name in ("gap", "label", "cause", "remedy"))
    share, measured = float("nan") if doubts else nats / total, ""
    if gap == APPROXIMATION and savings:
        measured = "; ".join(map(str, savings))
        if any(not saving.same for saving in savings):
            remedy = RICHER if any(saving.certain for saving in savings) else f"{RICHER} than those measured"
    return Finding(gap, nats, error, share, label, cause, remedy, parent, " and ".join(doubts), measured)


def _size(row: xr.Dataset) -> tuple[float, float]:
    """Mean of a gap and its standard error over datapoints and draws, nats."""
    return float(row["mean"]), combined_error(row["standard_error"], row["mcse"])


def _is_negative(nats: float, error: float) -> bool:
    """Whether an inference gap is negative beyond its error, which no true one is."""
    return nats < -CERTAIN * error


def _without_shares(nats: float, error: float) -> Iterator[str]:
    """Why there are no shares of an inference gap; nothing where there are."""
    size = f"The inference gap is {number(nats, 3)} ± {error:.3f} nats"
    if _is_negative(nats, error):
        yield f"{size}: negative, so log p(x) is measured too low. Spend more on evidence before you trust any gap."
    elif nats <= CERTAIN * error:
        yield f"{size}: not larger than its error, so no gap is given as a share of it."


def _dominant(findings: Sequence[Finding]) -> str | None:
    """The id of the first finding, where it is certain and exceeds the others."""
    if not findings or not findings[0].certain:
        return None
    first, *others = findings
    return first.gap if all(_exceeds(first, other) for other in others) else None


def _sentence(findings: Sequence[Finding]) -> str:
    """Which of the gaps, the largest first, dominates; empty where none exceeds its error."""
    if _dominant(findings) is not None:
        return f"mostly the {findings[0].name}"
    certain = [finding for finding in findings if finding.certain]
    if not certain:
        return ""
    first = certain[0]
    rivals = [finding for finding in findings if finding is not first and not _exceeds(first, finding)]
    if all(finding.certain for finding in rivals):
        return f"no single cause: {_listed([first, *rivals])} differ by less than two standard errors"
    return f"the {first.name} is the largest gap that exceeds its error, but {_listed(rivals)} may be as large"


def _listed(findings: Sequence[Finding]) -> str:
    *before, last = (f"the {finding.name}" for finding in findings)
    return f"{', '.join(before)} and {last}" if before else last


def _exceeds(first: Finding, other: Finding) -> bool:
    return first.nats - other.nats > CERTAIN * float(np.hypot(first.error, other.error))
