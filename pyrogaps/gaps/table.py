"""The printed ledger."""

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

TREE = {
    "inference_gap": "inference gap",
    "approximation_gap": "├─ approximation gap",
    "conditioning_gap": "├─ conditioning gap",
    "amortization_gap": "└─ amortization gap",
}
BOUNDS = {"log_evidence": "log p(x)", "elbo": "L[q]"}


def render(summary: pd.DataFrame, per_datapoint: xr.Dataset, provenance: dict[str, Any]) -> str:
    """The table: mean over datapoints in nats, ± its standard error over datapoints, and its Monte Carlo error."""
    labels = {name: _label(str(name), provenance) for name in summary.index}
    width = max(len(label) for label in labels.values())
    number = provenance["num_datapoints"]
    what = "1 datapoint" if number == 1 else f"{number:,} datapoints"
    lines = [
        f"Gap ledger: {what}, latent dimension {provenance['dim']}; means over datapoints in nats",
        "",
        f"{'':{width}}  {'mean':>9}   {'s.e.':>6}  {'MCSE':>6}",
    ]
    for name, row in summary.iterrows():
        if name in ("inference_gap",) or (str(name).startswith("approximation_gap[") and "└" in lines[-1]):
            lines.append("")
        figures = f"{row['mean']:9.2f} ± {_number(row['standard_error'])}  {_number(row['mcse'])}"
        lines.append(f"{labels[name]:{width}}  {figures}  {row['direction']}, {row['estimator']}")
    return "\n".join([*lines, "", *_notes(per_datapoint, provenance)])


def _number(value: float) -> str:
    return f"{value:6.3f}" if np.isfinite(value) else f"{'-':>6}"


def _label(name: str, provenance: dict[str, Any]) -> str:
    if name in TREE:
        return TREE[name]
    if name == "iwae":
        return f"IWAE-{provenance['num_particles']}[q]"
    if name.startswith("elbo_refined["):
        family = name[len("elbo_refined[") : -1]
        return "L[q*]" if family == "own" else f"L[q*] {family}"
    if name.startswith("approximation_gap["):
        return f"approximation gap, {name[len('approximation_gap[') : -1]}"
    return BOUNDS.get(name, name)


def _notes(per_datapoint: xr.Dataset, provenance: dict[str, Any]) -> list[str]:
    converged = per_datapoint["converged"].mean("datapoint")
    shares = ", ".join(f"{name} {float(share):.0%}" for name, share in zip(converged.family.values, converged, strict=True))
    acceptance = float(per_datapoint["acceptance"].mean())
    ess = float(per_datapoint["log_evidence_ess"].mean()) / provenance["evidence"]["num_chains"]
    khat = per_datapoint["khat"].values
    bad = float(np.mean(khat[np.isfinite(khat)] > 0.7)) if np.isfinite(khat).any() else 0.0
    notes = [
        f"refinement converged: {shares}",
        f"AIS: acceptance {acceptance:.2f}, effective share of the chains {ess:.0%}",
        f"importance weights of the guide: k-hat above 0.7 for {bad:.0%} of the datapoints",
    ]
    if provenance["unnormalised_likelihood"]:
        sites = ", ".join(provenance["unnormalised_likelihood"])
        notes.append(
            f"unnormalised likelihood ({sites}): values outside the support were scored because the model says "
            "validate_args=False, so log p(x) is not a log-probability; gaps are still gaps"
        )
    return notes
