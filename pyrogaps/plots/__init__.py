"""Plots of a ledger or its saved `DataTree`, a calibration, a comparison, a training, and posteriors on a grid."""

from pyrogaps.plots.calibration import plot_calibration
from pyrogaps.plots.comparison import plot_comparison
from pyrogaps.plots.datapoints import plot_datapoints
from pyrogaps.plots.gaps import plot_gaps
from pyrogaps.plots.ledger import plot_ledger
from pyrogaps.plots.monitor import plot_monitor
from pyrogaps.plots.posteriors import plot_posteriors
from pyrogaps.plots.traces import plot_traces

__all__ = [
    "plot_calibration",
    "plot_comparison",
    "plot_datapoints",
    "plot_gaps",
    "plot_ledger",
    "plot_monitor",
    "plot_posteriors",
    "plot_traces",
]
