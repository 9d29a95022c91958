"""`Comparison`: differences of ledgers, as a table with a verdict in words."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from pyrogaps.errors import counted
from pyrogaps.gaps.differences import EVIDENCE, LARGER, OPEN, SAME, SMALLER, UNTRUSTED
from pyrogaps.gaps.terms import APPROXIMATION, ids, leaves, root, tree_labels
from pyrogaps.tables import Frame, Table, number, with_error

LEGEND = "s.e.: standard error of the paired difference over datapoints. MCSE: its Monte Carlo standard error."
REMEDY = "Measure log p(x) to a smaller tolerance, pg.Ladder(tolerance=...), to narrow it"


@dataclass(frozen=True, repr=False)
class Comparison:
    r"""Ledgers of the same datapoints, paired datapoint by datapoint; `print` it, or plot it with `plot_comparison`.

    Differences are the first ledger, the reference, less each of the others, in nats: "larger" is larger in the
    reference. A verdict needs two standard errors. Those of a mean combine the standard error over datapoints with the
    Monte Carlo error.

    log p(x) of two models is known between bounds, and so is its difference,

    $$[\text{lower}_a - \text{upper}_b,\; \text{upper}_a - \text{lower}_b],$$

    and every gap that is measured from it. No verdict is given while 0 lies between the ends, nor where fewer than nine
    tenths of the datapoints can be trusted.

    Of one model log p(x) is one number. The row of log p(x) has what each ledger measured; the gaps of both are
    measured from one value per datapoint: that of the ledger that is reliable, where only one is, else the mean of both
    weighted by their precision $1 / \mathrm{MCSE}^2$, or the higher one where they differ by more than four errors. It
    cancels: the difference of two inference gaps is that of the ELBOs.

    Attributes:
        names: of the ledgers, the reference first.
        differences: over ("other", "quantity"): `reference` and `value`, the means of both ledgers; `mean`, their
            difference, with `standard_error` over datapoints and `mcse`; its ends `low` and `high`, over the
            `num_trusted` datapoints of which both ledgers can be trusted, each with `<end>_standard_error`,
            `<end>_mcse`, and `<end>_error`, both combined; `verdict`.
        per_datapoint: over ("other", "datapoint"): the difference of each quantity and its ends `<quantity>_low` and
            `<quantity>_high`, which are equal but where log p(x) is known between bounds, each with its Monte Carlo
            error `..._mcse`; and as coordinates `<quantity>_trusted`.
        provenance: of every other ledger, whether it is of `one_model` and measured with `one_seed` with the reference,
            the mean of the one `log_evidence` of one model, what is `without` a difference, `left_out` datapoints, and
            `warnings`.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> ledgers = [pg.decompose(model, guide, x, seed=s, num_particles=50, progress=False) for s in (0, 1)]
        >>> pg.compare(*ledgers).reference
        'a'
    """

    names: tuple[str, ...]
    differences: xr.Dataset
    per_datapoint: xr.Dataset
    gaps: xr.Dataset
    provenance: dict[str, Any]

    @property
    def reference(self) -> str:
        """The ledger that the others are compared with."""
        return self.names[0]

    def summary(self) -> pd.DataFrame:
        """One row for every other ledger and quantity: the columns of `differences`, in nats."""
        frame = Frame(self.differences.drop_vars("label").to_dataframe())
        return frame.reset_index().dropna(subset=["mean"]).set_index(["other", "quantity"])

    def verdict(self, other: str | None = None) -> str:
        """What the reference is, compared with another ledger, in words; by default with the next one."""
        return " ".join(_sentences(self, other or self.names[1]))

    def to_markdown(self) -> str:
        """The tables in Markdown, with verdicts, warnings and notes."""
        return "\n".join(table.markdown() for table in self._tables())

    def to_latex(self, *, caption: str | None = None, label: str | None = None) -> str:
        """The tables in LaTeX with the package booktabs; `caption` and `label` as for `GapLedger.to_latex`.

        Labels of several tables are numbered: "tab:gaps-1" and so on.
        """
        several = len(self.names) > 2 and label is not None
        labels = [f"{label}-{place}" if several else label for place in range(1, len(self.names))]
        return "\n".join(table.latex(caption, own) for table, own in zip(self._tables(), labels, strict=True))

    def _tables(self) -> Iterator[Table]:
        for other in self.names[1:]:
            yield table_of(self, other)

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self._tables())

    def __str__(self) -> str:
        return "\n\n".join(map(str, self._tables()))

    __repr__ = __str__


def table_of(comparison: Comparison, other: str) -> Table:
    """The comparison of the reference with another ledger as a table."""
    rows = comparison.differences.sel(other=other)
    first, difference = comparison.reference, f"{comparison.reference} − {other}"
    headings = ["", first, other, difference, "s.e.", "MCSE", f"in {first}"]
    labels = tree_labels(comparison.gaps)
    groups: list[list[list[str]]] = [[]]
    for name in map(str, rows["quantity"].values):
        row = rows.sel(quantity=name)
        if np.isnan(float(row["mean"])):
            continue
        if groups[-1] and (name == root(comparison.gaps) or _starts_families(name, groups[-1], comparison)):
            groups.append([])
        groups[-1].append(_row(name, labels.get(name, str(row["label"].item())), row, comparison, other))
    counts = counted(int(rows["num_datapoints"].max()), "datapoint")
    title = f"Comparison of '{first}' with '{other}' over {counts}, paired; means in nats"
    return Table(
        title,
        headings,
        groups,
        [*comparison.provenance["warnings"][other]],
        comparison.verdict(other),
        [*_notes(comparison, other)],
        legend=LEGEND,
    )


def _starts_families(name: str, group: list[list[str]], comparison: Comparison) -> bool:
    is_further = name.startswith(f"{APPROXIMATION}[")
    return is_further and not group[-1][0].startswith("approximation gap, ")


def _row(name: str, label: str, row: xr.Dataset, comparison: Comparison, other: str) -> list[str]:
    means = [float(row[column]) for column in ("reference", "value")]
    low, high = float(row["low"]), float(row["high"])
    error, mcse, difference = float(row["standard_error"]), float(row["mcse"]), number(float(row["mean"]), 3)
    if low != high:
        known = np.isfinite([low, high]).all()
        difference = f"{number(low, 3)} … {number(high, 3)}" if known else "not bounded"
        kinds = ("standard_error", "mcse")
        error, mcse = (max(float(row[f"{end}_{kind}"]) for end in ("low", "high")) for kind in kinds)
    said = "one model" if name == EVIDENCE and comparison.provenance["one_model"][other] else str(row["verdict"].item())
    return [label, *(number(mean, 3) for mean in means), difference, number(error, 3), number(mcse, 3), said]


def _sentences(comparison: Comparison, other: str) -> Iterator[str]:
    """The verdict: log p(x) of two models, then the inference gap, and which part of it."""
    rows, first = comparison.differences.sel(other=other), comparison.reference
    if not comparison.provenance["one_model"][other]:
        yield _sentence("log p(x)", rows.sel(quantity=EVIDENCE), first, other)
    whole = root(comparison.gaps)
    if whole not in rows["quantity"].values:
        return
    row = rows.sel(quantity=whole)
    yield _sentence(str(row["label"].item()), row, first, other)
    compared = comparison.gaps.sel(gap=[name for name in ids(comparison.gaps) if name in rows["quantity"].values])
    parts = [rows.sel(quantity=name) for name in leaves(compared)]  # a gap whose own parts are not compared is one
    clear = [f"{part['label'].item()} ({_size(part)})" for part in parts if part["verdict"].item() in (LARGER, SMALLER)]
    if clear:
        yield f"Parts that differ, '{first}' less '{other}': {', '.join(clear)}."
    elif parts:
        yield "No part of it differs by more than its error."


def _sentence(what: str, row: xr.Dataset, first: str, other: str) -> str:
    verdict, of = str(row["verdict"].item()), f"of '{first}' and '{other}'"
    trusted, number_of = int(row["num_trusted"]), int(row["num_datapoints"])
    where = "" if trusted == number_of else f" on the {trusted:,} of {number_of:,} datapoints that can be trusted"
    what = what[:1].upper() + what[1:] if what != "log p(x)" else what
    if verdict == UNTRUSTED:
        return f"{what} {of}: no verdict, because only {trusted:,} of {number_of:,} datapoints can be trusted."
    if verdict == OPEN:
        ends = f"{with_error(float(row['low']), float(row['low_error']))} and "
        ends += with_error(float(row["high"]), float(row["high_error"]))
        return f"{what} {of}: no verdict{where}, the difference lies between {ends} nats. {REMEDY}."
    if verdict == SAME:
        return f"{what} {of}: no difference beyond its error{where} ({_size(row)} nats)."
    by = _size(row, sign=-1 if verdict == SMALLER else 1)
    return f"{what} is {verdict} in '{first}' than in '{other}'{where}, by {by} nats per datapoint."


def _size(row: xr.Dataset, sign: int = 1) -> str:
    """A difference times `sign`, with its error; both ends of an interval."""
    ends = sorted((sign * float(row[end]), float(row[f"{end}_error"])) for end in ("low", "high"))
    (low, high), errors = zip(*ends, strict=True)
    if low == high:
        return with_error(low, errors[0])
    return f"{with_error(low, errors[0])} to {with_error(high, errors[1])}"


def _notes(comparison: Comparison, other: str) -> Iterator[str]:
    provenance = comparison.provenance
    if provenance["one_model"][other]:
        yield (
            "Both ledgers are of one model. Gaps in both columns are measured from one log p(x), "
            f"{number(provenance['log_evidence'][other], 3)} on average: at each datapoint the mean of both, weighted "
            "by the precision of each ledger, or the one that can be trusted. It cancels in their difference."
        )
    else:
        yield (
            "The models differ: log p(x), and gaps measured from it, are known between the ends of an interval, from "
            "the lower and upper bounds of both."
        )
    if provenance["one_seed"][other]:
        yield (
            "Both were measured with one seed, so their Monte Carlo errors may be correlated. MCSE is their sum, the "
            "largest value possible. Measure one with another seed for a smaller one."
        )
    else:
        yield "The seeds differ, so Monte Carlo errors are independent."
    if left_out := provenance["left_out"][other]:
        yield (
            f"Left out: {counted(left_out, 'datapoint')} that only one of the ledgers has, or that has no finite "
            "bounds in one."
        )
    if without := provenance["without"][other]:
        yield f"Not compared, because one ledger lacks it or it has no values per datapoint: {', '.join(without)}."


def gaps_in_common(first: xr.Dataset, second: xr.Dataset) -> xr.Dataset:
    """The rows of the first tree of gaps that the second one has too."""
    return first.sel(gap=[name for name in ids(first) if name in ids(second)])
