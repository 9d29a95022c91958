"""Regret against the lookahead, a panel for each setting, a dot for each data set."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.control import judge
from benchmarks.control.learning import LOOKAHEADS, Row
from pyrogaps.plots.source import SHADES, tidy

LEAST, MOST = 1e-2, 1e5  # percent; unstable loops stand above


def draw(found: Sequence[Row], figure: Figure) -> None:
    settings = list(dict.fromkeys(row.setting for row in found))
    columns = math.ceil(len(settings) / 2)
    axes = figure.subplots(2, columns, sharex=True, sharey=True, squeeze=False)
    for ax, setting in zip(axes.flat, settings, strict=False):
        panel(ax, found, setting)
    for ax in axes[:, 0]:
        ax.set_ylabel("regret (% of the least cost)")
    for ax in axes[-1]:
        ax.set_xlabel("lookahead of the guide")
    axes[0, 0].legend(frameon=False, fontsize=7, loc="upper right")


def panel(ax: Axes, found: Sequence[Row], setting: str) -> None:
    jitter = np.random.default_rng(0)
    for place, lookahead in enumerate(LOOKAHEADS):
        sets, limit = judge.of(found, setting, lookahead)
        regrets = 100 * np.array([row.regret for row in sets])
        x = place + jitter.uniform(-0.15, 0.15, len(regrets))
        stable = np.isfinite(regrets)
        ax.plot(
            x[stable],
            regrets[stable].clip(LEAST),
            "o",
            ms=3,
            alpha=0.5,
            color=SHADES[0],
            label=_once(place, "a data set"),
        )
        ax.plot(x[~stable], np.full((~stable).sum(), 3 * MOST), "^", ms=3, alpha=0.5, color=SHADES[0])
        if not stable.all():
            ax.text(place, 8 * MOST, f"{(~stable).sum()}", ha="center", va="bottom", fontsize=7)
        middle = min(max(100 * float(np.median(regrets)) / 100, LEAST), 3 * MOST)
        ax.plot([place - 0.3, place + 0.3], [middle] * 2, "-", lw=2, color="0.2", label=_once(place, "median"))
        if limit is not None:
            exact = min(max(100 * limit.regret, LEAST), 3 * MOST)
            ax.plot(place, exact, "x", ms=7, color=SHADES[1], label=_once(place, "infinite data"))
    ax.axhline(MOST, color="0.8", lw=0.8, ls=":")
    ax.set(yscale="log", ylim=(LEAST / 2, 60 * MOST), xticks=range(len(LOOKAHEADS)))
    ax.set_xticks(range(len(LOOKAHEADS)), ["filter", "1", "3", "smoother"])
    ax.set_yticks([1e-2, 1, 100, 1e4, 3 * MOST], ["≤ 0.01", "1", "100", "10,000", "unstable"])
    ax.minorticks_off()
    ax.set_title(setting, fontsize=9)
    ax.grid(axis="y", color="0.92", lw=0.8)
    tidy(ax)


def _once(place: int, label: str) -> str | None:
    return None if place else label
