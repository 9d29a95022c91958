"""Simulation-based calibration: the ECDF of each latent dimension's ranks, and the coverage of its intervals."""

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from pyrogaps.calibration import Calibration
from pyrogaps.calibration.summary import FAMILY_WISE, LOG_JOINT, deviating
from pyrogaps.calibration.uniformity import POINTS, uniformity_test
from pyrogaps.plots.source import LINES, SHADES, new_figure, tidy

AT = np.linspace(0, 1, 401)
FAINT, DEVIATING = "0.6", "0.3"
HIGHLIGHTED = 4


def plot_calibration(calibration: Calibration | xr.DataTree, figure: FigureBase | None = None) -> FigureBase:
    """Draw how far the ranks of a calibration are from uniform, one line a latent dimension.

    Left, the ECDF of the normalised ranks less its expectation, as `arviz_plots.plot_ecdf_pit` has it: a hump says that
    the truth lies too often below the posterior, a trough above it, trough after hump that the posterior is too
    narrow, hump after trough too wide. Right, how much more often than they say central intervals hold the truth, in
    percentage points, below zero where the posterior is too narrow (or misplaced). Up to four latent dimensions that
    deviate beyond chance (see `Calibration.summary`) are drawn in colour, the worst first, further ones in dark grey,
    all others in light grey; the dotted line at the left is log p(x, z).

    The band is exact, simultaneous over each line and allows for the number of lines: of a calibrated posterior, all
    stay within it in 99 cases of 100. Where masks leave some dimensions fewer datapoints than others, the lighter band
    is that of the fewest.

    Args:
        calibration: a `Calibration`, or the `DataTree` that it was saved as.
        figure: a figure or subfigure to draw in; by default a new figure.

    Returns:
        The figure drawn in.
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
    left.plot(AT, _difference(log_joint), color="black", lw=1.2, ls=(0, (1, 1.5)), label=_told(LOG_JOINT, summary))
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


def _difference(values: np.ndarray) -> np.ndarray:
    """The ECDF of `values`, NaN left out, less that of U(0, 1), at `AT`; NaN where there are none."""
    finite = np.sort(values[np.isfinite(values)])
    if not len(finite):
        return np.full(len(AT), np.nan)
    return np.searchsorted(finite, AT, side="right") / len(finite) - AT


def _lines(ax: Axes, values: np.ndarray, summary: pd.DataFrame, scale: float = 1.0) -> None:
    """A line for each column of `values` `(N, dim)`."""
    found = list(deviating(summary).index)
    labelled: set[str] = set()
    for name, column in zip(summary.index, values.T, strict=False):
        if name in found[:HIGHLIGHTED]:
            continue
        deviates = name in found
        label = "further ones that deviate" if deviates else "no deviation beyond chance"
        ax.plot(
            AT,
            scale * _difference(column),
            color=DEVIATING if deviates else FAINT,
            lw=0.8,
            label=None if label in labelled else label,
        )
        labelled.add(label)
    for name, line, shade in zip(found[:HIGHLIGHTED], LINES, SHADES, strict=False):
        column = values[:, summary.index.get_loc(name)]
        ax.plot(AT, scale * _difference(column), color=shade, ls=line, lw=1.5, label=_told(str(name), summary))


def _told(name: str, summary: pd.DataFrame) -> str:
    finding = summary["finding"][name]
    shown = f"{name} of the draws" if name == LOG_JOINT else name
    return f"{shown}: {finding}" if finding else shown


def _band(ax: Axes, summary: pd.DataFrame, scale: float = 1.0) -> None:
    """Where all lines stay, as a rule: for those of most datapoints and, lighter, of fewest."""
    counts = summary["count"][summary["count"] > 0]
    level = 1 - FAMILY_WISE / len(summary)
    at = np.concatenate([[0], POINTS, [1]])
    for number, shade in sorted({int(counts.min()): "0.96", int(counts.max()): "0.91"}.items()):
        low, high = (np.concatenate([[0], end - POINTS, [0]]) for end in uniformity_test(number).band(level))
        label = f"{1 - FAMILY_WISE:.0%} band" if shade == "0.91" else None
        ax.fill_between(at, scale * low, scale * high, color=shade, lw=0, label=label)
