"""The table of `inference_suboptimality`, beside the one of the paper, and its claims judged from the numbers alone.

The criteria were written before any column was finished; in the paper's own table each of them holds. A margin in nats
says by how much a criterion is met (negative: missed); a claim "holds" where every margin lies two of its standard
errors (over images) above 0, "does not hold" where one lies two below, and is "within error" otherwise. A claim is
judged once all its columns are measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pandas as pd

# Cremer, Li and Duvenaud: the poster's Table 1, nats, test images, 3,280 epochs.
PAPER = {
    "mnist-ffg": (-89.85, -90.83, -91.19, -92.76),
    "mnist-flow": (-88.82, -90.40, -102.88, -91.42),
    "mnist-ffg-large": (-89.09, -90.05, -90.34, -91.12),
    "mnist-flow-large": (-88.59, -90.26, -103.53, -91.25),
    "mnist-ffg-no-anneal": (-89.84, -90.89, -91.02, -94.31),
    "mnist-flow-no-anneal": (-89.41, -90.78, -92.34, -94.29),
    "fashion-ffg": (-97.78, -98.03, -99.03, -103.20),
    "fashion-flow": (-97.35, -97.74, -130.90, -102.19),
    "fashion-ffg-large": (-94.55, -95.93, -98.09, -101.28),
    "fashion-flow-large": (-96.16, -96.87, -129.24, -100.60),
    "fashion-ffg-no-anneal": (-100.56, -100.74, -101.26, -103.63),
    "fashion-flow-no-anneal": (-100.33, -100.61, -102.80, -104.05),
}
BOUNDS = ("log_evidence", "elbo_refined_flow", "elbo_refined_ffg", "elbo")
GAPS = ("approximation_gap", "amortization_gap", "inference_gap")
LABELS = {
    "log_evidence": "log p(x)",
    "elbo_refined_flow": "L[q*_Flow]",
    "elbo_refined_ffg": "L[q*_FFG]",
    "elbo": "L[q]",
    "approximation_gap": "approximation gap",
    "amortization_gap": "amortization gap",
    "inference_gap": "inference gap",
}


@dataclass(frozen=True)
class Margin:
    """By how many nats a criterion is met in some columns, and the standard error of that."""

    what: str
    value: float
    error: float


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, its criterion in words, the columns it needs, and its margins from the table."""

    claim: str
    criterion: str
    columns: tuple[str, ...]
    margins: Callable[["Table"], list[Margin]]


class Table:
    """Lookups in the CSV's table: a mean over images and its standard error."""

    def __init__(self, table: pd.DataFrame, part: str) -> None:
        self.rows, self.part = table.set_index("column"), part

    def value(self, column: str, quantity: str) -> float:
        return float(self.rows.loc[column, f"{self.part}_{quantity}"])

    def error(self, column: str, quantity: str) -> float:
        return float(self.rows.loc[column, f"{self.part}_{quantity}_se"])

    def combined(self, what: str, *terms: tuple[float, str, str]) -> Margin:
        """The margin that is the sum of factor * quantity over `terms` (factor, column, quantity)."""
        value = sum(factor * self.value(column, quantity) for factor, column, quantity in terms)
        variance = sum((factor * self.error(column, quantity)) ** 2 for factor, column, quantity in terms)
        return Margin(what, value, variance**0.5)


APPROXIMATION, AMORTIZATION, DIFFERENCE = "approximation_gap", "amortization_gap", "flow_minus_ffg"
ANNEALED = ("ffg", "flow", "ffg-large", "flow-large")


def balanced(table: Table, columns: tuple[str, ...]) -> list[Margin]:
    """Neither gap is more than twice the other."""
    margins = []
    for column in columns:
        for one, other in ((APPROXIMATION, AMORTIZATION), (AMORTIZATION, APPROXIMATION)):
            what = f"{column}: 2 x {LABELS[one]} - {LABELS[other]}"
            margins.append(table.combined(what, (2, column, one), (-1, column, other)))
    return margins


