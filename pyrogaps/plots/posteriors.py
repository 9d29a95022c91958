"""Posteriors over two latent dimensions: the true one and each guide's."""

from typing import Annotated, TypeAlias

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import FigureBase
from matplotlib.ticker import MaxNLocator

from pyrogaps.plots.datapoints import images_of
from pyrogaps.plots.source import SHADES, new_figure
from pyrogaps.settings import Limit, checked

# Shares of a posterior's mass that its contours enclose, the widest first.
SHARES = (0.99, 0.95, 0.8, 0.6, 0.4, 0.2)
OUTLINED = (0.95, 0.4)
# The share of every posterior of a column that its panels show.
SHOWN_SHARE = 0.998
TINTS = LinearSegmentedColormap.from_list("posterior", ["#e6edf5", SHADES[0], "#12263d"])
GREYS = LinearSegmentedColormap.from_list("true posterior", ["#ececec", "#8a8a8a", "#1c1c1c"])
OUTLINE = "#c8641e"
Grid: TypeAlias = Annotated[
    xr.Dataset,
    Limit("a Dataset with densities", lambda source: "density" in source, "Pass what posterior_grid returned"),
]


@checked()
def plot_posteriors(source: Grid, figure: FigureBase | None = None) -> FigureBase:
    """Draw p(z|x) and every q(z|x) over the two latent dimensions: one row per posterior, one column per datapoint.

    Filled contours enclose 99, 95, 80, 60, 40 and 20 percent of a posterior's mass; lines in the guides' panels are the
    95 and 40 percent contours of the true posterior. Panels of a column share one window with equal
    scales on both axes. The title of a guide's panel is its gap, log p(x) - L[q] in nats, where `source` has it, with
    its error where `source` has `gap_mcse`. Inputs that look like images are shown above their columns, below the
    coordinate "label" if there is one.

    Args:
        source: what `posterior_grid` returns.
        figure: a figure or subfigure to draw in; by default a new figure.

    Returns:
        The figure drawn in.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> grid = pg.posterior_grid(model, {"guide": guide}, x[:2], num_points=50, progress=False)
        >>> len(pg.plot_posteriors(grid).axes) > 3
        True
    """
    columns, names = source.sizes["datapoint"], [str(name) for name in source["posterior"].values]
    images = images_of(source, np.arange(columns))
    rows = len(names) + (images is not None)
    if figure is None:
        figure = new_figure(0.7 + 1.9 * columns, 0.5 + 1.75 * rows)
    heights, widths = [0.75] * (images is not None) + [1.0] * len(names), [0.1] + [1.0] * columns
    layout = figure.add_gridspec(rows, 1 + columns, height_ratios=heights, width_ratios=widths)
    for row, name in enumerate(names, start=rows - len(names)):
        _row_label(figure.add_subplot(layout[row, 0]), name)
    for column in range(columns):
        panel = source.isel(datapoint=column)
        axes = [figure.add_subplot(layout[row, 1 + column]) for row in range(rows)]
        axes[0].set_title(_heading(panel), fontsize=8, linespacing=1.35)
        if images is not None:
            _image(axes.pop(0), images[column])
        _column(axes, panel)
    return figure


def _column(axes: list[Axes], panel: xr.Dataset) -> None:
    """One datapoint's posteriors, from the true one down."""
    across, up = panel["grid_1"].values, panel["grid_2"].values
    densities = np.asarray(panel["density"].values, dtype=float)
    (left, right), (bottom, top) = _window(across, up, densities)
    for row, (ax, density) in enumerate(zip(axes, densities, strict=True)):
        _fill(ax, across, up, density, TINTS if row else GREYS)
        if row:
            levels = _levels(densities[0], OUTLINED)
            ax.contour(across, up, densities[0].T, levels=levels, colors=OUTLINE, linewidths=0.7)
            _write_gap(ax, panel.isel(posterior=row))
        ax.set_xlim(left, right)
        ax.set_ylim(bottom, top)
        ax.set_aspect("equal")
        _dress(ax, last=row == len(axes) - 1)


def _fill(ax: Axes, across: np.ndarray, up: np.ndarray, density: np.ndarray, tints: LinearSegmentedColormap) -> None:
    levels = _levels(density, SHARES)
    if len(levels):
        shades = tints(np.linspace(0, 1, len(levels)))
        ax.contourf(across, up, density.T, levels=[*levels, np.inf], colors=shades)


def _levels(density: np.ndarray, shares: tuple[float, ...]) -> np.ndarray:
    """Increasing densities whose superlevel sets hold `shares` of the mass on the grid."""
    ordered = np.sort(density, axis=None)[::-1]
    held = np.cumsum(ordered)
    if not held[-1] > 0:
        return np.zeros(0)
    positions = np.searchsorted(held, np.array(shares) * held[-1])
    return np.unique(ordered[np.minimum(positions, ordered.size - 1)])


def _window(across: np.ndarray, up: np.ndarray, densities: np.ndarray) -> tuple[tuple[float, float], ...]:
    """A square that holds a share `SHOWN_SHARE` of all `densities`, with a margin."""
    ends = []
    for axis, others in ((across, 2), (up, 1)):
        lows, highs = [], []
        for marginal in densities.sum(others):
            held = np.cumsum(marginal) / max(marginal.sum(), np.finfo(float).tiny)
            first, last = np.searchsorted(held, [(1 - SHOWN_SHARE) / 2, (1 + SHOWN_SHARE) / 2])
            lows.append(float(axis[min(first, len(axis) - 1)]))
            highs.append(float(axis[min(last, len(axis) - 1)]))
        ends.append((min(lows), max(highs)))
    half = 0.56 * max(high - low for low, high in ends)
    return tuple(((low + high) / 2 - half, (low + high) / 2 + half) for low, high in ends)


def _write_gap(ax: Axes, panel: xr.Dataset) -> None:
    if "gap" not in panel or not np.isfinite(panel["gap"]):
        return
    error = float(panel["gap_mcse"]) if "gap_mcse" in panel else np.nan
    text = f"{float(panel['gap']):.2f}" + (f" ± {error:.2f}" if np.isfinite(error) else "") + " nats"
    ax.set_title(text.replace("-", "\N{MINUS SIGN}"), fontsize=7, pad=2.5, color="0.25")


def _heading(panel: xr.Dataset) -> str:
    lines = [str(panel["label"].values)] if "label" in panel.coords else []
    log_evidence = f"{float(panel['log_evidence']):.1f}".replace("-", "\N{MINUS SIGN}")
    lines.append(f"#{panel['datapoint'].values}: log p(x) = {log_evidence}")
    return "\n".join(lines)


def _image(ax: Axes, image: np.ndarray) -> None:
    low, high = float(image.min()), float(image.max())
    ax.imshow((image - low) / ((high - low) or 1.0), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_color("0.7")


def _row_label(ax: Axes, name: str) -> None:
    ax.set_axis_off()
    ax.text(0.5, 0.5, name, rotation=90, ha="center", va="center", fontsize=9, transform=ax.transAxes)


def _dress(ax: Axes, *, last: bool) -> None:
    """Set thin frames and ticks; only the last row of a column has tick labels and axis names."""
    ax.spines[:].set_color("0.6")
    ax.spines[:].set_linewidth(0.6)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(3, min_n_ticks=2))
    ax.tick_params(labelsize=6, length=2, width=0.6, color="0.6", labelbottom=last, labelleft=last, pad=1.5)
    if last:
        ax.set_xlabel("$z_1$", fontsize=8, labelpad=1)
        ax.set_ylabel("$z_2$", fontsize=8, labelpad=3)
