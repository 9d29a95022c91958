"""The table of datapoints: its columns, and the flags of datapoints whose numbers need a second look."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pyrogaps.gaps import GapLedger
from pyrogaps.gaps.finite import is_finite
from pyrogaps.gaps.selection import UNTRUSTED, checks_of
from pyrogaps.gaps.table import EVIDENCE, GIVEN_SHARED, label_of, last_gap
from pyrogaps.gaps.terms import INFERENCE, ids
from pyrogaps.plots.source import OWN

DECIMALS = 4  # of the embedded numbers; the page shows three
DIGITS = 3  # of their errors
MAX_ROWS = 10_000
CERTAIN = 4.0  # Monte Carlo errors below zero at which a gap cannot be chance, of thousands
BOUNDS = ("log_evidence", "elbo_refined", "elbo_shared", "elbo")


@dataclass(frozen=True)
class Column:
    """A quantity of every datapoint and its Monte Carlo error, `(N,)` each."""

    id: str
    label: str
    description: str
    value: NDArray[np.float64]
    mcse: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Flag:
    """A remark on datapoints, and which have it, `(N,)`. A `serious` one says that a number cannot be trusted."""

    id: str
    label: str
    description: str
    holds: NDArray[np.bool_]
    serious: bool = True


def columns_of(ledger: GapLedger) -> list[Column]:
    """The gaps in the order of the tree, the bounds that they are differences of, the other families' gaps, k-hat."""
    return [*_columns(ledger)]


def _columns(ledger: GapLedger) -> Iterator[Column]:
    data, provenance = ledger.per_datapoint, ledger.provenance

    def column(id: str, label: str, description: str, name: str, family: str | None = None) -> Column:
        pair = [_values(data, variable, family) for variable in (name, f"{name}_mcse") if variable in data]
        if "shared" in provenance:
            label, description = (text.replace(EVIDENCE, GIVEN_SHARED) for text in (label, description))
        return Column(id, label, description, *pair)

    for name in ids(ledger.gaps):
        if name in data:
            row = ledger.gaps.sel(gap=name)
            words = f"{row['direction'].item()}: {row['estimator'].item()}"
            yield column(name, str(row["label"].item()), words, name)
    for name in BOUNDS:
        if name in data:
            quantity = provenance["quantities"][name]
            label = label_of(f"{name}[{OWN}]" if name == "elbo_refined" else name, provenance)
            yield column(name, label, f"{quantity['direction']}: {quantity['estimator']}", name)
    for family in ledger.families[1:]:
        name = f"approximation_gap[{family}]"
        words = "log p(x) - L[q*] of this family"
        yield column(name, label_of(name, provenance), words, "family_approximation_gap", family)
    if "khat" in data and provenance["dim"]:
        yield column("khat", "k-hat", "Pareto shape of the guide's importance weights; below 0.7 is good", "khat")


def _values(data: xr.Dataset, name: str, family: str | None = None) -> NDArray[np.float64]:
    """A column, of the guide's own family where it has one for each and none is named."""
    column = data[name]
    if "family" in column.dims:
        column = column.isel(family=0) if family is None else column.sel(family=family)
    return np.asarray(column.values, dtype=float)


def flags_of(ledger: GapLedger) -> list[Flag]:
    """The flags that any datapoint has."""
    return [flag for flag in _flags(ledger) if flag.holds.any()]


