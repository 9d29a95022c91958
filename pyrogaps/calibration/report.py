"""The printed calibration: coverage, and the latent dimensions that deviate most."""

from collections import Counter
from typing import Any, cast

import pandas as pd
import xarray as xr

from pyrogaps.calibration.summary import FAMILY_WISE, HIGH, LOG_JOINT, LOW, deviating
from pyrogaps.errors import counted

MAX_DIMENSIONS = 5


def render(summary: pd.DataFrame, coverage: xr.Dataset, per_simulated: xr.Dataset, provenance: dict[str, Any]) -> str:
    """The report of a `Calibration`, at most about twenty lines."""
    number, dim = per_simulated.sizes["simulated"], per_simulated.sizes["latent"]
    lines = [
        f"Calibration of the {provenance['posterior']} posterior ({provenance['guide']}): "
        f"{counted(number, 'datapoint')} simulated from the model, {counted(provenance['num_draws'], 'draw')} each",
        "",
        *_coverage(coverage, dim),
        "",
        *_latents(summary, dim),
        *_log_joint(cast("pd.Series[Any]", summary.loc[LOG_JOINT])),
    ]
    if "converged" in per_simulated:
        share = float(per_simulated["converged"].mean())
        lines.append(f"refinement converged: {share:.0%}")
    return "\n".join(lines)


def _coverage(coverage: xr.Dataset, dim: int) -> list[str]:
    levels = [f"{float(level):.0%}" for level in coverage["probability"]]
    shares = [
        f"{100 * float(share):.1f} ± {100 * float(error):.1f}%"
        for share, error in zip(coverage["overall"], coverage["overall_error"], strict=True)
    ]
    return [
        f"{'central interval':24}" + "".join(f"{level:>15}" for level in levels),
        f"{'contains the truth':24}"
        + "".join(f"{share:>15}" for share in shares)
        + f"   ± standard error; {_dimensions(dim)}",
    ]


def _latents(summary: pd.DataFrame, dim: int) -> list[str]:
    deviations = deviating(summary)
    level = f"(family-wise error rate {FAMILY_WISE:.0%})"
    if deviations.empty:
        return [f"{_dimensions(dim)}: no significant deviation {level}"]
    width = max(len(str(name)) for name in deviations.index[:MAX_DIMENSIONS]) + 2
    lines = [
        f"{len(deviations)} of {_dimensions(dim)} deviate{'s' if len(deviations) == 1 else ''} significantly {level}:",
        f"{'':{width}}{'shift':>15}{'spread':>15}{'95% coverage':>17}   the posterior is",
    ]
    for dimension, row in deviations.head(MAX_DIMENSIONS).iterrows():
        figures = [f"{row[name]:.2f} ± {row[f'{name}_error']:.2f}" for name in ("shift", "spread")]
        held = f"{100 * row['coverage_95']:.1f} ± {100 * row['coverage_95_error']:.1f}%"
        lines.append(f"{dimension:{width}}{figures[0]:>15}{figures[1]:>15}{held:>17}   {row['finding']}")
    if len(deviations) > MAX_DIMENSIONS:
        rest = Counter(deviations["finding"].iloc[MAX_DIMENSIONS:])
        lines.append(f"and {', '.join(f'{count} more {finding}' for finding, count in rest.most_common(3))}")
    return [
        *lines,
        "shift: mean distance of the truth above the posterior median, in posterior standard deviations "
        "(calibrated: 0)",
        "spread: standard deviation of that distance (calibrated: 1; above 1, the posterior is too narrow)",
    ]


def _log_joint(row: "pd.Series[Any]") -> list[str]:
    if row["finding"] == "":
        return ["log p(x, z): no significant difference between the draws and the truth"]
    figures = f"shift {row['shift']:.2f} ± {row['shift_error']:.2f}"
    if row["finding"] == LOW:
        meaning = "is lower at the draws than at the truth: the posterior puts mass where the model has little"
    elif row["finding"] == HIGH:
        meaning = (
            "is higher at the draws than at the truth: the posterior concentrates where the model's density is highest"
        )
    else:
        meaning = "has a different distribution at the draws than at the truth"
    return [f"log p(x, z) {meaning} ({figures})"]


def _dimensions(dim: int) -> str:
    return counted(dim, "latent dimension")
