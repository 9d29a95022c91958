"""Amortization against approximation gap per datapoint, and the inputs with the largest gaps."""

import math

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from pyrogaps.gaps.terms import INFERENCE
from pyrogaps.plots.source import (
    Ledger,
    group,
    new_figure,
    note,
    per_datapoint,
    tidy,
    values,
)
from pyrogaps.settings import Whole, checked

APPROXIMATION, AMORTIZATION, OPTIMIZATION = "approximation_gap", "amortization_gap", "guide_optimization_gap"
POINTS_WITH_ERROR_BARS = 1000


@checked()
def plot_datapoints(ledger: Ledger, figure: FigureBase | None = None, *, num_images: Whole = 12) -> FigureBase:
    """Scatter each datapoint's amortization gap against its approximation gap, in nats.

    Where nothing is amortized, the optimization gap takes the place of the amortization gap.

    Light bars are Monte Carlo standard errors. Dashed diagonals join equal inference gaps; crosses are datapoints
    whose refinement has not converged. Where the ledger holds inputs that look like images, the `num_images` with
    the largest inference gap are shown beside the scatter, numbered in it from the largest down.

    Args:
        ledger: a `GapLedger`, or a `DataTree` or `InferenceData` with its groups.
        figure: a figure or subfigure to draw in; by default a new figure.
        num_images: largest number of inputs to show.

    Returns:
        The figure drawn in.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> ledger = pg.decompose(model, guide, x, num_particles=50, progress=False)
        >>> len(pg.plot_datapoints(ledger).axes) > 0
        True
    """
    dataset = per_datapoint(ledger)
    worst = _worst(dataset, num_images)
    images = images_of(group(ledger, "observed", "observed_data"), worst)
    if figure is None:
        figure = new_figure(10 if images is not None else 5.5, 4.4)
    if images is None:
        _scatter(figure.add_subplot(), dataset, worst[:0])
        return figure
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    grid = figure.add_gridspec(1, 2, width_ratios=[1.25, 1])
    _scatter(figure.add_subplot(grid[0]), dataset, worst)
    _gallery(figure, grid[1].subgridspec(rows, columns), images, worst, dataset)
    return figure


def _worst(dataset: xr.Dataset, count: int) -> np.ndarray:
    """Positions of the `count` largest inference gaps, the largest first."""
    gap = values(dataset, INFERENCE)
    if gap is None:
        return np.zeros(0, dtype=int)
    order = np.argsort(-np.where(np.isfinite(gap), gap, -np.inf))
    return order[: min(count, int(np.isfinite(gap).sum()))]


def _scatter(ax: Axes, dataset: xr.Dataset, numbered: np.ndarray) -> None:
    other = AMORTIZATION if AMORTIZATION in dataset else OPTIMIZATION
    across, up = values(dataset, APPROXIMATION), values(dataset, other)
    if across is None or up is None:
        note(ax, "needs both the approximation\nand the amortization gap")
        return
    if len(across) <= POINTS_WITH_ERROR_BARS:
        ax.errorbar(
            across,
            up,
            xerr=values(dataset, f"{APPROXIMATION}_mcse"),
            yerr=values(dataset, f"{other}_mcse"),
            ls="none",
            color="0.8",
            lw=0.6,
            zorder=1,
        )
    _points(ax, across, up, values(dataset, "converged"))
    for rank, position in enumerate(numbered, start=1):
        if np.isfinite(across[position]) and np.isfinite(up[position]):
            ax.annotate(str(rank), (across[position], up[position]), (3, 3), textcoords="offset points", fontsize=8)
    ax.axhline(0, color="0.5", lw=0.8)
    ax.axvline(0, color="0.5", lw=0.8)
    _diagonals(ax)
    ax.set_xlabel("approximation gap (nats)")
    ax.set_ylabel("amortization gap (nats)" if other == AMORTIZATION else "optimization gap (nats)")
    ax.set_title("Gaps of each datapoint (dashed: equal inference gap)", loc="left", fontsize="medium")
    tidy(ax)


def _points(ax: Axes, across: np.ndarray, up: np.ndarray, converged: np.ndarray | None) -> None:
    has_converged = np.ones(len(across), dtype=bool) if converged is None else converged > 0
    opacity = float(np.clip(40 / math.sqrt(len(across)), 0.15, 0.8))
    rasterized = len(across) > POINTS_WITH_ERROR_BARS
    ax.scatter(
        across[has_converged],
        up[has_converged],
        s=14,
        color="#2f5d8c",
        alpha=opacity,
        linewidths=0,
        rasterized=rasterized,
        label="converged",
    )
    if not has_converged.all():
        label = f"refinement not converged ({int((~has_converged).sum())})"
        ax.scatter(across[~has_converged], up[~has_converged], s=18, marker="x", color="#c8641e", lw=1.0, label=label)
        ax.legend(frameon=False, fontsize="small", loc="best")


def _diagonals(ax: Axes) -> None:
    """Lines of equal inference gap behind the points, within the limits set by the points."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    step = max(right - left, top - bottom) / 3
    levels = np.arange(math.floor((left + bottom) / step), math.ceil((right + top) / step) + 1) * step
    for level in levels:
        ax.plot([left, right], [level - left, level - right], color="0.9", lw=0.8, ls="--", zorder=0)
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)


def _gallery(figure: FigureBase, grid, images: list[np.ndarray], worst: np.ndarray, dataset: xr.Dataset) -> None:  # type: ignore[no-untyped-def]
    gap = values(dataset, INFERENCE)
    assert gap is not None
    labels = dataset["datapoint"].values if "datapoint" in dataset.coords else np.arange(dataset.sizes["datapoint"])
    low, high = min(float(image.min()) for image in images), max(float(image.max()) for image in images)
    for rank, (image, position) in enumerate(zip(images, worst, strict=True), start=1):
        ax = figure.add_subplot(grid[divmod(rank - 1, grid.ncols)])
        shown = (image - low) / ((high - low) or 1.0)
        ax.imshow(shown, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_color("0.7")
        ax.set_title(f"{rank}: #{labels[position]}\n{gap[position]:.1f} nats", fontsize=8)


def images_of(observed: xr.Dataset, positions: np.ndarray) -> list[np.ndarray] | None:
    """The inputs at `positions` as images `(height, width)` or `(height, width, 3)`; None where they are not images."""
    if "x" not in observed or not len(positions):
        return None
    x = np.asarray(observed["x"].values)
    shape = image_shape(x.shape[1:])
    if shape is None or x.dtype.kind not in "fiub" or max(positions) >= len(x):
        return None
    selected = np.nan_to_num(x[positions].astype(float)).reshape(len(positions), *shape)
    return [image.transpose(1, 2, 0) if len(shape) == 3 and shape[0] == 3 else image for image in selected]


def image_shape(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The image shape of one input of `shape`: `(height, width)`, `(3, height, width)` or `(height, width, 3)`.

    Flat inputs are images where their length is a square, or three squares (channels first), of side 4 or more.
    """
    if len(shape) == 3 and 1 in (shape[0], shape[-1]):
        shape = shape[1:] if shape[0] == 1 else shape[:-1]
    if len(shape) == 3:
        return shape if 3 in (shape[0], shape[-1]) and min(sorted(shape)[1:]) >= 4 else None
    if len(shape) == 2:
        return shape if min(shape) >= 4 else None
    if len(shape) != 1:
        return None
    for channels in (1, 3):
        side = math.isqrt(shape[0] // channels)
        if side >= 4 and channels * side * side == shape[0]:
            return (side, side) if channels == 1 else (3, side, side)
    return None
