"""What the page says in words and tables: verdict, summary, notes, provenance. Plain values, for the template."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pyrogaps.gaps import GapLedger
from pyrogaps.gaps.certificate import lines_of
from pyrogaps.gaps.flags import flags_of
from pyrogaps.gaps.table import TOTAL, Parts, decimals_of, given_shared, is_gap, label_of, notes_of
from pyrogaps.gaps.terms import ids, parent_of
from pyrogaps.tables import sentence

# What the other sections hold.
ELSEWHERE = {"quantities", "notes", "cautions", "remarks", "infinite", "examined", "subset", "observed_sites", "model"}


def verdict_of(ledger: GapLedger) -> dict[str, Any]:
    """The diagnosis of a ledger: its verdict, the warnings before it, and the gaps ranked."""
    diagnosis = ledger.diagnose()
    return {
        "verdict": diagnosis.verdict,
        "warnings": [sentence(line) for line in diagnosis.warnings],
        "caveats": diagnosis.caveats,
        "findings": [
            {"line": sentence(str(own)), "parts": [sentence(str(part)) for part in diagnosis.within(own.gap)]}
            for own in diagnosis.within()
        ],
    }


def summary_of(ledger: GapLedger) -> dict[str, Any]:
    """The rows of `GapLedger.summary()`, as text: bounds, the tree of gaps with the depth of each, other families."""
    summary, gaps, provenance = ledger.summary(), ledger.gaps, ledger.provenance
    parts, decimals = Parts(summary, gaps, ledger.per_datapoint, provenance), decimals_of(summary)
    groups: dict[str, list[dict[str, Any]]] = {"gaps": [], "families": [], "bounds": []}
    for name, row in summary.iterrows():
        key = str(name)
        in_tree = key in ids(gaps)
        words = {column: given_shared(str(row[column]), key, provenance) for column in ("direction", "estimator")}
        label = str(gaps["label"].sel(gap=key).item()) if in_tree else label_of(key, provenance)
        groups["gaps" if in_tree else "families" if is_gap(key, gaps) else "bounds"].append(
            {
                "id": key,
                "label": given_shared(label, key, provenance),
                "depth": depth_of(gaps, key) if in_tree else 0,
                "colour": str(gaps["colour"].sel(gap=key).item()) if in_tree else "",
                "mean": number(row["mean"], decimals),
                "error": number(row["standard_error"], decimals),
                "mcse": number(row["mcse"], decimals),
                "total": number(row[TOTAL], decimals) if TOTAL in row else None,
                "remark": flags_of(parts, key),
                **words,
            }
        )
    return {"groups": groups, "has_total": ledger.shared is not None}


def depth_of(gaps: Any, name: str) -> int:
    """How many gaps `name` is a part of."""
    parent = parent_of(gaps, name)
    return 0 if not parent else 1 + depth_of(gaps, parent)


def number(value: float, decimals: int) -> str:
    """A number as text, with a true minus sign; a dash where there is none."""
    if np.isnan(value):
        return "–"
    return f"{value:,.{decimals}f}".replace("-", "−")


def lines_on(ledger: GapLedger) -> list[str]:
    """How the numbers were measured, and what of model and guide is left out, a line for each."""
    lines = notes_of(ledger.per_datapoint, ledger.provenance)
    lines += [] if ledger.certificate is None else lines_of(ledger.certificate)
    return [sentence(line) for line in lines]


def provenance_of(ledger: GapLedger) -> list[tuple[str, str]]:
    """Settings, seed and versions: names with dots, and values as text."""
    return [*_flat({name: value for name, value in ledger.provenance.items() if name not in ELSEWHERE}, "")]


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            for place, item in enumerate(value):
                yield from _flat(item, f"{prefix}{name}[{place}].")
        else:
            yield f"{prefix}{name}", _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):  # a saved ledger has lists in place of tuples
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
