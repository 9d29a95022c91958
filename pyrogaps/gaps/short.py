"""The printed ledger: log p(x), the ELBOs, the tree of gaps in plain words, and what to conclude."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyrogaps.errors import counted
from pyrogaps.evidence.reliability import MAX_SHARE_UNRELIABLE, UNEXAMINED, is_exact, is_examined
from pyrogaps.gaps.diagnose import Diagnosis
from pyrogaps.gaps.flags import UPPER, WITHIN, agreement, doubts_of, on_finite_part, within_error
from pyrogaps.gaps.savings import Saving
from pyrogaps.gaps.selection import UNTRUSTED, checks_of, converged_of
from pyrogaps.gaps.table import (
    EVIDENCE,
    FURTHER,
    GIVEN_SHARED,
    TOTAL,
    Parts,
    given_shared,
    guide_name,
    number_of,
    remarks_of,
)
from pyrogaps.gaps.terms import CERTAIN, combined_error, ids, tree_labels
from pyrogaps.tables import MAX_DECIMALS, Table, number, sentence

ROUNDING = 1e-9  # nats; what sums over states leave as an error
PASSED = {"finite": "finite bounds", "converged": "refinement converged", "reliable": "log p(x) reliable"}
MORE = 'More: print(ledger.diagnose()), print(ledger.table("full")), ledger.report("gaps.html")'


class Row(NamedTuple):
    """A row: its label, its mean or the two bounds between which that lies, an error, in nats, words, and a total."""

    label: str
    values: tuple[float, ...]
    error: float
    words: str = ""
    total: str = ""


def short_table(parts: Parts, diagnosis: Diagnosis) -> Table:
    """The ledger at one look. What withdraws trust is in it; how each number was measured is in the full table."""
    rows = [[*_bounds(parts)], [*_gaps(parts)], [*_families(parts, diagnosis.savings)]]
    whole = max(_whole(row.values[0]) for group in rows for row in group)
    decimals = [_decimals(rows[0]), *[_decimals([*rows[1], *rows[2]])] * 2]
    groups = [
        [[row.label, _figures(row, whole, places), *[row.total] * len(parts.totals), row.words] for row in group]
        for group, places in zip(rows, decimals, strict=True)
    ]
    if parts.totals:
        groups[0].insert(0, ["", "per datapoint", "data set [95% interval]", ""])
    if groups[2]:
        groups[2].insert(0, ["other families", "gap left", *[""] * (len(groups[2][0]) - 2)])
    remarks = remarks_of(parts.per_datapoint, parts.provenance)
    remarks += [] if is_examined(parts.per_datapoint) else [UNEXAMINED]
    notes = [f"Note: {sentence(line)}" for line in remarks]
    return Table(
        _title(parts.provenance),
        (),
        [group for group in groups if group],
        [*map(sentence, diagnosis.warnings)],
        conclusion(diagnosis),
        lines=[*map(sentence, parts.certificate), *notes, f"Checks: {' · '.join(_checks(parts))}", MORE],
    )


def conclusion(diagnosis: Diagnosis) -> str:
    """The verdict of a diagnosis, what limits it, and the next call for the gap that dominates, or for its part."""
    dominant = diagnosis.dominant
    dominant = dominant and (diagnosis.dominant_within(dominant) or dominant)
    remedies = [finding.remedy for finding in diagnosis.findings if finding.gap == dominant]
    advice = [f"What usually helps: {remedy}." for remedy in remedies if remedy]
    return " ".join([diagnosis.verdict, *diagnosis.caveats, *advice])


def _title(provenance: dict[str, Any]) -> str:
    data = number_of(provenance) + ("" if provenance["dim"] else ", all latents discrete")
    if shared := provenance.get("shared"):
        errors = f"mean ± standard error over datapoints and {shared['num_draws']} draws of {shared['names']}"
    elif provenance["num_datapoints"] > 1:
        errors = "mean ± standard error over datapoints"
    else:
        return f"Inference gap of {data} (nats ± Monte Carlo standard error)"
    return f"Inference gaps of {data} (nats, {errors})"


def _bounds(parts: Parts) -> Iterator[Row]:
    """log p(x), and the ELBOs whose differences the gaps are."""
    values, words = _evidence(parts)
    yield _row(parts, "log_evidence", GIVEN_SHARED if parts.totals else EVIDENCE, words)._replace(values=values)
    labels = {"elbo_refined[own]": "ELBO, refined guide", "elbo_shared": "ELBO, best for its inputs"}
    for name, label in {**labels, "elbo": f"ELBO, {guide_name(parts.provenance)}"}.items():
        if name in parts.summary.index:
            yield _row(parts, name, label)


def _evidence(parts: Parts) -> tuple[tuple[float, ...], str]:
    """The mean of log p(x), or the bounds that it lies between, and what is known of it."""
    row = parts.row("log_evidence")
    values: tuple[float, ...] = (row["mean"],)
    known = str(row["direction"]).replace(f" of {EVIDENCE}", "")
    words = f"{known}: {row['estimator']}"
    if known == "lower bound":
        known = "a lower bound"
        if UPPER in parts.summary.index:
            unbounded = int(np.isposinf(parts.per_datapoint[UPPER].values).sum())
            known += f", without an upper one at {counted(unbounded, 'datapoint')}" * bool(unbounded)
            if not unbounded and np.isfinite(row["mean"]):
                values = (row["mean"], parts.row(UPPER)["mean"])
                same = len({number(value, 2) for value in values}) == 1
                known = "two bounds that agree to 0.01 nats" if same else "between two bounds"
                known = agreement(parts.summary) or known
        words = f"{known} ({row['estimator']})"
    unexamined = _can_miss_modes(parts) and not _num_examined(parts)
    return values, words + "; not examined for further modes" * unexamined


def _gaps(parts: Parts) -> Iterator[Row]:
    """The tree of gaps: of each what a large one says, or why this one says little."""
    labels = tree_labels(parts.gaps)
    for name in ids(parts.gaps):
        term = parts.gaps.sel(gap=name)
        brief = str(term["brief"].item()) if "brief" in term else ""  # which older files lack
        words, mean = brief or str(term["cause"].item()), parts.row(name)["mean"]
        if within_error(parts.row(name)):
            words = WITHIN
        elif not mean > 0:
            words = "not measured" if np.isnan(mean) else "negative beyond its error"
        yield _row(parts, name, given_shared(labels[name], name, parts.provenance), words)


def _families(parts: Parts, savings: Sequence[Saving]) -> Iterator[Row]:
    """The approximation gaps of further families, and what each would gain over the guide's own."""
    of_families = {saving.family: saving for saving in savings}
    for name in (str(key) for key in parts.summary.index if str(key).startswith(FURTHER)):
        family = name[len(FURTHER) : -1]
        words = [WITHIN] * within_error(parts.row(name))
        words += [_gain(of_families[family])] * (family in of_families)
        yield _row(parts, name, family, "; ".join(filter(None, words)))


