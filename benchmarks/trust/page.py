"""The page of the results, `results/trust.md`, from the table alone."""

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from benchmarks.trust.judge import ALONE, ERRORS, LABELS, LEDGER, NATS, PARTS
from benchmarks.trust.problems import PROBLEMS

# Where this many datapoints are declared reliable, intervals are counted.
MANY = 1000
NOMINAL = 0.93
BEYOND_FOUR = math.erfc(ERRORS / math.sqrt(2))
COVERED = ("log_evidence", "elbo_shared")


def label(quantity: str) -> str:
    """What the ledger's table calls it."""
    if quantity == "guide_optimization_gap":
        return "optimization gap"
    return LABELS.get(quantity, quantity.replace("_", " "))


def rows_in_words(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One run, for the screen."""
    yield f"{rows[0]['problem']}, seed {rows[0]['seed']}: {rows[0]['seconds']:.0f} s  {rows[0]['warnings']}"
    for row in rows:
        marks = [text for text in ("wrong", "false_alarm", "flagged") if row[text]]
        if row["wrong_datapoints"]:
            marks.append(f"{row['wrong_datapoints']} datapoints wrong, {row['worst']:.3f} ± {row['worst_stated']:.3f}")
        if row["outside"]:
            marks.append(f"{row['outside']} outside both bounds")
        where = "" if row["call"] == LEDGER else f" by {ALONE}"
        means = f"{row['truth']:12.4f} {row['estimate']:12.4f} {row['error']:9.4f} ± {row['stated']:.4f}"
        yield f"   {label(row['quantity']) + where:28} {means}  {row['declared']}/{row['number']}  {', '.join(marks)}"


def page(table: pd.DataFrame) -> str:
    """All of it."""
    seeds = ", ".join(map(str, sorted(table["seed"].unique())))
    seconds = table.groupby(["problem", "seed"])["seconds"].first().sum()
    parts = [
        "# How far to trust the numbers",
        "",
        f"{table['problem'].nunique()} problems with exact answers, at the defaults of `decompose` and `log_evidence`. "
        f"Command: `python -m benchmarks.trust`; seeds {seeds}, fixed before the first run, for data and draws. "
        f"Machine: {table['machine'].iloc[0]}. The ledgers took {seconds:,.0f} s.",
        "",
        f"*Confidently wrong*: off by more than both {ERRORS:g} stated errors and {NATS} nats, not flagged. A mean is "
        "flagged if a warning of the diagnosis or the table names it. A datapoint is flagged if its column "
        "(`log_evidence_reliable`, `converged`, `shared_converged`) is False; for L[q*] also if a warning says that "
        "other starts raise it and it was not examined. A gap is flagged if one of its parts is. *False alarm*: "
        f"a flag on the mean of an easy problem that is right to within 2 stated errors and {NATS} nats.",
        "",
        *_totals(table),
        "",
        "## Confidently wrong",
        "",
        *_wrong(table),
        "",
        "## Intervals",
        "",
        f"Coverage of 95% intervals over all seeds, where {MANY:,} or more datapoints are declared reliable: the share "
        "that contains the truth.",
        "",
        *_intervals(table),
        "",
        "## Every problem",
        "",
        "Means over datapoints (nats) for the seed with the largest error; flags and counts over all seeds. Gaps "
        "are differences of these, listed in `trust.csv`. Easy problems are marked *.",
        "",
        *_all(table),
        "",
    ]
    return "\n".join(parts)


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _head(*cells: str) -> Iterator[str]:
    yield _row(*cells)
    yield _row(*["---"] * len(cells))


def _totals(table: pd.DataFrame) -> Iterator[str]:
    own = table[table["call"] == LEDGER]
    evidence, easy = own[own["quantity"] == "log_evidence"], own[own["easy"]]
    amiss = table[table["wrong"] | (table["wrong_datapoints"] > 0)]
    chance = BEYOND_FOUR * int(table["comparable"].sum())
    declared = int(evidence["declared"].sum())
    yield from _head("", "")
    yield _row("means of ledgers, confidently wrong", f"{int(own['wrong'].sum())} of {len(own)}")
    of_datapoints = f"{int(table['wrong_datapoints'].sum()):,} of {int(table['declared'].sum()):,}"
    yield _row("values declared reliable, confidently wrong", f"{of_datapoints}; expected by chance: {chance:.1f}")
    yield _row("problems with any of these", f"{amiss['problem'].nunique()} of {table['problem'].nunique()}")
    alarms = f"{int(own['false_alarm'].sum())} of {len(easy)} means"
    yield _row(f"false alarms on the {easy['problem'].nunique()} easy problems", alarms)
    yield _row(
        "log p(x) of a ledger declared reliable", f"{declared:,} of {int(evidence['number'].sum()):,} datapoints"
    )
    outside = f"{int(evidence['outside'].sum()):,} of {declared:,} datapoints"
    yield _row(f"of these, truth more than {ERRORS:g} errors outside the two bounds", outside)


def _wrong(table: pd.DataFrame) -> Iterator[str]:
    bad = table[table["wrong"] | (table["wrong_datapoints"] > 0)]
    if bad.empty:
        yield "None."
        return
    yield from _head(
        "problem", "quantity", "seed", "mean: error ± stated", "datapoints wrong", "worst datapoint: error ± stated"
    )
    for row in bad.to_dict("records"):
        error = f"**{row['error']:.3f}**" if row["wrong"] else f"{row['error']:.3f}"
        mean = f"{error} ± {row['stated']:.4f}{' (flagged)' if row['flagged'] else ''}"
        name = label(row["quantity"]) + ("" if row["call"] == LEDGER else f" (`{ALONE}`)")
        worst = f"{row['worst']:.3f} ± {row['worst_stated']:.4f}" if row["wrong_datapoints"] else ""
        yield _row(row["problem"], name, row["seed"], mean, f"{row['wrong_datapoints']} of {row['declared']}", worst)


def _intervals(table: pd.DataFrame) -> Iterator[str]:
    yield from _head("problem", "quantity", "declared reliable", "covered", "expected at least")
    chosen = table[table["quantity"].isin(COVERED)]
    sums = chosen.groupby(["problem", "call", "quantity"], sort=False)[["declared", "covered"]].sum()
    for (problem, call, quantity), row in sums.iterrows():
        if row["declared"] < MANY:
            continue
        share = row["covered"] / row["declared"]
        least = NOMINAL - 2 * math.sqrt(NOMINAL * (1 - NOMINAL) / row["declared"])
        covered = f"{share:.1%}{'' if share >= least else ' **below**'}"
        yield _row(problem, f"{label(quantity)}, `{call}`", f"{row['declared']:,}", covered, f"{least:.1%}")


def _all(table: pd.DataFrame) -> Iterator[str]:
    yield from _head(
        "problem", "", "truth", "estimate", "error", "stated error", "flagged", "declared reliable", "wrong"
    )
    own = table[(table["call"] == LEDGER) & ~table["quantity"].isin([*PARTS, "elbo"])]
    for (name, quantity), rows in own.groupby(["problem", "quantity"], sort=False):
        worst, problem = rows.loc[rows["error"].abs().idxmax()], PROBLEMS[name]
        title = f"**{name}**{'*' if problem.easy else ''}: {problem.about}" if quantity == "log_evidence" else ""
        means = (f"{worst[column]:.3f}" for column in ("truth", "estimate", "error"))
        flags = f"{int(rows['flagged'].sum())} of {len(rows)}"
        declared = f"{int(rows['declared'].sum()):,} of {int(rows['number'].sum()):,}"
        wrong = int(rows["wrong_datapoints"].sum()) or ""
        yield _row(title, label(quantity), *means, f"{worst['stated']:.4f}", flags, declared, wrong)
