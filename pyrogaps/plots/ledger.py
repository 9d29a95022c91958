"""All plots of one decomposition on one page."""

from matplotlib.figure import FigureBase

from pyrogaps.plots.datapoints import plot_datapoints
from pyrogaps.plots.gaps import plot_gaps
from pyrogaps.plots.source import Ledger, families, new_figure, per_datapoint
from pyrogaps.plots.traces import plot_traces
from pyrogaps.settings import checked


@checked()
def plot_ledger(ledger: Ledger, figure: FigureBase | None = None) -> FigureBase:
    """Draw `plot_gaps`, `plot_datapoints` and `plot_traces` below one another.

    Args:
        ledger: a `GapLedger`, or a `DataTree` or `InferenceData` with its groups.
        figure: a figure or subfigure to draw in, about 10 by 11 inches; by default a new figure.

    Returns:
        The figure drawn in.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> ledger = pg.decompose(model, guide, x, num_particles=50, progress=False)
        >>> len(pg.plot_ledger(ledger).subfigs) == 3
        True
    """
    if figure is None:
        figure = new_figure(*page_size(ledger))
    _, height = page_size(ledger)
    parts = figure.subfigures(3, 1, squeeze=False, height_ratios=[height - 8.0, 4.6, 3.4], hspace=0.04)
    top, middle, bottom = parts[:, 0]
    plot_gaps(ledger, ax=top.add_subplot())
    plot_datapoints(ledger, figure=middle)
    plot_traces(ledger, figure=bottom)
    return figure


def page_size(ledger: Ledger) -> tuple[float, float]:
    """Width and height in inches of the page for this ledger: one row per family."""
    return 10.0, 8.0 + 1.0 + 0.36 * (3 + len(families(per_datapoint(ledger))))