def _flags(ledger: GapLedger) -> Iterator[Flag]:
    data, last = ledger.per_datapoint, last_gap(ledger.provenance)
    fails = {name: ~passes for name, passes in checks_of(data).items()}
    yield Flag(
        "infinite", "no finite bounds", "log p(x) or an ELBO is -infinity; left out of all means", fails["finite"]
    )
    if "reliable" in fails:
        words = "log p(x), and with it the inference gap, may be too low, or its error too small"
        yield Flag("unreliable", UNTRUSTED["reliable"], words, fails["reliable"])
    else:
        words = "the evidence does not say where the error of log p(x) can be trusted"
        yield Flag("unexamined", UNTRUSTED["examined"], words, np.ones_like(fails["finite"]), serious=False)
    if "log_evidence_doubted" in data:
        words = "other starts found modes at datapoints like this one; log p(x) may be too low"
        yield Flag("modes", "modes may be missed", words, data["log_evidence_doubted"].values.astype(bool))
    if INFERENCE in data:
        gap, error = _values(data, INFERENCE), _values(data, f"{INFERENCE}_mcse")
        with np.errstate(invalid="ignore"):
            below = np.asarray(gap < -CERTAIN * error)
        yield Flag("negative", "negative gap", "log p(x) is measured too low: no inference gap is negative", below)
    if "converged" in fails:
        words = f"the approximation gap is too large, and the {last} too small"
        yield Flag("moving", "refinement not converged", words, fails["converged"])
        words = "the gap of another family than the guide's is too large"
        others = np.asarray((~data["converged"].values[:, 1:].astype(bool)).any(1))
        yield Flag("others-moving", "other family not converged", words, others, serious=False)
    if "shared_converged" in data:
        words = "q*_C is not the best guide of what is shown: the conditioning gap is too large"
        moving = data["shared_converged"].values.astype(float) < 1
        yield Flag("shared-moving", "shared posterior not converged", words, moving)
    if "khat" in data and ledger.provenance["dim"]:
        with np.errstate(invalid="ignore"):
            heavy = data["khat"].values.astype(float) > 0.7
        yield Flag("khat", "k-hat above 0.7", "IWAE is unreliable here; no gap uses it", heavy, serious=False)
    if "examined" in data and not data["examined"].values.astype(bool).all():
        examined = data["examined"].values.astype(bool)
        yield Flag("examined", "examined", "searched for further modes from other starts", examined, serious=False)


def rows_of(ledger: GapLedger) -> NDArray[np.int64]:
    """The positions of the datapoints on the page: all, or those without finite bounds and with the largest gaps."""
    data = ledger.per_datapoint
    number = data.sizes["datapoint"]
    if number <= MAX_ROWS:
        return np.arange(number)
    gap = np.where(is_finite(data), _values(data, INFERENCE), np.inf)
    return np.sort(np.argsort(-gap, kind="stable")[:MAX_ROWS])


def table_of(ledger: GapLedger, rows: NDArray[np.int64], flags: Sequence[Flag]) -> dict[str, Any]:
    """Columns and flags of the datapoints `rows`, as plain values for JSON."""
    columns = columns_of(ledger)
    bits = np.zeros(len(rows), dtype=np.int64)
    for place, flag in enumerate(flags):
        bits |= flag.holds[rows].astype(np.int64) << place
    return {
        "datapoints": ledger.per_datapoint["datapoint"].values[rows].tolist(),
        "columns": [
            {
                "id": column.id,
                "label": column.label,
                "description": column.description,
                "value": [plain(number) for number in column.value[rows]],
                "mcse": None if column.mcse is None else [rounded(number) for number in column.mcse[rows]],
            }
            for column in columns
        ],
        "flags": [
            {"id": flag.id, "label": flag.label, "description": flag.description, "serious": flag.serious}
            for flag in flags
        ],
        "bits": bits.tolist(),
        "gaps": sum(column.id in ids(ledger.gaps) for column in columns),  # which are the first columns
        "axes": axes_of(ledger, columns),
    }


def axes_of(ledger: GapLedger, columns: list[Column]) -> list[str]:
    """The columns that the scatter begins with: the first and the last part of the inference gap, or what there is."""
    parents = dict(zip(ids(ledger.gaps), ledger.gaps["parent"].values.tolist(), strict=True))
    known = [column.id for column in columns]
    parts = [name for name in known if parents.get(name) == INFERENCE]
    chosen = [parts[0], parts[-1]] if len(parts) > 1 else [*parts, *known]
    return (chosen * 2)[:2]


def plain(number: float) -> float | str | None:
    """A number for JSON, which has no infinities and no NaN."""
    if np.isnan(number):
        return None
    if np.isinf(number):
        return "inf" if number > 0 else "-inf"
    return round(float(number), DECIMALS)


def rounded(error: float) -> float | str | None:
    """An error for JSON, to a few digits."""
    return float(f"{error:.{DIGITS}g}") if np.isfinite(error) else plain(error)