def _gain(saving: Saving) -> str:
    """What a further family would gain over the guide's own, in a few words."""
    if saving.same:
        return "this is the guide's own family"
    if not math.isfinite(saving.nats):
        return ""
    if abs(saving.nats) <= CERTAIN * saving.error:
        return "no gain over the guide's own family"
    return f"{abs(saving.nats):.2f} nats {'better' if saving.nats > 0 else 'worse'} than the guide's own family"


def _row(parts: Parts, name: str, label: str, words: str = "") -> Row:
    """A row of the summary: after the words what cannot be trusted at many datapoints."""
    row, doubts = parts.row(name), [doubt for doubt, share in doubts_of(parts, name) if share > MAX_SHARE_UNRELIABLE]
    known = np.isfinite(row["standard_error"]) and not parts.totals  # with shared latents, the errors of draws too
    error = row["standard_error"] if known else combined_error(row["standard_error"], row["mcse"])
    words = "; ".join(filter(None, [on_finite_part(parts, name), words, *doubts]))
    return Row(label, (row["mean"],), error, words, _total(parts, name))


def _total(parts: Parts, name: str) -> str:
    """Of the data set, with its 95% interval where there is one."""
    if not parts.totals:
        return ""
    total = number(parts.row(name)[TOTAL], 2)
    if name not in ids(parts.gaps) or "total_low" not in parts.gaps:
        return total
    low, high = (float(parts.gaps[f"total_{end}"].sel(gap=name)) for end in ("low", "high"))
    if np.isposinf(high):
        return f"at least {number(max(low, 0.0) if np.isfinite(low) else parts.row(name)[TOTAL], 2)}"
    return f"{total} [{number(low, 2)}, {number(high, 2)}]" if np.isfinite([low, high]).all() else total


