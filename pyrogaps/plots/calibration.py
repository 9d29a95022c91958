"""Plot of a calibration: ECDF of the ranks and coverage of intervals."""

from typing import Annotated, TypeAlias

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from pyrogaps.calibration import Calibration
from pyrogaps.calibration.summary import FAMILY_WISE, LOG_JOINT, deviating
from pyrogaps.calibration.uniformity import POINTS, uniformity_test
from pyrogaps.plots.source import LINES, SHADES, new_figure, tidy
from pyrogaps.settings import Limit, checked

GRID = np.linspace(0, 1, 401)
FAINT, DEVIATING = "0.6", "0.3"
MAX_HIGHLIGHTED = 4
Drawn: TypeAlias = Annotated[
    Calibration | xr.DataTree,
    Limit(
        "a Calibration or a DataTree of one",
        remedy="Pass what calibrate returned, or open a saved calibration with xarray.open_datatree",
    ),
]


@checked()
def plot_calibration(calibration: Drawn, figure: FigureBase | None = None) -> FigureBase:
    """Draw how far the ranks of a calibration are from uniform, one line per latent dimension.

    Left, the ECDF of the normalised ranks minus its expectation, as in `arviz_plots.plot_ecdf_pit`. A hump means that
    the truth lies below the posterior too often, a trough above it too often. A hump followed by a trough means that
    the posterior is too narrow, a trough followed by a hump too wide. Right, the coverage of central intervals minus
    their nominal probability, in percentage points: below zero where the posterior is too narrow (or misplaced). Up to
    four latent dimensions that deviate significantly (see `Calibration.summary`) are drawn in colour, the worst first,
    other deviating ones in dark grey, all others in light grey. The dotted line on the left is log p(x, z).

    The band is exact, simultaneous over each line, and adjusted for the number of lines: all lines of a calibrated
    posterior stay within it in 99 of 100 cases. Where masks leave some dimensions fewer datapoints than others, the
    lighter band is that for the smallest number.

    Args:
        calibration: a `Calibration`, or the `DataTree` that it was saved as.
        figure: a figure or subfigure to draw in; by default a new figure.

    Returns:
        The figure drawn in.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> figure = pg.plot_calibration(pg.calibrate(model, guide, x, num_simulated=100, num_draws=100))
        >>> len(figure.axes) > 0
        True
    """
    if isinstance(calibration, xr.DataTree):
        calibration = Calibration.from_datatree(calibration)
    if figure is None:
        figure = new_figure(10, 4.2)
    pit, summary = calibration.per_simulated["pit"].values, calibration.summary()
    left, right = figure.subplots(1, 2)
    _band(left, summary)
    _lines(left, pit, summary)
    log_joint = calibration.per_simulated["log_joint_pit"].values
    left.plot(GRID, difference(log_joint), color="black", lw=1.2, ls=(0, (1, 1.5)), label=_label(LOG_JOINT, summary))
    left.set_xlabel("normalised rank of the truth")
    left.set_ylabel("ECDF − uniform")
    left.set_title("Ranks among the posterior's draws", loc="left", fontsize="medium")
    _band(right, summary, 100)
    _lines(right, np.abs(2 * pit - 1), summary, 100)
    right.set_xlabel("central interval (%)")
    right.set_xticks(np.linspace(0, 1, 5), ["0", "25", "50", "75", "100"])
    right.set_ylabel("coverage − nominal (percentage points)")
    right.set_title("Coverage", loc="left", fontsize="medium")
    for ax in (left, right):
        ax.axhline(0, color="0.35", lw=0.8)
        ax.set_xlim(0, 1)
        tidy(ax)
    for text, height, side in (("too wide", 0.98, "top"), ("too narrow", 0.02, "bottom")):
        right.text(0.02, height, text, transform=right.transAxes, va=side, color="0.35")
    handles, labels = left.get_legend_handles_labels()
    columns = min(len(labels), 4)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
    return figure


def difference(values: np.ndarray) -> np.ndarray:
    """The ECDF of `values`, without NaN, minus that of U(0, 1), at `GRID`; NaN where there are none."""
    finite = np.sort(values[np.isfinite(values)])
    if not len(finite):
        return np.full(len(GRID), np.nan)
    return np.searchsorted(finite, GRID, side="right") / len(finite) - GRID


def _lines(ax: Axes, values: np.ndarray, summary: pd.DataFrame, scale: float = 1.0) -> None:
    """A line for each column of `values` `(N, dim)`."""
    deviations = list(deviating(summary).index)
    labelled: set[str] = set()
    for name, column in zip(summary.index, values.T, strict=False):
        if name in deviations[:MAX_HIGHLIGHTED]:
            continue
        deviates = name in deviations
        label = "other deviating dimensions" if deviates else "no significant deviation"
        ax.plot(
            GRID,
            scale * difference(column),
            color=DEVIATING if deviates else FAINT,
            lw=0.8,
            label=None if label in labelled else label,
        )
        labelled.add(label)
    for name, line, shade in zip(deviations[:MAX_HIGHLIGHTED], LINES, SHADES, strict=False):
        column = values[:, summary.index.get_loc(name)]
        ax.plot(GRID, scale * difference(column), color=shade, ls=line, lw=1.5, label=_label(str(name), summary))


def _label(name: str, summary: pd.DataFrame) -> str:
    finding = summary["finding"][name]
    shown = f"{name} of the draws" if name == LOG_JOINT else name
    return f"{shown}: {finding}" if finding else shown


def _band(ax: Axes, summary: pd.DataFrame, scale: float = 1.0) -> None:
    """The band for the largest number of datapoints of a line and, lighter, for the smallest."""
    counts = summary["count"][summary["count"] > 0]
    level = 1 - FAMILY_WISE / len(summary)
    at = np.concatenate([[0], POINTS, [1]])
    for number, shade in sorted({int(counts.min()): "0.96", int(counts.max()): "0.91"}.items()):
        low, high = (np.concatenate([[0], end - POINTS, [0]]) for end in uniformity_test(number).band(level))
        label = f"{1 - FAMILY_WISE:.0%} band" if shade == "0.91" else None
        ax.fill_between(at, scale * low, scale * high, color=shade, lw=0, label=label)
