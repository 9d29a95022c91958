"""A ledger against the truth: errors, stated errors and flags, of means and of every datapoint declared reliable."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.trust.problem import Bounds
from pyrogaps import GapLedger
from pyrogaps.gaps.terms import values_of
from pyrogaps.log_weights import Estimate

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

# Confidently wrong: off by more than this many stated errors and this many nats, without a flag.
ERRORS, NATS = 4.0, 0.03
# False alarm: a flag on the mean of an easy problem that is right within this many stated errors and `NATS`.
RIGHT_ERRORS = 2.0
# Where intervals are counted, an error of this many nats is no error where the stated one is no larger.
NEGLIGIBLE = 1e-3

LABELS = {"log_evidence": "log p(x)", "elbo": "L[q]", "elbo_refined": "L[q*]", "elbo_shared": "L[q*_C]"}
# What a gap is a difference of. A flag on a part is a flag on the gap.
PARTS = {
    "inference_gap": ("log_evidence", "elbo"),
    "approximation_gap": ("log_evidence", "elbo_refined"),
    "conditioning_gap": ("elbo_refined", "elbo_shared"),
    "amortization_gap": ("elbo_target", "elbo"),
    "guide_optimization_gap": ("elbo_refined", "elbo"),
}
# A warning names a quantity by one of these; lower case.
NAMES = {
    "log_evidence": ("log p(x)",),
    "elbo": ("l[q] ",),
    "elbo_refined": ("l[q*]", "refinement", "refined"),
    "elbo_shared": ("q*_c",),
    "inference_gap": ("inference gap",),
    "approximation_gap": ("approximation gap",),
    "conditioning_gap": ("conditioning gap",),
    "amortization_gap": ("amortization gap",),
    "guide_optimization_gap": ("optimization gap",),
}
# The column that declares a datapoint's value reliable.
DECLARED = {"log_evidence": "log_evidence_reliable", "elbo_refined": "converged", "elbo_shared": "shared_converged"}
# What other starts found wanting, a warning calls by this; no column says so of those that were not examined.
OTHER_STARTS = "l[q*]"
LEDGER, ALONE = "decompose", "log_evidence"


@dataclass(frozen=True)
class Judgement:
    """One quantity of one run.

    Attributes:
        call: `decompose` or `log_evidence`.
        truth, estimate, error, stated: of the mean over datapoints, nats; of `log_evidence` over those it declares
            reliable.
        flagged: whether a warning names the quantity.
        wrong, false_alarm: of the mean.
        number, declared: datapoints, and how many of them are declared reliable.
        wrong_datapoints: of those declared, off by more than 4 stated errors and 0.03 nats; `worst` is the largest
            such error in nats and `worst_stated` what was stated there, or the largest error where none is wrong.
        comparable: of those declared, whose 4 stated errors exceed 0.03 nats, so that chance alone can fail them.
        covered: of those declared, whose 95% interval holds the truth.
        outside: of those declared, outside of [lower - 4 s.e., upper + 4 s.e.]; of log p(x) alone.
    """

    call: str
    quantity: str
    truth: float
    estimate: float
    error: float
    stated: float
    flagged: bool
    wrong: bool
    false_alarm: bool
    number: int
    declared: int
    wrong_datapoints: int
    worst: float
    worst_stated: float
    comparable: int
    covered: int
    outside: int


@dataclass(frozen=True)
class Values:
    """Values `(N,)` of one quantity, their stated errors, which are declared reliable, and 95% intervals."""

    value: Array
    mcse: Array
    declared: Mask
    low: Array
    high: Array
    upper: Array | None = None
    upper_mcse: Array | None = None


def of_ledger(ledger: GapLedger, log_evidence: Tensor, bounds: Bounds, *, easy: bool) -> Iterator[Judgement]:
    """Every quantity that has a truth."""
    truths, warned = known(log_evidence, bounds), warnings_of(ledger)
    for quantity, truth in truths.items():
        if quantity not in ledger.per_datapoint:
            continue
        flagged = any(named(part, warned) for part in _with_parts(quantity, truths))
        values = _values(ledger, quantity, truths, doubted=any(OTHER_STARTS in text for text in warned))
        yield judged(LEDGER, quantity, values, truth, flagged=flagged, easy=easy)


def of_estimate(estimate: Estimate, log_evidence: Tensor) -> Judgement:
    """`log_evidence`'s own answer: the mean over the datapoints that it declares reliable."""
    low, high = (end.numpy() for end in estimate.interval())
    values = Values(estimate.value.numpy(), estimate.mcse.numpy(), estimate.reliable.numpy(), low, high)
    return judged(ALONE, "log_evidence", values, _array(log_evidence), flagged=False, easy=False)


