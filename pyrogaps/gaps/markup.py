"""A ledger as a `Table`: all that the printed one has, for notebooks, and the form of papers."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from pyrogaps.gaps.finite import finite_part
from pyrogaps.gaps.table import (
    TOTAL,
    decimals_of,
    doubt_of,
    given_shared,
    groups_of,
    is_gap,
    labels_of,
    notes_of,
    on_finite_part,
    title_of,
    warnings_of,
)
from pyrogaps.tables import Table, number, with_error

ERRORS = "mean ± standard error over datapoints; MCSE: Monte Carlo standard error of the mean"


class Parts(NamedTuple):
    """What a ledger is printed from."""

    summary: pd.DataFrame
    gaps: xr.Dataset
    per_datapoint: xr.Dataset
    provenance: dict[str, Any]
    further: list[str]  # notes


def full_table(parts: Parts) -> Table:
    """All columns and notes of the printed ledger."""
    total = [TOTAL] if "shared" in parts.provenance else []
    headings = ["", "mean", "s.e.", "MCSE", *total, "direction", "estimated by"]
    groups = [[_full(parts, *row) for row in group] for group in groups_of(parts.summary, parts.gaps)]
    return _table(parts, headings, groups)


def paper_table(parts: Parts) -> Table:
    """A column of means with errors, their Monte Carlo errors, and the directions."""
    total = [TOTAL] if "shared" in parts.provenance else []
    headings = ["quantity", "nats", "MCSE", *total, "direction"]
    groups = [[_short(parts, *row) for row in group] for group in groups_of(parts.summary, parts.gaps)]
    return _table(parts, headings, groups)


def _table(parts: Parts, headings: list[str], groups: list[list[list[str]]]) -> Table:
    warnings = [_sentence(line) for line in warnings_of(parts.per_datapoint, parts.provenance)]
    notes = [*notes_of(parts.per_datapoint, parts.provenance), *parts.further]
    return Table(f"{title_of(parts.provenance)} ({ERRORS})", headings, groups, warnings, notes=[*map(_sentence, notes)])


def _full(parts: Parts, name: str, row: Any) -> list[str]:
    decimals = decimals_of(parts.summary)
    columns = ["mean", "standard_error", "mcse", *([TOTAL] if "shared" in parts.provenance else [])]
    numbers = [number(float(row[column]), decimals) for column in columns]
    estimator = given_shared(row["estimator"], name, parts.provenance)
    return [_label(parts, name), *numbers, _direction(parts, name, row), estimator]


def _short(parts: Parts, name: str, row: Any) -> list[str]:
    mean = with_error(row["mean"], row["standard_error"])
    total = [number(float(row[TOTAL]), 2)] if "shared" in parts.provenance else []
    return [_label(parts, name), mean, _error(row["mcse"]), *total, _direction(parts, name, row)]


def _label(parts: Parts, name: str) -> str:
    return labels_of(parts.summary, parts.gaps, parts.provenance)[name]


def _direction(parts: Parts, name: str, row: Any) -> str:
    rest = on_finite_part(row, len(finite_part(parts.per_datapoint)["datapoint"]), 2)
    doubt = doubt_of(row) if is_gap(name, parts.gaps) else ""
    return given_shared(f"{rest}{row['direction']}{doubt}", name, parts.provenance)


def _error(value: float) -> str:
    return with_error(0.0, value).partition("± ")[2] if np.isfinite(value) else "-"


def _sentence(line: str) -> str:
    return line if line.endswith(".") else f"{line}."
