"""What the page says in words and tables: verdict, summary, notes, provenance. Plain values, for the template."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pyrogaps.errors import counted
from pyrogaps.gaps import GapLedger
from pyrogaps.gaps.certificate import lines_of
from pyrogaps.gaps.finite import finite_part
from pyrogaps.gaps.table import EVIDENCE, GIVEN_SHARED, TOTAL, doubt, label_of, notes
from pyrogaps.gaps.terms import DATA_SET, GLOBAL, ids, parent_of

# What the other sections hold.
ELSEWHERE = {"quantities", "notes", "cautions", "remarks", "infinite", "examined"}


def verdict_of(ledger: GapLedger) -> dict[str, Any]:
    """The diagnosis of a ledger: its verdict, the warnings before it, and the gaps ranked."""
    diagnosis = ledger.diagnose()
    return {
        "verdict": diagnosis.verdict,
        "warnings": [sentence(line) for line in diagnosis.warnings],
        "caveats": diagnosis.caveats,
        "findings": [sentence(str(finding)) for finding in diagnosis.findings],
    }


def heading_of(ledger: GapLedger) -> str:
    """How many datapoints, of how many latent dimensions, and given what."""
    provenance = ledger.provenance
    text = f"{counted(provenance['num_datapoints'], 'datapoint')}, latent dimension {provenance['dim']}"
    if shared := provenance.get("shared"):
        text += f"; gaps per datapoint given {shared['num_draws']} draws of {shared['names']}"
    return text


def summary_of(ledger: GapLedger) -> dict[str, Any]:
    """The rows of `GapLedger.summary()`, as text: bounds, the tree of gaps with the depth of each, other families."""
    summary, gaps, provenance = ledger.summary(), ledger.gaps, ledger.provenance
    means = summary["mean"][np.isfinite(summary["mean"])]
    decimals = 3 if means.empty or float(means.abs().max()) < 100 else 2
    groups: dict[str, list[dict[str, Any]]] = {"gaps": [], "families": [], "bounds": []}
    for name, row in summary.iterrows():
        key = str(name)
        is_gap, is_further = key in ids(gaps), key.startswith("approximation_gap[")
        words = {column: str(row[column]) for column in ("direction", "estimator")}
        label = str(gaps["label"].sel(gap=key).item()) if is_gap else label_of(key, provenance)
        if "shared" in provenance and key not in (DATA_SET, GLOBAL):
            label = label.replace(EVIDENCE, GIVEN_SHARED)
            words = {column: text.replace(EVIDENCE, GIVEN_SHARED) for column, text in words.items()}
        remark = doubt(row).removeprefix("; ") if is_gap or is_further else ""
        if not np.isfinite(row["mean"]) and np.isfinite(row.get("finite_mean", np.nan)):
            remark = f"{number(row['finite_mean'], decimals)} over the datapoints with finite bounds"
        groups["gaps" if is_gap else "families" if is_further else "bounds"].append(
            {
                "id": key,
                "label": label,
                "depth": depth_of(gaps, key) if is_gap else 0,
                "colour": str(gaps["colour"].sel(gap=key).item()) if is_gap else "",
                "mean": number(row["mean"], decimals),
                "error": number(row["standard_error"], decimals),
                "mcse": number(row["mcse"], decimals),
                "total": number(row[TOTAL], decimals) if TOTAL in row else None,
                "remark": remark,
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


def notes_of(ledger: GapLedger) -> list[str]:
    """How the numbers were measured, and what of model and guide is left out, a line for each."""
    provenance = ledger.provenance
    shared = provenance.get("shared", {})
    lines = [shared["data_set"]] if "data_set" in shared else []
    lines += [*provenance.get("remarks", []), *notes(finite_part(ledger.per_datapoint), provenance)]
    lines += [] if ledger.certificate is None else [f"certificate: {line}" for line in lines_of(ledger.certificate)]
    return [sentence(line) for line in lines]


def sentence(text: str) -> str:
    """A line as a sentence, with a capital where it begins with a word, and a full stop."""
    first = text.split(" ", 1)[0]
    text = text[:1].upper() + text[1:] if first.removesuffix(":").isalpha() and first != "log" else text
    return text if text.endswith((".", "!", "?")) else f"{text}."


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
