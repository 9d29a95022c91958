"""From the results of chunks to a `GapLedger`."""

from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from pyrogaps.density import Data
from pyrogaps.gaps.ledger import GapLedger
from pyrogaps.gaps.parts import Arrays
from pyrogaps.streams import Chunk

MAX_OBSERVED = 20_000_000


def assemble(
    results: list[tuple[Chunk, Arrays]], families: list[str], provenance: dict[str, Any], data: Data
) -> GapLedger:
    """The ledger of the chunks' results; gaps are differences along one chain of estimates."""
    arrays = [result for _, result in results]
    weights = np.array([len(chunk) for chunk, _ in results], dtype=float)
    columns = {name: np.concatenate([a[name] for a in arrays]) for name in arrays[0] if not _is_trace(name)}
    traces = {
        name: np.average([a[name] for a in arrays], axis=0, weights=weights) for name in arrays[0] if _is_trace(name)
    }
    own, own_mcse = columns["elbo_refined"][:, 0], columns["elbo_refined_mcse"][:, 0]
    evidence, evidence_mcse = columns["log_evidence"], columns["log_evidence_mcse"]
    # What one network has to live up to: the best that is shown no more than it.
    target, target_mcse = (
        columns.get(f"elbo_shared{end}", own_value) for end, own_value in (("", own), ("_mcse", own_mcse))
    )
    gaps = {
        "inference_gap": (evidence - columns["elbo"], np.hypot(evidence_mcse, columns["elbo_mcse"])),
        "approximation_gap": (evidence - own, np.hypot(evidence_mcse, own_mcse)),
        "amortization_gap": (target - columns["elbo"], np.hypot(target_mcse, columns["elbo_mcse"])),
        "family_approximation_gap": (
            evidence[:, None] - columns["elbo_refined"],
            np.hypot(evidence_mcse[:, None], columns["elbo_refined_mcse"]),
        ),
    }
    if "elbo_shared" in columns:
        gaps["conditioning_gap"] = own - target, np.hypot(own_mcse, target_mcse)
    for name, (value, mcse) in gaps.items():
        columns[name], columns[f"{name}_mcse"] = value, mcse
    per_datapoint = xr.Dataset(
        {name: (("datapoint", "family")[: value.ndim], value) for name, value in columns.items()},
        coords={"datapoint": np.arange(provenance["num_datapoints"]), "family": families},
    )
    for variable in per_datapoint.data_vars:
        if str(variable).removesuffix("_mcse") in provenance["quantities"]:
            per_datapoint[variable].attrs["units"] = "nats"
    return GapLedger(per_datapoint, _traces(traces, families, provenance), _observed(data), provenance)


TRACES = ("refined_elbo", "acceptance_by_temperature", "ess_by_temperature", "inverse_temperature")


def _is_trace(name: str) -> bool:
    return name in TRACES


def _traces(traces: Arrays, families: list[str], provenance: dict[str, Any]) -> xr.Dataset:
    num_points = traces["refined_elbo"].shape[1]
    steps = (np.arange(num_points) + 0.5) * provenance["refinement"]["num_steps"] / num_points
    dims = {"refined_elbo": ("family", "refinement_step")}
    coordinates: dict[str, Any] = {"family": families, "refinement_step": steps}
    # Of an escalation no two datapoints need have the same path.
    if "inverse_temperature" in traces:
        coordinates["temperature"] = np.arange(1, len(traces["inverse_temperature"]) + 1)
    return xr.Dataset(
        {name: (dims.get(name, ("temperature",)), value) for name, value in traces.items()}, coords=coordinates
    )


def _observed(data: Data) -> xr.Dataset:
    """The data, where they are one tensor of moderate size: pictures show the datapoints that are explained worst."""
    tensor = data[0] if isinstance(data, tuple) and len(data) == 1 else data
    if not isinstance(tensor, Tensor) or tensor.numel() > MAX_OBSERVED or tensor.dim() == 0:
        return xr.Dataset()
    dims = ["datapoint", *[f"x_dim_{axis}" for axis in range(tensor.dim() - 1)]]
    return xr.Dataset({"x": (dims, tensor.detach().cpu().numpy())})
