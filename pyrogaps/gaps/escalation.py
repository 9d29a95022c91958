"""How log p(x) was measured by escalation, in words."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr

from pyrogaps.escalation import METHODS

# The share of the datapoints that may miss the tolerance without a word: their errors are uncertain themselves.
FEW = 0.2


def told(per_datapoint: xr.Dataset, provenance: dict[str, Any]) -> Iterator[str]:
    """By what log p(x) was measured, to what error, at what cost, and what the ladder's check said."""
    method, tolerance = per_datapoint["log_evidence_method"].values, provenance["evidence"]["tolerance"]
    shares = [(name, float((method == place).mean())) for place, name in enumerate(METHODS)]
    ways = ", ".join(f"{name} {share:.0%}" for name, share in shares if share)
    errors, costs = per_datapoint["log_evidence_mcse"].values, per_datapoint["log_evidence_evaluations"].values
    yield f"log p(x) by {ways}; {costs.mean():,.0f} evaluations a datapoint, most {costs.max():,.0f}"
    yield (
        f"its standard error: asked for {tolerance:g}, median {np.median(errors):.3f}, nine in ten below "
        f"{np.quantile(errors, 0.9):.3f}"
    )
    check = provenance["ladder"]
    if isinstance(check, str):
        yield f"no check on simulated data ({check})"
    elif check is not None:
        kept = "all rungs kept" if check["lowest"] == 0 else f"the lowest {check['lowest']} rungs left out"
        yield (
            f"checked on {check['num_simulated']} datapoints simulated from the model: log p(x) is at most "
            f"{check['width']:.3f} ± {check['width_mcse']:.3f} nats above its bound; {kept}"
        )


def cautions(per_datapoint: xr.Dataset, provenance: dict[str, Any]) -> Iterator[str]:
    """Where the tolerance was not met, by the errors or by the check."""
    tolerance, check = provenance["evidence"]["tolerance"], provenance["ladder"]
    # Twice, because the error of few draws is itself uncertain.
    above = float((per_datapoint["log_evidence_mcse"].values > 2 * tolerance).mean())
    if above > FEW:
        yield (
            f"log p(x) of {above:.0%} of the datapoints has more than twice the standard error asked for; raise "
            "Escalation's max_evaluations"
        )
    if isinstance(check, dict) and check["width"] > tolerance:
        yield (
            f"on simulated data log p(x) may be {check['width']:.3f} nats higher than measured, on the last rung too: "
            "the refined guide may miss parts of the posterior; try a richer family or AIS(initial='prior')"
        )