def _amortization_dominates(table: Table) -> list[Margin]:
    margins = []
    for guide in ("ffg", "flow"):
        column = f"fashion-{guide}"
        what = f"{column}: amortization gap - 2 x approximation gap"
        margins.append(table.combined(what, (1, column, AMORTIZATION), (-2, column, APPROXIMATION)))
        what = f"{column} - {column}-large: amortization gap"
        margins.append(table.combined(what, (1, column, AMORTIZATION), (-1, f"{column}-large", AMORTIZATION)))
    return margins


def generator_adapts(table: Table, pairs: tuple[tuple[str, str], ...]) -> list[Margin]:
    """L[q*_Flow] - L[q*_FFG] is at most 2.2 nats in the first column of each pair, more than 10 in the second."""
    margins = []
    for ffg, flow in pairs:
        at_most, more = table.combined("", (-1, ffg, DIFFERENCE)), table.combined("", (1, flow, DIFFERENCE))
        margins.append(Margin(f"{ffg}: 2.2 - (L[q*_Flow] - L[q*_FFG])", 2.2 + at_most.value, at_most.error))
        margins.append(Margin(f"{flow}: (L[q*_Flow] - L[q*_FFG]) - 10", more.value - 10, more.error))
    return margins


def annealing_matters(table: Table, columns: tuple[str, ...]) -> list[Margin]:
    """The difference is less than half as large in a column's counterpart without annealing."""
    margins = []
    for column in columns:
        what = f"{column}: difference / 2 - that without annealing"
        terms = (0.5, column, DIFFERENCE), (-1, f"{column}-no-anneal", DIFFERENCE)
        margins.append(table.combined(what, *terms))
    return margins


def _annealed_as_said(table: Table) -> list[Margin]:
    """Epochs of annealing where there must be some, and their absence where there must be none: no error."""
    epochs = table.rows["entropy_annealing"]
    return [
        Margin(f"{column}: epochs over which lambda rises", 0.5 - value if "no-anneal" in column else value - 0.5, 0.0)
        for column, value in epochs.items()
    ]


def _columns(*patterns: str) -> tuple[str, ...]:
    return tuple(f"{data}-{setting}" for data in ("mnist", "fashion") for setting in patterns)


MNIST = tuple(f"mnist-{setting}" for setting in ANNEALED)
PAIRS = tuple((f"{data}-ffg{size}", f"{data}-flow{size}") for data in ("mnist", "fashion") for size in ("", "-large"))
CLAIMS = (
    Claim(
        "1. On MNIST both gaps contribute about equally.",
        "In the four annealed MNIST columns neither gap is more than twice the other.",
        MNIST,
        partial(balanced, columns=MNIST),
    ),
    Claim(
        "2. On Fashion-MNIST amortization dominates, and a larger encoder lowers it.",
        "In the two columns with the regular encoder the amortization gap is more than twice the approximation gap, "
        "and larger than with the large encoder.",
        tuple(f"fashion-{setting}" for setting in ANNEALED),
        _amortization_dominates,
    ),
    Claim(
        "3. The generator adapts to the approximation: L[q*_Flow] - L[q*_FFG] is at most 2.2 nats in models trained "
        "with FFG, more than 10 in those trained with the flow.",
        "As stated, in the eight annealed columns.",
        _columns(*ANNEALED),
        partial(generator_adapts, pairs=PAIRS),
    ),
    Claim(
        "4. Without entropy annealing that difference is much smaller.",
        "In models trained with the flow it is less than half that of the annealed column.",
        _columns("flow", "flow-no-anneal"),
        partial(annealing_matters, columns=("mnist-flow", "fashion-flow")),
    ),
    Claim(
        "5. Entropy annealing trains E_q[log p(x, z) - lambda log q(z|x)], lambda from 0 to 1.",
        "A statement of method: the annealed columns were trained so, the others with lambda = 1 throughout.",
        _columns(*ANNEALED, "ffg-no-anneal", "flow-no-anneal"),
        _annealed_as_said,
    ),
)


