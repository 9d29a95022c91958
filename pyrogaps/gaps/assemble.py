"""From the results of chunks to a `GapLedger`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from pyrogaps.chunk_cache import Arrays
from pyrogaps.evidence.reliability import DOUBTED, NOT_EXAMINED, RELIABLE, STATUS, reliability_notes, reliability_of
from pyrogaps.gaps.finite import described, is_finite
from pyrogaps.gaps.ledger import GapLedger
from pyrogaps.gaps.measure import OWN, TRACE, Measure
from pyrogaps.gaps.selection import with_flags
from pyrogaps.gaps.terms import Columns, Term, measured_gaps
from pyrogaps.run import Run
from pyrogaps.streams import Chunk

MAX_OBSERVED = 20_000_000
UPPER = {"estimator": "coupled chains of the same weights", "direction": "upper bound of log p(x)"}


def assemble(
    results: list[tuple[Chunk, Arrays]], measure: Measure, provenance: dict[str, Any], terms: Sequence[Term], run: Run
) -> GapLedger:
    """The ledger of the chunks' results."""
    arrays, families = [result for _, result in results], [OWN, *measure.families]
    weights = np.array([len(chunk) for chunk, _ in results], dtype=float)
    columns = {name: np.concatenate([a[name] for a in arrays]) for name in arrays[0] if not name.startswith(TRACE)}
    traces = {
        name.removeprefix(TRACE): np.average([a[name] for a in arrays], axis=0, weights=weights)
        for name in arrays[0]
        if name.startswith(TRACE)
    }
    if "log_evidence_upper" in columns:
        provenance = {**provenance, "quantities": {**provenance["quantities"], "log_evidence_upper": UPPER}}
    direction = provenance["quantities"]["log_evidence"]["direction"]
    reliable = reliability_of(columns, direction)
    if reliable is None:
        columns[RELIABLE] = np.zeros(len(columns["log_evidence"]), dtype=bool)
    else:
        reliable = reliable.astype(bool)
        columns[RELIABLE] = reliable & ~columns.get(DOUBTED, np.zeros_like(reliable))
    evidence, mcse = columns["log_evidence"][:, None], columns["log_evidence_mcse"][:, None]
    with np.errstate(invalid="ignore"):  # infinity less infinity
        columns["family_approximation_gap"] = evidence - columns["elbo_refined"]
    columns["family_approximation_gap_mcse"] = np.hypot(mcse, columns["elbo_refined_mcse"])
    per_datapoint = xr.Dataset(
        {name: (("datapoint", "family")[: value.ndim], value) for name, value in columns.items()},
        coords={"datapoint": np.arange(provenance["num_datapoints"]), "family": families},
    )
    for variable in per_datapoint.data_vars:
        if str(variable).removesuffix("_mcse") in provenance["quantities"]:
            per_datapoint[variable].attrs["units"] = "nats"
    if reliable is None:
        per_datapoint[RELIABLE].attrs[STATUS] = NOT_EXAMINED
    finite = is_finite(per_datapoint)
    if measure.evidence is not None and finite.any():  # a ledger that is saved and loaded has its words alone
        chosen = {name: value[finite] for name, value in columns.items()}
        notes, cautions = measure.evidence.notes(chosen), measure.evidence.cautions(chosen)
        notes = [*notes, *reliability_notes(per_datapoint.isel(datapoint=finite), direction)]
        provenance = {**provenance, "notes": notes, "cautions": cautions}
    if not finite.all():
        infinite = described(per_datapoint, measure.problem, run, measure.num_particles)
        provenance = {**provenance, "infinite": infinite}
    observed = observed_of(measure.problem.joint.passed.tensor)
    per_datapoint = with_flags(per_datapoint)
    ledger = GapLedger(per_datapoint, _traces(traces, families, provenance), observed, provenance, xr.Dataset())
    return with_gaps(ledger, terms)


def with_gaps(ledger: GapLedger, terms: Sequence[Term]) -> GapLedger:
    """`ledger` with its gaps, which are differences along one chain of estimates."""
    training = xr.Dataset() if ledger.training is None else ledger.training
    amortized, quantities = ledger.provenance["amortized"], ledger.provenance["quantities"]
    columns = Columns(ledger.per_datapoint, training, amortized, quantities["log_evidence"]["direction"])
    gaps, per_datapoint = measured_gaps(columns, terms)
    variables = {
        name: ("datapoint", value, {"units": "nats"})
        for gap, values in per_datapoint.items()
        for name, value in ((gap, values.value), (f"{gap}_mcse", values.mcse))
    }
    return replace(ledger, per_datapoint=ledger.per_datapoint.assign(variables), gaps=gaps)


def _traces(traces: Arrays, families: list[str], provenance: dict[str, Any]) -> xr.Dataset:
    num_points = traces["refined_elbo"].shape[1]
    steps = (np.arange(num_points) + 0.5) * provenance["refinement"]["num_steps"] / num_points
    dims = {"refined_elbo": ("family", "refinement_step")}
    coordinates: dict[str, Any] = {"family": families, "refinement_step": steps}
    along_path = [trace for name, trace in traces.items() if name not in dims]
    if along_path:
        coordinates["temperature"] = np.arange(1, len(along_path[0]) + 1)
    return xr.Dataset(
        {name: (dims.get(name, ("temperature",)), value) for name, value in traces.items()}, coords=coordinates
    )


def observed_of(tensor: Tensor | None) -> xr.Dataset:
    """The data, where they are one tensor of moderate size: pictures show the datapoints that are explained worst."""
    if tensor is None or tensor.numel() > MAX_OBSERVED or tensor.dim() == 0:
        return xr.Dataset()
    dims = ["datapoint", *[f"x_dim_{axis}" for axis in range(tensor.dim() - 1)]]
    return xr.Dataset({"x": (dims, tensor.detach().cpu().numpy())})
