"""Differences of ledgers with their errors, one row a quantity."""

from typing import Annotated, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from pyrogaps.errors import counted
from pyrogaps.gaps.comparison import Comparison
from pyrogaps.gaps.differences import UNTRUSTED
from pyrogaps.gaps.terms import ids
from pyrogaps.plots.source import new_figure, note, tidy
from pyrogaps.settings import Limit, checked

NEUTRAL = "#2f5d8c"
Compared = Annotated[Comparison, Limit("a Comparison", remedy="Pass what compare returned")]


@checked()
def plot_comparison(comparison: Compared, figure: FigureBase | None = None) -> FigureBase:
    """Draw the differences of a comparison in nats, one panel for every ledger beside the reference.

    A point is the mean of paired differences, the reference less the other, over the datapoints that can be trusted. A
    thick bar stands between the ends where log p(x) is known between bounds, thin bars reach one standard error of the
    mean further, over datapoints and draws. Hollow points are quantities of which too few datapoints can be trusted for
    a verdict; those without finite ends are named and not drawn.

    Args:
        comparison: what `compare` returned.
        figure: a figure or subfigure to draw in; by default a new figure.

    Returns:
        The figure drawn in.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> ledgers = [pg.decompose(model, guide, x, seed=s, num_particles=50, progress=False) for s in (0, 1)]
        >>> len(pg.plot_comparison(pg.compare(*ledgers)).axes)
        1
    """
    others = comparison.names[1:]
    if figure is None:
        rows = int(comparison.differences.sizes["quantity"])
        figure = new_figure(7.5, len(others) * (1.3 + 0.34 * rows))
    axes = figure.subplots(len(others), 1, squeeze=False, sharex=True)[:, 0]
    for ax, other in zip(axes, others, strict=True):
        _draw(ax, comparison, other)
    return figure


def _draw(ax: Axes, comparison: Comparison, other: str) -> None:
    rows = comparison.differences.sel(other=other)
    rows = rows.isel(quantity=np.isfinite(rows["mean"].values))
    names = [str(name) for name in rows["quantity"].values]
    if not names:
        note(ax, "nothing to compare")
        return
    labels = []
    for place, name in enumerate(names):
        row = rows.sel(quantity=name)
        labels.append(str(row["label"].item()))
        if np.isfinite([float(row[end]) for end in ("low", "high")]).all():
            _point(ax, place, row, _colour(comparison, name))
        else:
            labels[-1] += " (not bounded)"
    number = int(rows["num_datapoints"].max())
    ax.axvline(0, color="0.3", lw=0.9)
    ax.set_yticks(range(len(names)), labels)
    ax.set_ylim(len(names) - 0.5, -0.5)
    title = f"'{comparison.reference}' less '{other}', {counted(number, 'datapoint')}, paired"
    ax.set_title(title, loc="left", fontsize="medium")
    ax.set_xlabel("difference (nats per datapoint), ± one standard error")
    tidy(ax)


def _point(ax: Axes, place: int, row: Any, colour: str) -> None:
    low, high = float(row["low"]), float(row["high"])
    hollow = str(row["verdict"].item()) == UNTRUSTED
    ends = low - float(row["low_error"]), high + float(row["high_error"])
    ax.plot(ends, [place, place], color=colour, lw=1.2, zorder=2)
    ax.plot([low, high], [place, place], color=colour, lw=5, solid_capstyle="butt", zorder=2)
    face = "white" if hollow else colour
    ax.plot([(low + high) / 2], [place], "o", ms=6, color=colour, markerfacecolor=face, zorder=3)


def _colour(comparison: Comparison, name: str) -> str:
    if name not in ids(comparison.gaps) or "colour" not in comparison.gaps:
        return NEUTRAL
    colour = str(comparison.gaps["colour"].sel(gap=name).item())
    return "#6f6f6f" if colour == "#d9d9d9" else colour  # a line in the light grey of a bar is hard to see
