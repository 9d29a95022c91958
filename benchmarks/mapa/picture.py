"""KL(p_GT || p) of every method against S, and against the forward passes per datapoint that it took to train."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.mapa.training import IWAE, MAPA, MAPA_GT, MAPA_NAIVE, VAE
from pyrogaps.plots.source import SHADES, tidy

FORMS = {VAE: "D", IWAE: "s--", MAPA: "o-", MAPA_GT: "^:", MAPA_NAIVE: "v-."}


def draw(table: pd.DataFrame, figure: Figure) -> None:
    """A column of panels for each data set, a line with its standard errors over draws for each method."""
    data_sets = list(dict.fromkeys(table["data set"]))
    table = table.assign(passes=table["decoder passes per point"] + table["encoder passes per point"])
    axes = figure.subplots(2, len(data_sets), sharey="col", squeeze=False)
    for column, data_set in enumerate(data_sets):
        of = table[table["data set"] == data_set]
        for ax, against in zip(axes[:, column], ("S", "passes"), strict=True):
            _panel(ax, of, against)
        axes[0, column].set_title(data_set, loc="left", fontsize=10)
        axes[0, column].set_xticks([1, 3, 10, 30], ["1", "3", "10", "30"])
        axes[1, column].set_xticks([2, 4, 10, 30], ["2", "4", "10", "30"])
        axes[0, column].set_xlabel("S")
        axes[1, column].set_xlabel("passes per point and step")
    for ax in axes[:, 0]:
        ax.set_ylabel("KL (nats)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False, fontsize=8)


def _panel(ax: Axes, rows: pd.DataFrame, against: str) -> None:
    for (method, form), colour in zip(FORMS.items(), SHADES, strict=True):
        of = rows[(rows["method"] == method) & rows["KL"].notna()].sort_values("S")
        places, mean, error = (of[name].to_numpy(float) for name in (against, "KL", "standard error"))
        if len(of):
            ax.errorbar(places, mean, error, fmt=form, ms=4, lw=1.2, capsize=2, color=colour, label=method)
    ax.set_xscale("log")
    ax.minorticks_off()
    ax.set_yscale("log")
    # A range may hold no power of ten.
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.grid(axis="y", color="0.92", lw=0.8)
    tidy(ax)
