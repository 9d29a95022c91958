"""The gap against the lookahead: measured on trained guides, and in closed form where there is one."""

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.conditioning.rows import Row
from pyrogaps.plots.source import SHADES, tidy

MEASURED = "log p(x) - L[trained guide]"
PANELS = {"chain": "linear-Gaussian chain", "pendulum": "pendulum"}


def draw(rows: Sequence[Row], figure: Figure) -> None:
    """A panel for each experiment with lookaheads, a line for each of its settings; smoothing stands last."""
    shown = {name: [row for row in rows if row.experiment == name and row.quantity == MEASURED] for name in PANELS}
    shown = {name: found for name, found in shown.items() if found}
    for ax, (name, found) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        finite = max(k for row in found if (k := _lookahead(row)) < math.inf)
        for setting, colour in zip(dict.fromkeys(row.setting for row in found), SHADES, strict=False):
            line = sorted((row for row in found if row.setting == setting), key=_lookahead)
            places = [min(_lookahead(row), finite + 1) for row in line]
            ax.errorbar(
                places,
                [row.value for row in line],
                [row.standard_error for row in line],
                fmt="o-",
                ms=4,
                lw=1.2,
                capsize=3,
                color=colour,
                label=setting,
            )
            if all(row.known is not None for row in line):
                ax.plot(places, [row.known for row in line], "x", color="0.3", ms=8, zorder=3)
        if any(row.known is not None for row in found):
            ax.plot([], [], "x", color="0.3", ms=8, label="best guide, in closed form")
        ax.set(title=PANELS[name], xlabel="lookahead", ylabel="log p(x) - L[q] (nats)")
        ax.set_xticks([*range(int(finite) + 1), finite + 1], [*map(str, range(int(finite) + 1)), "all"])
        ax.legend(frameon=False, fontsize=8)
        ax.grid(axis="y", color="0.92", lw=0.8)
        tidy(ax)


def _lookahead(row: Row) -> float:
    return float(row.guide.removeprefix("lookahead "))
