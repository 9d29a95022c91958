"""Traces of the estimators: the refinement of each family, and the annealing."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from pyrogaps.plots.source import LINES, SHADES, Ledger, families, group, new_figure, note, per_datapoint, tidy, values
from pyrogaps.settings import checked

ANNEALING = {"acceptance_by_temperature": "acceptance", "ess_by_temperature": "ESS / chains"}


@checked()
def plot_traces(ledger: Ledger, figure: FigureBase | None = None) -> FigureBase:
    """Draw the traces of a decomposition: ELBO during refinement, and acceptance and ESS during annealing.

    Left, each family's bound during refinement, in nats, averaged over datapoints, between the guide's bound L[q] and
    log p(x): a curve that still rises at its end needs more steps. Right, where log p(x) is by `AIS`, against its
    inverse temperature, the mean acceptance probability of HMC (good between 0.5 and 0.9) and the effective sample size
    of the running weights as a share of the chains: where it collapses, increase the number of temperatures.

    Args:
        ledger: a `GapLedger`, or a `DataTree` or `InferenceData` with its groups.
        figure: a figure or subfigure to draw in; by default a new figure.

    Returns:
        The figure drawn in.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> ledger = pg.decompose(model, guide, x, num_particles=50, progress=False)
        >>> len(pg.plot_traces(ledger).axes) > 0
        True
    """
    traces = group(ledger, "traces")
    annealed = any(values(traces, name) is not None for name in ANNEALING)
    if figure is None:
        figure = new_figure(10 if annealed else 6, 3.4)
    axes = figure.subplots(1, 1 + annealed, squeeze=False)[0]
    _refinement(axes[0], traces, per_datapoint(ledger))
    if annealed:
        _annealing(axes[1], traces)
    return figure


def _refinement(ax: Axes, traces: xr.Dataset, dataset: xr.Dataset) -> None:
    ax.set_title("Refinement", loc="left", fontsize="medium")
    curves = {name: values(traces, "refined_elbo", name) for name in families(traces)}
    drawn = {name: curve for name, curve in curves.items() if curve is not None}
    if not drawn:
        note(ax, "no refinement was traced")
        return
    steps = _coordinate(traces, "refinement_step", len(next(iter(drawn.values()))))
    for (name, curve), line, shade in zip(drawn.items(), _cycle(LINES), _cycle(SHADES), strict=False):
        ax.plot(steps, curve, ls=line, color=shade, lw=1.4, label=name)
    levels = {"log p(x)": values(dataset, "log_evidence"), "L[q]": values(dataset, "elbo")}
    heights = {label: float(np.nanmean(array)) for label, array in levels.items() if array is not None}
    for label, height in heights.items():
        _level(ax, height, label, above=label == "log p(x)")
    _readable_limits(ax, list(drawn.values()), list(heights.values()))
    ax.set_xlabel("refinement step")
    ax.set_ylabel("mean ELBO (nats)")
    _legend_above(ax)
    tidy(ax)


def _annealing(ax: Axes, traces: xr.Dataset) -> None:
    ax.set_title("Annealing", loc="left", fontsize="medium")
    drawn = {label: values(traces, name) for name, label in ANNEALING.items()}
    for (label, curve), line, shade in zip(drawn.items(), LINES, SHADES, strict=False):
        if curve is not None:
            schedule = values(traces, "inverse_temperature")
            across = np.linspace(0, 1, len(curve)) if schedule is None else schedule
            ax.plot(across, curve, ls=line, color=shade, lw=1.4, label=label)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.03)
    ax.set_xlabel("inverse temperature")
    ax.set_ylabel("share")
    _legend_above(ax)
    tidy(ax)


def _legend_above(ax: Axes) -> None:
    """Place the legend beside the title, where it covers no curve."""
    ax.legend(
        frameon=False, fontsize="small", loc="lower right", bbox_to_anchor=(1.02, 0.98), ncols=3, columnspacing=1.2
    )


def _level(ax: Axes, height: float, label: str, *, above: bool) -> None:
    ax.axhline(height, color="0.55", lw=0.9)
    ax.annotate(
        label,
        (0.99, height),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2 if above else -2),
        textcoords="offset points",
        ha="right",
        va="bottom" if above else "top",
        color="0.35",
        fontsize=8,
    )


def _readable_limits(ax: Axes, curves: list[np.ndarray], levels: list[float]) -> None:
    """Cut off the low values of the first steps, which would flatten the ends of the curves."""
    bottom, _ = ax.get_ylim()
    ends = [*levels, *(float(curve[np.isfinite(curve)][-1]) for curve in curves)]
    low, high = min(ends), max(ends)
    if high > low:
        span = high - low
        ax.set_ylim(min(max(bottom, low - 1.5 * span), low - 0.15 * span), high + 0.25 * span)


def _coordinate(dataset: xr.Dataset, name: str, length: int) -> np.ndarray:
    return np.asarray(dataset[name].values) if name in dataset.coords else np.arange(length)


def _cycle(entries: list) -> list:  # type: ignore[type-arg]
    return entries * 10
