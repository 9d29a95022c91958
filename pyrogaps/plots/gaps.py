"""The gap bars: the parts of the difference between log p(x) and the guide's bound."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from pyrogaps.errors import counted
from pyrogaps.gaps.terms import INFERENCE, TERMS, ids, parent_of, summary_mcse
from pyrogaps.plots.source import (
    Ledger,
    families,
    gap_tree,
    mean_and_error,
    new_figure,
    note,
    own_family,
    per_datapoint,
    tidy,
    values,
    with_error,
)
from pyrogaps.settings import checked


@dataclass(frozen=True)
class Bar:
    """One row: from `start` nats below log p(x), `length` nats long, negative towards log p(x).

    `depth` is that of its gap in the tree, 0 for the root; None for another family's. `error` is over datapoints, and
    `mcse` the Monte Carlo error.
    """

    label: str
    depth: int | None
    start: float
    length: float
    error: float
    colour: str
    hatch: str
    mcse: float = np.nan


@checked()
def plot_gaps(ledger: Ledger, ax: Axes | None = None) -> Axes:
    """Draw mean gaps in nats as bars on one axis, "nats below log p(x)", with one standard error over datapoints.

    The first row is the guide's inference gap, log p(x) - L[q], stacked from its parts. Below it each part starts
    where the previous one ends: the approximation gap ends at the refined bound L[q*] of the guide's own family, the
    conditioning gap (where measured) starts there, and the amortization gap ends at L[q]. The parts of a
    gap are drawn in the rows below it. A negative part runs backwards, and then the first row shows only the total.
    The last rows are the refined bounds of the other families.

    Args:
        ledger: a `GapLedger`, or a `DataTree` or `InferenceData` with its groups.
        ax: where to draw; by default a new figure.

    Returns:
        The axes.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> ledger = pg.decompose(model, guide, x, num_particles=50, progress=False)
        >>> pg.plot_gaps(ledger).get_xlabel()
        'nats below log p(x)'
    """
    dataset, bars = per_datapoint(ledger), bars_of(ledger)
    if ax is None:
        ax = new_figure(8, 1.1 + 0.42 * max(len(bars), 2)).add_subplot()
    if not bars:
        note(ax, "no gaps were measured")
        return ax
    for row, bar in enumerate(bars):
        for piece in pieces_of(bar, bars):
            _draw(ax, row, piece)
        ax.errorbar(bar.start + bar.length, row, xerr=_drawable(bar.error), color="black", capsize=3, lw=1.2, ls="none")
    _connect(ax, bars)
    _finish(ax, bars)
    ax.set_title(_title(dataset), loc="left", fontsize="medium", linespacing=1.4)
    return ax


def bars_of(ledger: Ledger) -> list[Bar]:
    """The rows: the gaps from the root down, then the refined bounds of the other families."""
    gaps = gap_tree(ledger)
    # Without a measured inference gap, its parts are drawn alone.
    own = _bars(gaps, "", 0, 0.0) if INFERENCE in ids(gaps) else _bars(gaps, INFERENCE, 1, 0.0)
    return [*own, *_other_families(per_datapoint(ledger))]


def pieces_of(bar: Bar, bars: list[Bar]) -> list[Bar]:
    """What a row is drawn of: the root of its parts, where none of them is negative; any other of itself."""
    parts = [part for part in bars if part.depth == 1]
    return parts if bar.depth == 0 and parts and all(part.length >= 0 for part in parts) else [bar]


def _bars(gaps: xr.Dataset, parent: str, depth: int, start: float) -> Iterator[Bar]:
    """Bars of the parts of `parent`, end to end from `start`, each followed by its own parts."""
    for name in ids(gaps):
        if parent_of(gaps, name) != parent:
            continue
        row = gaps.sel(gap=name)
        length, error, mcse = (float(row[column]) for column in ("mean", "standard_error", "mcse"))
        label, colour, hatch = (str(row[word].item()) for word in ("label", "colour", "hatch"))
        shown = "  " * depth + label.removesuffix(" gap") if depth else label
        yield Bar(shown, depth, start, length, error, colour, hatch, mcse)
        yield from _bars(gaps, name, depth + 1, start)
        start += length


def _other_families(dataset: xr.Dataset) -> Iterator[Bar]:
    """Bars of the other families' refined bounds below log p(x), in the colour of the approximation gap."""
    (colour,) = (term.colour for term in TERMS if term.id == "approximation_gap")
    for family in families(dataset):
        gap = values(dataset, "family_approximation_gap", family) if family != own_family(dataset) else None
        if gap is not None:
            mcse = values(dataset, "family_approximation_gap_mcse", family)
            error = np.nan if mcse is None else summary_mcse(mcse[np.isfinite(mcse)])
            yield Bar(f"{family}, refined", None, 0.0, *mean_and_error(gap), colour, "", error)


def _title(dataset: xr.Dataset) -> str:
    lines = [
        f"Inference gap and its parts, mean ± standard error over {counted(dataset.sizes['datapoint'], 'datapoint')}"
    ]
    bounds = {"log p(x)": values(dataset, "log_evidence"), "L[q]": values(dataset, "elbo")}
    measured = [f"{name} = {with_error(*mean_and_error(b))}" for name, b in bounds.items() if b is not None]
    return "\n".join([*lines, ", ".join(measured) + " nats"] if measured else lines)


def _draw(ax: Axes, row: int, bar: Bar) -> None:
    ax.barh(
        row,
        bar.length,
        left=bar.start,
        height=0.62,
        color=bar.colour,
        hatch=bar.hatch,
        edgecolor="0.2",
        linewidth=0.8,
    )


def _connect(ax: Axes, bars: list[Bar]) -> None:
    """Draw thin lines from the end of one part to the start of the next."""
    rows = [(row, bar) for row, bar in enumerate(bars) if bar.depth == 1]
    for (row, bar), (below, _) in pairwise(rows):
        end = bar.start + bar.length
        ax.plot([end, end], [row + 0.31, below - 0.31], color="0.45", lw=0.8, ls=":")


def _finish(ax: Axes, bars: list[Bar]) -> None:
    ax.axvline(0.0, color="black", lw=1.0)
    own = sum(bar.depth is not None for bar in bars)
    if 0 < own < len(bars):
        ax.axhline(own - 0.5, color="0.8", lw=0.8)
    ax.set_yticks(range(len(bars)), [bar.label for bar in bars])
    for label, bar in zip(ax.get_yticklabels(), bars, strict=True):
        label.set_fontweight("bold" if bar.depth == 0 else "normal")
        label.set_horizontalalignment("left")
    ax.tick_params(axis="y", length=0, pad=_pad(bars))
    ax.set_ylim(len(bars) - 0.5, -0.5)
    for row, bar in enumerate(bars):
        ax.annotate(
            with_error(bar.length, bar.error),
            (1.02, row),
            xycoords=("axes fraction", "data"),
            va="center",
            fontweight="bold" if bar.depth == 0 else "normal",
        )
    ax.set_xlabel("nats below log p(x)")
    ax.margins(x=0.03)
    ax.grid(axis="x", color="0.9", lw=0.8)
    tidy(ax)
    ax.spines["left"].set_visible(False)


def _pad(bars: list[Bar]) -> float:
    """Room in points for left-aligned labels."""
    return 6.0 + 6.0 * max(len(bar.label) for bar in bars)


def _drawable(error: float) -> float:
    return error if np.isfinite(error) else 0.0
