"""The gap bars: where the nats between the guide's bound and log p(x) go."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from pyrogaps.gaps.split import CAPACITY, GENERALIZATION, OPTIMIZATION, parts_of
from pyrogaps.plots.source import (
    AMORTIZATION,
    APPROXIMATION,
    COLOURS,
    CONDITIONING,
    HATCHES,
    INFERENCE,
    Source,
    families,
    group,
    mean_and_error,
    new_figure,
    note,
    own_family,
    per_datapoint,
    tidy,
    values,
    with_error,
)

TREE = (APPROXIMATION, CONDITIONING, AMORTIZATION)
CHILDREN = (CAPACITY, OPTIMIZATION, GENERALIZATION)


@dataclass(frozen=True)
class Bar:
    """One row: from `start` nats below log p(x), `length` nats long, negative towards log p(x)."""

    label: str
    kind: str
    start: float
    length: float
    error: float
    emphasis: bool = False


def plot_gaps(source: Source, ax: Axes | None = None) -> Axes:
    """Draw mean gaps in nats as bars on one axis, "nats below log p(x)", with one standard error over datapoints.

    The first row is the guide's inference gap, log p(x) - L[q], stacked of its parts. Below it the parts follow one
    another along the axis: the approximation gap ends at the refined bound L[q*] of the guide's own family, the
    conditioning gap (where measured) starts there, and the amortization gap ends at L[q]; where it is split, its own
    parts follow one another below it. A part below zero runs backwards, and then the first row shows the total only.
    The last rows are the refined bounds of the other families.

    Args:
        source: a `GapLedger`, or a `DataTree` or `InferenceData` with its groups.
        ax: where to draw; by default a new figure.

    Returns:
        The axes.
    """
    dataset, training = per_datapoint(source), group(source, "training", "training_data")
    bars = [*_tree(dataset), *_children(dataset, training), *_other_families(dataset)]
    if ax is None:
        ax = new_figure(8, 1.1 + 0.42 * max(len(bars), 2)).add_subplot()
    if not bars:
        note(ax, "no gaps were measured")
        return ax
    parts = [bar for bar in bars if bar.kind in TREE and bar.label == _name(bar.kind)]
    for row, bar in enumerate(bars):
        stacked = bar.kind == INFERENCE and parts and all(part.length >= 0 for part in parts)
        for piece in parts if stacked else [bar]:
            _draw(ax, row, piece)
        ax.errorbar(bar.start + bar.length, row, xerr=_drawable(bar.error), color="black", capsize=3, lw=1.2, ls="none")
    _connect(ax, bars)
    _finish(ax, bars)
    ax.set_title(_title(dataset), loc="left", fontsize="medium", linespacing=1.4)
    return ax


def _tree(dataset: xr.Dataset) -> list[Bar]:
    """The inference gap and, one behind the other, its parts."""
    bars, start = [], 0.0
    total = values(dataset, INFERENCE)
    if total is not None:
        bars.append(Bar("inference gap", INFERENCE, 0.0, *mean_and_error(total), emphasis=True))
    for kind in TREE:
        gap = values(dataset, kind)
        if gap is not None:
            mean, error = mean_and_error(gap)
            bars.append(Bar(_name(kind), kind, start, mean, error))
            start += mean
    return bars


def _children(dataset: xr.Dataset, training: xr.Dataset) -> list[Bar]:
    """The parts of a split amortization gap, one behind the other where that gap lies."""
    if not training.data_vars:
        return []
    bars, start = [], 0.0
    for kind in TREE[:-1]:
        gap = values(dataset, kind)
        start += 0.0 if gap is None else mean_and_error(gap)[0]
    for kind, part in parts_of(dataset, training):
        bars.append(Bar("  " + _name(kind), kind, start, part.mean, part.standard_error))
        start += part.mean
    return bars


def _other_families(dataset: xr.Dataset) -> list[Bar]:
    """What the other families' refined bounds leave below log p(x)."""
    own, bars = own_family(dataset), []
    for family in families(dataset):
        gap = values(dataset, "family_approximation_gap", family) if family != own else None
        if gap is not None:
            bars.append(Bar(f"{family}, refined", APPROXIMATION, 0.0, *mean_and_error(gap)))
    return bars


def _title(dataset: xr.Dataset) -> str:
    lines = [f"Inference gap and its parts, mean ± standard error over {dataset.sizes['datapoint']} datapoints"]
    bounds = {"log p(x)": values(dataset, "log_evidence"), "L[q]": values(dataset, "elbo")}
    measured = [f"{name} = {with_error(*mean_and_error(b))}" for name, b in bounds.items() if b is not None]
    return "\n".join([*lines, ", ".join(measured) + " nats"] if measured else lines)


def _name(kind: str) -> str:
    return "  " + kind.removesuffix("_gap")


def _draw(ax: Axes, row: int, bar: Bar) -> None:
    ax.barh(
        row,
        bar.length,
        left=bar.start,
        height=0.62,
        color=COLOURS[bar.kind],
        hatch=HATCHES[bar.kind],
        edgecolor="0.2",
        linewidth=0.8,
    )


def _connect(ax: Axes, bars: list[Bar]) -> None:
    """Thin lines from where one part ends to where the next starts."""
    rows = [(row, bar) for row, bar in enumerate(bars) if bar.label == _name(bar.kind)]
    for (row, bar), (below, _) in pairwise(rows):
        end = bar.start + bar.length
        ax.plot([end, end], [row + 0.31, below - 0.31], color="0.45", lw=0.8, ls=":")


def _finish(ax: Axes, bars: list[Bar]) -> None:
    ax.axvline(0.0, color="black", lw=1.0)
    own = sum(bar.label == _name(bar.kind) or bar.kind in (INFERENCE, *CHILDREN) for bar in bars)
    if 0 < own < len(bars):
        ax.axhline(own - 0.5, color="0.8", lw=0.8)
    ax.set_yticks(range(len(bars)), [bar.label for bar in bars])
    for label, bar in zip(ax.get_yticklabels(), bars, strict=True):
        label.set_fontweight("bold" if bar.emphasis else "normal")
        label.set_horizontalalignment("left")
    ax.tick_params(axis="y", length=0, pad=_pad(bars))
    ax.set_ylim(len(bars) - 0.5, -0.5)
    for row, bar in enumerate(bars):
        ax.annotate(
            with_error(bar.length, bar.error),
            (1.02, row),
            xycoords=("axes fraction", "data"),
            va="center",
            fontweight="bold" if bar.emphasis else "normal",
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