def verdict(margins: list[Margin]) -> str:
    """One of "holds", "does not hold" and "within error", as the module says."""
    if any(margin.value < -2 * margin.error for margin in margins):
        return "does not hold"
    return "holds" if all(margin.value > 2 * margin.error for margin in margins) else "within error"


def page(table: pd.DataFrame, flow: str = "auxiliary") -> str:
    """The table in Markdown, test and training images, beside the paper's; then the claims.

    `table` holds any number of the twelve columns; `flow` is "auxiliary" or "coupling", the flow of its columns.
    """
    # A column measured in full is shown; only one whose status is "done" is judged.
    shown = table[table["test_log_evidence"].notna()] if "test_log_evidence" in table else table[:0]
    title = "Inference suboptimality, measured anew" + ("" if flow == "auxiliary" else ": the plain flow")
    lines = [f"# {title}", "", *_introduction(table, len(shown), flow), ""]
    for part in ("test", "train"):
        lines += [f"## {part} images", "", *_part(shown, part), ""]
    lines += [
        "## The claims",
        "",
        "Criteria as fixed in `benchmarks/suboptimality_page.py`; judged on test images.",
        "",
    ]
    for claim in CLAIMS:
        lines += _claim(claim, shown, flow)
    lines += ["## What certifies the evidence", "", *_certificates(shown), ""]
    flagged = table[table["status"] != "done"]
    lines += [f"- {row['column']}: {row['status']}" for _, row in flagged.iterrows()]
    return "\n".join(lines).rstrip() + "\n"


# By the name of the evidence; the older tables have none.
EVIDENCE = {"": "AIS anchored at the refined guide", "Ladder": "the ladder at its defaults"}


def _introduction(table: pd.DataFrame, measured: int, flow: str) -> list[str]:
    command = "python -m benchmarks.inference_suboptimality" + ("" if flow == "auxiliary" else " --flow coupling")
    epochs = several(table, "num_epochs")
    lines = [
        f"Table 1 of Cremer, Li and Duvenaud (arXiv:1801.03558), by `{command}`. "
        f"**{measured} of {len(PAPER)} columns measured.** "
        "In nats; ± is the standard error over images. The approximation gap is that of the family trained with. "
        f"log p(x) by {EVIDENCE.get(name := several(table, 'evidence'), name)}.",
        "",
        f"- Budget: {epochs} epochs (paper: 3,280), {_images(table)}, "
        f"{several(table, 'refinement_steps')} refinement steps; seed {several(table, 'seed')}.",
        f"- Hidden sizes: {_hidden(table, flow)}.",
        f"- Made on: {several(table, 'machine', '; ') or 'nothing measured yet'}.",
        "",
    ]
    if flow == "auxiliary":
        return [
            *lines,
            "The flow is Real NVP with an auxiliary variable v and a reverse model r(v|z, x). Its bound is a lower "
            "bound of the ELBO of its marginal q(z|x). The approximation gap of a column trained with the flow, and "
            "log p(x) - L[q*_Flow] of every column, therefore include E KL(q(v|z, x) || r(v|z, x)). Every L[q*_Flow] "
            "is of one family, with weights of its own for each image. It starts at the fitted FFG, or at the "
            "amortized flow where that is better, and the number of refinement steps limits it: it is a lower bound. "
            "The plain flow, without v, has [a page of its own](inference_suboptimality_coupling.md).",
        ]
    return [
        *lines,
        "The flow is the plain one, affine couplings of the halves of z without an auxiliary variable. It is not the "
        "paper's flow, whose numbers stand beside it for orientation; [the table with the paper's "
        "flow](inference_suboptimality.md) is a page of its own.",
    ]


def several(table: pd.DataFrame, name: str, separator: str = ", ") -> str:
    """The values in a column of `table`, without repetitions; empty where there are none."""
    values = dict.fromkeys(table[name].dropna()) if name in table else {}
    return separator.join(f"{value:,.0f}" if isinstance(value, int | float) else str(value) for value in values)