def known(log_evidence: Tensor, bounds: Bounds) -> dict[str, Array]:
    """The truth of every quantity there is one of, `(N,)`."""
    given = {"log_evidence": log_evidence, **vars(bounds)}
    truths = {name: _array(value) for name, value in given.items() if value is not None}
    aliases = truths | {"elbo_target": truths.get("elbo_shared", truths.get("elbo_refined"))}
    for gap, (upper, lower) in PARTS.items():
        if aliases.get(upper) is not None and lower in truths:
            truths[gap] = aliases[upper] - truths[lower]
    return truths


def warnings_of(ledger: GapLedger) -> list[str]:
    """What the diagnosis and the table warn of, in lower case."""
    of_table = [line for line in str(ledger).splitlines() if line.lower().startswith("warning")]
    return [text.lower() for text in (*ledger.diagnose().warnings, *of_table)]


def named(quantity: str, warned: list[str]) -> bool:
    return any(name in text for name in NAMES[quantity] for text in warned)


def judged(call: str, quantity: str, found: Values, truth: Array, *, flagged: bool, easy: bool) -> Judgement:
    """One quantity against its truth."""
    kept = found.declared if call == ALONE else np.ones_like(found.declared)
    size = max(int(kept.sum()), 1)
    means = (float(values[kept].sum()) / size if kept.any() else np.nan for values in (truth, found.value))
    right, estimate = means
    error, stated = estimate - right, float(np.sqrt((found.mcse[kept] ** 2).sum())) / size
    off = found.value - truth
    wrong = found.declared & _off(off, found.mcse)
    among = wrong if wrong.any() else found.declared
    worst = int(np.argmax(np.where(among, np.abs(off), -1.0)))
    inside = (found.low <= truth) & (truth <= found.high)
    inside |= (np.abs(off) <= NEGLIGIBLE) & (found.mcse <= NEGLIGIBLE)
    return Judgement(
        call,
        quantity,
        right,
        estimate,
        error,
        stated,
        flagged,
        bool(kept.any() and _off(error, stated)) and not flagged,
        easy and flagged and abs(error) <= min(NATS, RIGHT_ERRORS * stated),
        len(truth),
        int(found.declared.sum()),
        int(wrong.sum()),
        float(off[worst]) if among.any() else np.nan,
        float(found.mcse[worst]) if among.any() else np.nan,
        int((found.declared & (ERRORS * found.mcse > NATS)).sum()),
        int((found.declared & inside).sum()),
        int((found.declared & _outside(found, truth)).sum()),
    )


def _values(ledger: GapLedger, quantity: str, truths: dict[str, Array], *, doubted: bool) -> Values:
    """A quantity's columns. Where L[q*] is `doubted`, datapoints that were not examined are not declared reliable."""
    data = ledger.per_datapoint
    value, mcse = values_of(data, quantity)
    declared = np.ones(len(value), dtype=bool)
    for part in _with_parts(quantity, truths):
        if part in DECLARED:
            column = data[DECLARED[part]]
            declared &= (column.isel(family=0) if "family" in column.dims else column).values == 1
    if doubted and "elbo_refined" in _with_parts(quantity, truths) and "examined" in data:
        declared &= data["examined"].values == 1
    if quantity != "log_evidence":
        return Values(value, mcse, declared, value - 1.96 * mcse, value + 1.96 * mcse)
    names = ("log_evidence_low", "log_evidence_high", "log_evidence_upper", "log_evidence_upper_mcse")
    return Values(value, mcse, declared, *(data[name].values if name in data else None for name in names))  # type: ignore[arg-type]


def _with_parts(quantity: str, truths: dict[str, Array]) -> list[str]:
    """A quantity, and what it is a difference of."""
    target = "elbo_shared" if "elbo_shared" in truths else "elbo_refined"
    parts = (target if part == "elbo_target" else part for part in PARTS.get(quantity, ()))
    return [quantity, *parts]


def _off(error: Array | float, stated: Array | float) -> Mask:
    # A value that is not a number is off.
    return np.asarray(~(np.abs(error) <= np.maximum(NATS, ERRORS * np.nan_to_num(stated))))


def _outside(found: Values, truth: Array) -> Mask:
    if found.upper is None or found.upper_mcse is None:
        return np.zeros_like(found.declared)
    below = truth < found.value - ERRORS * found.mcse - NEGLIGIBLE
    return below | (truth > found.upper + ERRORS * np.nan_to_num(found.upper_mcse) + NEGLIGIBLE)


def _array(value: Tensor) -> Array:
    return value.detach().to(torch.float64).numpy()
