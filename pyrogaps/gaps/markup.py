"""A ledger as a `Table` with a row for each quantity: the full one, and the form of papers."""

from collections.abc import Callable
from typing import Any

import numpy as np

from pyrogaps.gaps.flags import flags_of
from pyrogaps.gaps.table import (
    Parts,
    decimals_of,
    groups_of,
    labels_of,
    notes_of,
    number_of,
    title_of,
)
from pyrogaps.tables import Table, number, sentence, with_error

MCSE = "MCSE: Monte Carlo standard error of the mean, which more draws lower."
LEGEND = f"s.e.: standard error of the mean over datapoints. {MCSE}"


def full_table(parts: Parts) -> Table:
    """All rows with their errors, directions, estimators and flags; then how they were measured."""
    decimals, columns = decimals_of(parts.summary), ["mean", "standard_error", "mcse", *parts.totals]

    def cells(name: str, row: Any) -> list[str]:
        numbers = [number(float(row[column]), decimals) for column in columns]
        return [*numbers, parts.words(name, "direction"), parts.words(name, "estimator"), flags_of(parts, name)]

    headings = ["", "mean", "s.e.", "MCSE", *parts.totals, "direction", "estimated by", "flag"]
    return _table(parts, headings, cells, LEGEND)


def paper_table(parts: Parts) -> Table:
    """A column of means with errors, their Monte Carlo errors, directions and flags."""
    several = parts.provenance["num_datapoints"] > 1
    means = f"Mean ± standard error over {number_of(parts.provenance)}" if several else "Values of 1 datapoint"

    def cells(name: str, row: Any) -> list[str]:
        mean, mcse = with_error(row["mean"], row["standard_error"]), _error(row["mcse"])
        totals = [number(float(row[column]), 2) for column in parts.totals]
        return [mean, mcse, *totals, parts.words(name, "direction"), flags_of(parts, name)]

    headings = ["quantity", "nats", "MCSE", *parts.totals, "direction", "flag"]
    return _table(parts, headings, cells, f"{means}, in nats. {MCSE}")


def _table(parts: Parts, headings: list[str], cells: Callable[[str, Any], list[str]], legend: str) -> Table:
    """The table of these cells, without the last column where no row has a flag."""
    labels = labels_of(parts.summary, parts.gaps, parts.provenance)
    groups = [
        [[labels[name], *cells(name, row)] for name, row in group] for group in groups_of(parts.summary, parts.gaps)
    ]
    if not any(row[-1] for group in groups for row in group):
        headings, groups = headings[:-1], [[row[:-1] for row in group] for group in groups]
    notes = [*notes_of(parts.per_datapoint, parts.provenance), *parts.certificate]
    warnings = [*map(sentence, parts.warnings)]
    return Table(title_of(parts.provenance), headings, groups, warnings, notes=[*map(sentence, notes)], legend=legend)


def _error(value: float) -> str:
    return with_error(0.0, value).partition("± ")[2] if np.isfinite(value) else "-"
