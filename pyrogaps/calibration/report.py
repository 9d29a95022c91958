"""The printed calibration: coverage, how many latent dimensions deviate, the worst of them, and what that means."""

from collections import Counter
from typing import Any, cast

import pandas as pd
import xarray as xr

from pyrogaps.calibration.summary import FAMILY_WISE, HIGH, LOG_JOINT, LOW, deviating

SHOWN = 5


def render(summary: pd.DataFrame, coverage: xr.Dataset, per_simulated: xr.Dataset, provenance: dict[str, Any]) -> str:
    """The report of a `Calibration`, some twenty lines at most."""
    number, dim = per_simulated.sizes["simulated"], per_simulated.sizes["latent"]
    lines = [
        f"Calibration of the {provenance['posterior']} posterior ({provenance['guide']}): {number:,} datapoints "
        f"simulated from the model, {provenance['num_draws']:,} draws each",
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
        f"{'holds the truth':24}"
        + "".join(f"{share:>15}" for share in shares)
        + f"   ± standard error; {_dimensions(dim)}",
    ]


def _latents(summary: pd.DataFrame, dim: int) -> list[str]:
    found = deviating(summary)
    chance = f"beyond chance ({FAMILY_WISE:.0%} for any claim below)"
    if found.empty:
        return [f"no deviation of the {_dimensions(dim)} {chance}"]
    width = max(len(str(name)) for name in found.index[:SHOWN]) + 2
    lines = [
        f"{len(found)} of {_dimensions(dim)} deviate{'s' if len(found) == 1 else ''} {chance}:",
        f"{'':{width}}{'shift':>15}{'spread':>15}{'95% hold':>17}   the posterior is",
    ]
    for name, row in found.head(SHOWN).iterrows():
        figures = [f"{row[which]:.2f} ± {row[f'{which}_error']:.2f}" for which in ("shift", "spread")]
        held = f"{100 * row['coverage_95']:.1f} ± {100 * row['coverage_95_error']:.1f}%"
        lines.append(f"{name:{width}}{figures[0]:>15}{figures[1]:>15}{held:>17}   {row['finding']}")
    if len(found) > SHOWN:
        rest = Counter(found["finding"].iloc[SHOWN:])
        lines.append(f"and {', '.join(f'{many} more {finding}' for finding, many in rest.most_common(3))}")
    return [
        *lines,
        "shift: how far the truth lies above the posterior, in standard deviations of it (calibrated: 0)",
        "spread: of the truth about the posterior, over the posterior's own (calibrated: 1; above it too narrow)",
    ]


def _log_joint(row: "pd.Series[Any]") -> list[str]:
    if row["finding"] == "":
        return ["log p(x, z) of the draws: no deviation from the truth's beyond chance"]
    figures = f"shift {row['shift']:.2f} ± {row['shift_error']:.2f}"
    if row["finding"] == LOW:
        meaning = "below the truth's: the posterior puts mass where the model has little"
    elif row["finding"] == HIGH:
        meaning = "above the truth's: the posterior keeps to where the model is densest"
    else:
        meaning = "distributed otherwise than the truth's"
    return [f"log p(x, z) of the draws lies {meaning} ({figures})"]


def _dimensions(dim: int) -> str:
    return "1 latent dimension" if dim == 1 else f"{dim} latent dimensions"
