"""Gaps against the steps of a training."""

from typing import Annotated

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pyrogaps.errors import counted
from pyrogaps.gaps.terms import ids
from pyrogaps.monitor import ERRORS, GapMonitor
from pyrogaps.plots.source import LINES, new_figure, note, tidy
from pyrogaps.settings import Limit, checked

Monitored = Annotated[GapMonitor, Limit("a GapMonitor", remedy="Pass the monitor that a training has called")]
PALE, DARK = "#d9d9d9", "#6f6f6f"  # a line in the light grey of a bar is hard to see


@checked()
def plot_monitor(monitor: Monitored, ax: Axes | None = None) -> Axes:
    """Draw the gaps against the step, in nats.

    Lines are means over the datapoints, bands reach one standard error over datapoints, or the Monte Carlo error where
    that is larger, to either side. Points are hollow at steps with unreliable log p(x), refinement that has not
    converged or a warning, which `print(monitor)` shows. A cross on the axis marks a step that could not be measured.

    Args:
        monitor: a `GapMonitor`.
        ax: axes to draw in; by default those of a new figure.

    Returns:
        The axes drawn in.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(60, 4)
        >>> monitor = pg.GapMonitor(model, guide, x, every=1, datapoints=16)
        >>> result = pg.train(model, guide, x, num_epochs=2, callback=monitor, progress=False)
        >>> pg.plot_monitor(monitor).get_xlabel()
        'step'
    """
    ax = new_figure(7.0, 4.2).add_subplot() if ax is None else ax
    ledgers = monitor.ledgers
    if not ledgers:
        note(ax, "nothing measured")
        return ax
    history = monitor.history
    steps = history.index.to_numpy()
    flagged = np.array([record.doubtful for record in monitor.records])
    gaps = [*ledgers.values()][-1].gaps
    for place, name in enumerate(ids(gaps)):
        row = gaps.sel(gap=name)
        colour = str(row["colour"].item())
        colour = DARK if colour == PALE else colour
        mean = history[name].to_numpy(dtype=float)
        error = np.nan_to_num(np.fmax(*(history[f"{name}_{kind}"].to_numpy(dtype=float) for kind in ERRORS)))
        ax.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.2, lw=0)
        ax.plot(steps, mean, color=colour, ls=LINES[place % len(LINES)], label=str(row["label"].item()))
        for shown, face in ((flagged, "white"), (~flagged, colour)):
            ax.plot(steps[shown], mean[shown], "o", ms=5, color=colour, markerfacecolor=face)
    if len(missing := [record.step for record in monitor.records if record.ledger is None]):
        ax.plot(missing, np.zeros(len(missing)), "x", color="0.3", clip_on=False, label="not measured",
                transform=ax.get_xaxis_transform())  # fmt: skip
    ax.axhline(0, color="0.3", lw=0.9)
    hollow = " (hollow: see the warnings)" if flagged.any() else ""
    ax.set_title(f"Gaps of {counted(len(monitor.indices), 'datapoint')}{hollow}", loc="left", fontsize="medium")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("step")
    ax.set_ylabel("nats per datapoint, ± one standard error")
    ax.legend(frameon=False)
    tidy(ax)
    return ax