def _checks(parts: Parts) -> Iterator[str]:
    """What was checked, and how many datapoints passed."""
    exact = is_exact(parts.row("log_evidence")["direction"])
    for name, passes in sorted(checks_of(parts.per_datapoint).items()):
        if name == "converged" or not passes.all() or (name == "reliable" and not exact):
            yield f"{given_shared(PASSED[name], name, parts.provenance)} {passes.sum():,}/{len(passes):,}"
    for family in map(str, parts.per_datapoint["family"].values[1:]):
        if not (passes := converged_of(parts.per_datapoint, family)).all():
            yield f"refinement of {family} converged {passes.sum():,}/{len(passes):,}"
    if not is_examined(parts.per_datapoint):
        yield given_shared(UNTRUSTED["examined"], "reliable", parts.provenance)
    examined = parts.provenance.get("examined")
    if _can_miss_modes(parts) and examined is not None and examined["number"]:
        gains = [examined["log_evidence"], *examined["refined"].values()]
        missed = max((gain["count"] for gain in gains if gain), default=0)
        number_examined = f"{examined['number']:,} examined"
        yield f"modes missed at {missed:,} of {number_examined}" if missed else f"no missed modes in {number_examined}"
    elif _can_miss_modes(parts) and not _num_examined(parts):
        yield "not examined for further modes"
    largest = float(np.nan_to_num(parts.gaps["mcse"].values, nan=0.0, posinf=0.0).max())
    if largest > ROUNDING:
        digit = 10.0 ** math.floor(math.log10(largest))
        yield f"Monte Carlo error at most {math.ceil(largest / digit - 1e-9) * digit:.1g} nats"


def _can_miss_modes(parts: Parts) -> bool:
    """Whether log p(x) is an integral that is not known exactly."""
    return bool(parts.provenance["dim"]) and not is_exact(parts.row("log_evidence")["direction"])


def _num_examined(parts: Parts) -> int:
    """How many of these datapoints were examined from other starts."""
    return int(parts.per_datapoint["examined"].sum()) if "examined" in parts.per_datapoint else 0


def _decimals(rows: Sequence[Row]) -> int:
    """Those that show the errors of rows: one more than the largest needs, if others need more."""
    needed = [max(2, math.ceil(-math.log10(row.error))) for row in rows if 0 < row.error < math.inf]
    return min(MAX_DECIMALS, min(needed, default=2) + 1, max(needed, default=2))


def _figures(row: Row, whole: int, decimals: int) -> str:
    """Values and error of a row as text, the whole part of the first one `whole` wide."""
    figures = [*dict.fromkeys(number(float(value), decimals) for value in row.values)]  # bounds may agree
    error = f" ± {row.error:.{decimals}f}" if np.isfinite([row.error, row.values[0]]).all() else ""
    return " " * (whole - _whole(row.values[0])) + " … ".join(figures) + error


def _whole(value: float) -> int:
    """How many characters the whole part of a number takes."""
    return len(number(float(value), 2).partition(".")[0])
