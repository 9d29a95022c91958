"""Flags of the rows of a ledger's table: why a mean says little, or cannot be trusted."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from pyrogaps.evidence.reliability import RELIABLE, is_examined
from pyrogaps.gaps.finite import finite_part
from pyrogaps.gaps.selection import UNTRUSTED
from pyrogaps.gaps.table import EVIDENCE, MAX_KHAT, Parts, decimals_of, given_shared, is_gap, label_of
from pyrogaps.gaps.terms import CERTAIN, combined_error, ids, parent_of
from pyrogaps.tables import number

WITHIN = "within its error"
UPPER = "log_evidence_upper"
AGREE, CONTRADICT = "the bounds agree within their error", "the bounds contradict each other: do not trust them"

# Quantities, what is said of datapoints where they cannot be trusted, and the column that says where.
CHECKED = (
    (EVIDENCE, UNTRUSTED["reliable"], RELIABLE),
    ("L[q*]", UNTRUSTED["converged"], "converged"),
    ("L[q*_C]", "shared posterior not converged", "shared_converged"),
    ("IWAE-", f"k-hat above {MAX_KHAT}", "khat"),
)


def flags_of(parts: Parts, name: str) -> str:
    """The flags of a row of the summary, in a few words each; empty for none."""
    row, doubts = parts.row(name), [words for words, _ in doubts_of(parts, name)]
    within = [WITHIN] * (is_gap(name, parts.gaps) and within_error(row))
    flags = [on_finite_part(parts, name), *within, agreement(parts.summary) if name == UPPER else "", *doubts]
    return "; ".join(filter(None, flags))


def doubts_of(parts: Parts, name: str) -> Iterator[tuple[str, float]]:
    """What cannot be trusted of the numbers that a row is made of: words with a count, and a share of the datapoints.

    A row is made of the quantities that its own name and its estimator contain.
    """
    gaps, data = parts.gaps, finite_part(parts.per_datapoint)
    total = data.sizes["datapoint"]
    if not total or (name in ids(gaps) and name not in data and parent_of(gaps, name)):  # of other data too
        return
    made_of = f"{label_of(name, parts.provenance)} {parts.row(name)['estimator']}"
    if EVIDENCE in made_of and not is_examined(data):
        yield given_shared(UNTRUSTED["examined"], name, parts.provenance), 1.0
        data = data.drop_vars(RELIABLE, errors="ignore")
    for quantity, words, column in CHECKED:
        if quantity in made_of and column in data and (column != "khat" or parts.provenance["dim"]):
            count = int(_fails(data[column], name.removesuffix("]").partition("[")[2]).sum())
            where = f"{words} at {count:,} of {total:,}" if total > 1 else words
            if count:
                yield given_shared(where, name, parts.provenance), count / total


def _fails(column: xr.DataArray, family: str) -> NDArray[np.bool_]:
    """Where a check of a family, by default the guide's own, does not pass, `(N,)`."""
    if "family" in column.dims:
        column = column.sel(family=family) if family else column.isel(family=0)
    values = column.values.astype(float)
    return np.asarray(values > MAX_KHAT if column.name == "khat" else values < 1)


def within_error(row: Any) -> bool:
    """Whether a gap is smaller than two of its errors, over datapoints and draws together."""
    return bool(abs(row["mean"]) <= CERTAIN * combined_error(row["standard_error"], row["mcse"]))


def on_finite_part(parts: Parts, name: str) -> str:
    """Where the mean of a row is infinite, that over the datapoints with finite bounds."""
    row, rest = parts.row(name), finite_part(parts.per_datapoint).sizes["datapoint"]
    if not np.isinf(row["mean"]) or not rest:
        return ""
    return f"{number(row['finite_mean'], decimals_of(parts.summary))} over the {rest:,} with finite bounds"


def agreement(summary: pd.DataFrame) -> str:
    """What to think of an upper bound of log p(x) that lies below the lower one; empty where it does not."""
    if UPPER not in summary.index:
        return ""
    low, high = (summary.loc[name].to_dict() for name in ("log_evidence", UPPER))
    if not low["mean"] > high["mean"]:
        return ""
    agree = low["mean"] - high["mean"] <= CERTAIN * combined_error(low["mcse"], high["mcse"])
    return AGREE if agree else CONTRADICT
