"""The printed calibration: coverage, and the latent dimensions that deviate most."""

from collections import Counter
from typing import Any, cast

import pandas as pd
import xarray as xr

from pyrogaps.calibration.summary import FAMILY_WISE, HIGH, LOG_JOINT, LOW, deviating
from pyrogaps.errors import counted
from pyrogaps.tables import Table

MAX_DIMENSIONS = 5


def render(summary: pd.DataFrame, coverage: xr.Dataset, per_simulated: xr.Dataset, provenance: dict[str, Any]) -> str:
    """The report of a `Calibration`, at most about twenty lines."""
    dim = per_simulated.sizes["latent"]
    lines = [
        _title(per_simulated, provenance),
        "",
        *_coverage(coverage, dim),
        "",
        *_latents(summary, dim),
        *_log_joint(cast("pd.Series[Any]", summary.loc[LOG_JOINT])),
    ]
    return "\n".join([*lines, *_refinement(per_simulated)])


def tables(
    summary: pd.DataFrame, coverage: xr.Dataset, per_simulated: xr.Dataset, provenance: dict[str, Any]
) -> tuple[Table, Table]:
    """The report as tables: of coverage, and of the latent dimensions that deviate."""
    dim, deviations = per_simulated.sizes["latent"], deviating(summary)
    levels, shares = _shares(coverage)
    held = ["contains the truth", *shares]
    first = Table(_title(per_simulated, provenance), ["central interval", *levels], [[held]])
    found, *_ = lines = _latents(summary, dim)
    groups = [[[str(name), *_deviation(row)] for name, row in deviations.head(MAX_DIMENSIONS).iterrows()]]
    after = [line for line in lines[1:] if line.startswith(("and ", "shift", "spread"))]
    notes = [*after, *_log_joint(cast("pd.Series[Any]", summary.loc[LOG_JOINT])), *_refinement(per_simulated)]
    headings = ["latent dimension", "shift", "spread", "95% coverage", "the posterior is"]
    return first, Table(found, headings, groups, notes=[f"{note}." for note in notes])


def _title(per_simulated: xr.Dataset, provenance: dict[str, Any]) -> str:
    number = counted(per_simulated.sizes["simulated"], "datapoint")
    return (
        f"Calibration of the {provenance['posterior']} posterior ({provenance['guide']}): {number} simulated from the "
        f"model, {counted(provenance['num_draws'], 'draw')} each"
    )


def _refinement(per_simulated: xr.Dataset) -> list[str]:
    if "converged" not in per_simulated:
        return []
    return [f"refinement converged: {float(per_simulated['converged'].mean()):.0%}"]


def _shares(coverage: xr.Dataset) -> tuple[list[str], list[str]]:
    """Levels of intervals, and how often these contain the truth."""
    pairs = zip(coverage["overall"], coverage["overall_error"], strict=True)
    shares = [f"{100 * float(share):.1f} ± {100 * float(error):.1f}%" for share, error in pairs]
    return [f"{float(level):.0%}" for level in coverage["probability"]], shares


def _deviation(row: Any) -> list[str]:
    """The figures of a latent dimension, and what they say of the posterior."""
    figures = [f"{row[name]:.2f} ± {row[f'{name}_error']:.2f}" for name in ("shift", "spread")]
    return [*figures, f"{100 * row['coverage_95']:.1f} ± {100 * row['coverage_95_error']:.1f}%", row["finding"]]


def _coverage(coverage: xr.Dataset, dim: int) -> list[str]:
    levels, shares = _shares(coverage)
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
        shift, spread, held, finding = _deviation(row)
        lines.append(f"{dimension:{width}}{shift:>15}{spread:>15}{held:>17}   {finding}")
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
