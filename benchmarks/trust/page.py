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
        yield (
            f"   {label(row['quantity']) + where:28} {row['truth']:12.4f} {row['estimate']:12.4f} {row['error']:9.4f} ± "
            f"{row['stated']:.4f}  {row['declared']}/{row['number']}  {', '.join(marks)}"
        )


def page(table: pd.DataFrame) -> str:
    """All of it."""
    seeds = ", ".join(map(str, sorted(table["seed"].unique())))
    parts = [
        "# How far to trust the numbers",
        "",
        f"{table['problem'].nunique()} problems with exact answers, at the defaults of `decompose` and `log_evidence`. "
        f"Command: `python -m benchmarks.trust`; seeds {seeds}, fixed before the first run, each for data and draws. "
        f"Machine: {table['machine'].iloc[0]}. Measured in {table.groupby(['problem', 'seed'])['seconds'].first().sum():,.0f} s.",
        "",
        f"*Confidently wrong*: off by more than {ERRORS:g} stated errors and {NATS} nats, and not flagged. A mean is "
        "flagged where a warning of the diagnosis or the table names it; a datapoint where its column "
        "(`log_evidence_reliable`, `converged`, `shared_converged`) is False. A gap is flagged with its parts. *False "
        f"alarm*: a flagged mean on an easy problem that is right within two stated errors and {NATS} nats.",
        "",
        *_totals(table),
        "",
        "## Confidently wrong",
        "",
        *_wrong(table),
        "",
        "## Intervals",
        "",
        *_intervals(table),
        "",
        "## Every problem",
        "",
        "Means over datapoints in nats, of the seed with the largest error; flags and datapoints over all seeds. Gaps "
        "are differences of these, and stand in `trust.csv`. Easy problems are marked *.",
        "",
        *_all(table),
        "",
    ]
    return "\n".join(parts)


def _totals(table: pd.DataFrame) -> Iterator[str]:
    own = table[table["call"] == LEDGER]
    wrong, datapoints = int(own["wrong"].sum()), int(table["wrong_datapoints"].sum())
    chance = BEYOND_FOUR * int(table["comparable"].sum())
    problems = table[table["wrong"] | (table["wrong_datapoints"] > 0)]["problem"].nunique()
    easy = own[own["easy"] & (own["quantity"] == "log_evidence")]
    yield "| | |"
    yield "| --- | --- |"
    yield f"| means, confidently wrong | {wrong} of {len(own)} |"
    yield f"| datapoints declared reliable, confidently wrong | {datapoints:,} of {int(table['declared'].sum()):,}; by chance {chance:.1f} |"
    yield f"| problems with any of these | {problems} of {table['problem'].nunique()} |"
    yield f"| false alarms, on {easy['problem'].nunique()} easy problems | {int(own['false_alarm'].sum())} means of {int(own['easy'].sum())} |"
    two = own[own["quantity"] == "log_evidence"]
    yield f"| log p(x) outside of both bounds by {ERRORS:g} errors, declared reliable | {int(two['outside'].sum()):,} of {int(two['declared'].sum()):,} |"
    yield f"| log p(x) declared reliable | {int(two['declared'].sum()):,} of {int(two['number'].sum()):,} |"


def _wrong(table: pd.DataFrame) -> Iterator[str]:
    bad = table[table["wrong"] | (table["wrong_datapoints"] > 0)]
    if bad.empty:
        yield "None."
        return
    yield "| problem | quantity | seed | mean: error ± stated | datapoints wrong | worst: error ± stated |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in bad.to_dict("records"):
        mean = (
            f"**{row['error']:.3f}** ± {row['stated']:.4f}"
            if row["wrong"]
            else f"{row['error']:.3f} ± {row['stated']:.4f}" + (" (flagged)" if row["flagged"] else "")
        )
        name = label(row["quantity"]) + ("" if row["call"] == LEDGER else f" (`{ALONE}`)")
        worst = f"{row['worst']:.3f} ± {row['worst_stated']:.4f}" if row["wrong_datapoints"] else ""
        yield f"| {row['problem']} | {name} | {row['seed']} | {mean} | {row['wrong_datapoints']} of {row['declared']} | {worst} |"


def _intervals(table: pd.DataFrame) -> Iterator[str]:
    yield f"Of datapoints declared reliable, over all seeds, wherever there are {MANY:,}: how many 95% intervals hold the truth."
    yield ""
    yield "| problem | quantity | declared | covered | at least |"
    yield "| --- | --- | --- | --- | --- |"
    chosen = table[table["quantity"].isin(COVERED)]
    sums = chosen.groupby(["problem", "call", "quantity"], sort=False)[["declared", "covered"]].sum()
    for (problem, call, quantity), row in sums.iterrows():
        if row["declared"] < MANY:
            continue
        share = row["covered"] / row["declared"]
        least = NOMINAL - 2 * math.sqrt(NOMINAL * (1 - NOMINAL) / row["declared"])
        mark = "" if share >= least else " **below**"
        yield f"| {problem} | {label(quantity)}, `{call}` | {row['declared']:,} | {share:.1%}{mark} | {least:.1%} |"


def _all(table: pd.DataFrame) -> Iterator[str]:
    yield "| problem | | truth | estimate | error | stated error | flagged | datapoints declared | wrong |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    own = table[(table["call"] == LEDGER) & ~table["quantity"].isin([*PARTS, "elbo"])]
    for (name, quantity), rows in own.groupby(["problem", "quantity"], sort=False):
        row = rows.loc[rows["error"].abs().idxmax()]
        problem = PROBLEMS[name]
        title = f"**{name}**{'*' if problem.easy else ''}: {problem.about}" if quantity == "log_evidence" else ""
        flags = f"{int(rows['flagged'].sum())}/{len(rows)}"
        declared = f"{int(rows['declared'].sum()):,}/{int(rows['number'].sum()):,}"
        numbers = f"{row['truth']:.3f} | {row['estimate']:.3f} | {row['error']:.3f} | {row['stated']:.4f}"
        yield f"| {title} | {label(quantity)} | {numbers} | {flags} | {declared} | {int(rows['wrong_datapoints'].sum()) or ''} |"