def _images(table: pd.DataFrame) -> str:
    numbers = (several(table, f"{part}_num_images") or "no" for part in ("test", "train"))
    return "{} test and {} training images".format(*numbers)


def _hidden(table: pd.DataFrame, flow: str) -> str:
    encoder = several(table, "encoder_hidden") or "200-200, large 500-500"
    plain = "50" if flow == "coupling" else "not recorded"
    trained, local = (several(table, name) or plain for name in ("flow_hidden", "local_flow_hidden"))
    return f"encoder {encoder}; coupling networks of the amortized flow {trained}; those of L[q*_Flow] {local}"


def paper_name(column: str) -> str:
    """The name that a column has in the paper's table."""
    return column.replace("-coupling", "-flow")


def _part(table: pd.DataFrame, part: str) -> list[str]:
    head = ["column", *(LABELS[name] for name in (*BOUNDS, *GAPS)), "L[q*_Flow] - L[q*_FFG]"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for _, row in table.iterrows():
        names = (*BOUNDS, *GAPS, DIFFERENCE)
        cells = [f"{row[f'{part}_{name}']:.2f} ± {row[f'{part}_{name}_se']:.2f}" for name in names]
        mark = "" if row["status"] == "done" else " (flagged, see the end)"
        lines.append(f"| {row['column']}{mark} | " + " | ".join(cells) + " |")
        if part == "test":
            evidence, flow, ffg, elbo = PAPER[paper_name(row["column"])]
            own = ffg if "-ffg" in row["column"] else flow
            values = (evidence, flow, ffg, elbo, evidence - own, own - elbo, evidence - elbo, flow - ffg)
            lines.append("| *paper* | " + " | ".join(f"*{value:.2f}*" for value in values) + " |")
    return lines


def _claim(claim: Claim, table: pd.DataFrame, flow: str) -> list[str]:
    def own(text: str) -> str:
        return text if flow == "auxiliary" else text.replace("-flow", "-coupling")

    by_paper = table.assign(column=table["column"].map(paper_name))
    done = by_paper[by_paper["status"] == "done"]
    lines = [f"### {claim.claim}", "", f"Criterion: {claim.criterion}", ""]
    missing = [column for column in claim.columns if column not in set(by_paper["column"])]
    flagged = [column for column in claim.columns if column not in {*missing, *done["column"]}]
    if missing or flagged:
        reasons = [f"{own(', '.join(missing))} not measured yet"] if missing else []
        reasons += [f"{own(', '.join(flagged))} flagged"] if flagged else []
        return [*lines, f"Not judged: {'; '.join(reasons)}.", ""]
    margins = claim.margins(Table(done, "test"))
    lines += [f"**{verdict(margins)}**", "", "| margin | |", "|---|---|"]
    lines += [f"| {own(margin.what)} | {margin.value:.2f} ± {margin.error:.2f} |" for margin in margins]
    return [*lines, ""]


def _certificates(table: pd.DataFrame) -> list[str]:
    head = (
        "column",
        "BDMC sandwich",
        "log p(x) - IWAE-5000, test",
        "MCSE of mean gaps, at most",
        "converged FFG, flow",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for _, row in table.iterrows():
        errors = [row[f"{part}_{gap}_mcse"] for part in ("test", "train") for gap in GAPS]
        above = row["test_log_evidence"] - row["test_iwae_5000"]
        width = f"{row['sandwich_width']:.3f} ± {row['sandwich_width_mcse']:.3f}"
        if pd.notna(number := row.get("num_simulated")):
            width += f" ({number:.0f} simulated)"
        converged = f"{row['test_converged_ffg']:.0%}, {row['test_converged_flow']:.0%}"
        lines.append(f"| {row['column']} | {width} | {above:.2f} | {max(errors):.4f} | {converged} |")
    return lines
