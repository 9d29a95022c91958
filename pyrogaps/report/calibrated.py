"""The calibration of a posterior on the page: ranks, coverage, and the latent dimensions that deviate."""

from itertools import cycle
from typing import Any, cast

import numpy as np
import pandas as pd
from bokeh.models import Band, ColumnDataSource, Range1d

from pyrogaps.calibration import Calibration
from pyrogaps.calibration.summary import FAMILY_WISE, LOG_JOINT, deviating
from pyrogaps.calibration.uniformity import POINTS, uniformity_test
from pyrogaps.errors import counted
from pyrogaps.plots.calibration import GRID, MAX_HIGHLIGHTED, difference
from pyrogaps.plots.source import SHADES
from pyrogaps.report.figures import DASHES, INK, MUTED, TRACED, add_line, legend_above, new_figure

MAX_LATENTS = 50
CAPTION = (
    "The empirical distribution function of the normalised ranks less that of the uniform distribution. A hump means "
    "that the truth lies below the posterior too often; a hump followed by a trough, that the posterior is too narrow. "
    "All lines of a calibrated posterior stay within the band in {level:.0%} of cases."
)


def ranks_figure(calibration: Calibration) -> Any:
    """The left half of `plot_calibration`."""
    pit, summary = calibration.per_simulated["pit"].values, calibration.summary()
    plot = new_figure(
        name="ranks",
        height=320,
        x_range=Range1d(0, 1),
        x_axis_label="normalised rank of the truth",
        y_axis_label="ECDF − uniform",
        **TRACED,
    )
    counts = summary["count"][summary["count"] > 0]
    low, high = uniformity_test(int(counts.max())).band(1 - FAMILY_WISE / len(summary))
    at = np.concatenate([[0], POINTS, [1]])
    ends = {side: np.concatenate([[0], end - POINTS, [0]]) for side, end in (("low", low), ("high", high))}
    source = ColumnDataSource({"x": at, **ends})
    plot.add_layout(Band(base="x", lower="low", upper="high", source=source, fill_color=MUTED, fill_alpha=0.2))
    worst = [str(name) for name in deviating(summary).index][:MAX_HIGHLIGHTED]
    names = [str(name) for name in summary.index[: pit.shape[1]]]
    for name, column in zip(names, pit.T, strict=True):
        if name not in worst:
            add_line(plot, (GRID, difference(column)), "other latent dimensions", MUTED, "solid", name)
    for name, colour, dash in zip(worst, cycle(SHADES), cycle(DASHES), strict=False):
        add_line(
            plot, (GRID, difference(pit[:, names.index(name)])), f"{name}: {summary['finding'][name]}", colour, dash
        )
    log_joint = calibration.per_simulated["log_joint_pit"].values
    add_line(plot, (GRID, difference(log_joint)), f"{LOG_JOINT} of the draws", INK, "dotted")
    lines = [difference(column) for column in (*pit.T, log_joint)]
    most = float(np.nanmax(np.abs(np.concatenate([*ends.values(), *lines]))))
    plot.update(y_range=Range1d(-1.05 * most, 1.05 * most))
    return legend_above(plot)


def calibration_of(calibration: Calibration) -> dict[str, Any]:
    """What the calibration says, as text for the template: the dimensions that deviate first, the worst at the top."""
    summary, coverage = calibration.summary(), calibration.coverage()
    provenance, number = calibration.provenance, calibration.per_simulated.sizes["simulated"]
    first = [str(name) for name in deviating(summary).index]
    ordered = [*first, *(str(name) for name in summary.index if str(name) not in (*first, LOG_JOINT))]
    shown = [*ordered[:MAX_LATENTS], LOG_JOINT]
    caption = (
        "Shift: mean distance of the truth above the posterior median, in posterior standard deviations (calibrated: "
        "0). Spread: the standard deviation of that distance (calibrated: 1)."
    )
    if len(ordered) > MAX_LATENTS:
        caption += f" {len(ordered) - MAX_LATENTS} further dimensions are not listed."
    return {
        "heading": f"Calibration of the {provenance['posterior']} posterior ({provenance['guide']}): "
        f"{counted(number, 'datapoint')} simulated from the model, {counted(calibration.num_draws, 'draw')} each. "
        f"{_finding(len(first), len(ordered))}",
        "caption": CAPTION.format(level=1 - FAMILY_WISE),
        "latents_caption": caption,
        "coverage": [
            (f"{float(level):.0%}", _share(float(share), float(error)))
            for level, share, error in zip(
                coverage["probability"], coverage["overall"], coverage["overall_error"], strict=True
            )
        ],
        "latents": [_latent(name, cast("pd.Series[Any]", summary.loc[name])) for name in shown],
    }


def _latent(name: str, row: "pd.Series[Any]") -> dict[str, str]:
    return {
        "name": name,
        "shift": _number(row["shift"], row["shift_error"]),
        "spread": _number(row["spread"], row["spread_error"]),
        "coverage": _share(row["coverage_95"], row["coverage_95_error"]),
        "finding": row["finding"] or "–",
    }


def _finding(deviating: int, number: int) -> str:
    level = f"(family-wise error rate {FAMILY_WISE:.0%})"
    if not deviating:
        return f"No significant deviation {level}."
    return f"{deviating} of {counted(number, 'latent dimension')} deviate significantly {level}."


def _number(value: float, error: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f} ± {error:.2f}".replace("-", "−")


def _share(value: float, error: float) -> str:
    return "–" if np.isnan(value) else f"{100 * value:.1f} ± {100 * error:.1f}%"
