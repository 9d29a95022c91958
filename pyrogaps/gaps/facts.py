"""What a ledger is of: facts on data and model, by which two ledgers are known to be of the same."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from pyrogaps.density.observations import merged, observe
from pyrogaps.gaps.ledger import GapLedger
from pyrogaps.gaps.selection import FINGERPRINT, NAME
from pyrogaps.problem import Problem
from pyrogaps.run import Run

# Entries of the provenance.
OBSERVED, MODEL = "observed_sites", "model"
NUM_PROBED = 4  # datapoints at which a model is probed
# Relative differences of one density that are rounding; data of either precision count as the same.
ROUNDING = {"float32": 1e-5, "float64": 1e-7}


def with_facts(ledger: GapLedger, problem: Problem, run: Run) -> GapLedger:
    """`ledger` with what its log p(x) is a density of and, of every datapoint, a fingerprint of what the model observes
    and its name, where the data have names.

    The model is run once more for every chunk of datapoints.
    """
    joint = problem.joint
    parts = run.map(lambda chunk: observe(joint, chunk.indices), joint)
    prints = np.concatenate([part.fingerprints for part in parts])
    sites = [asdict(site) for site in merged([part.sites for part in parts])]
    model = {"dim": problem.dim, "probe": parts[0].probe[:NUM_PROBED].tolist()}
    columns: dict[str, Any] = {FINGERPRINT: ("datapoint", prints)}
    if joint.data.names is not None:
        columns[NAME] = ("datapoint", np.array(joint.data.names, dtype=str))
    per_datapoint = ledger.per_datapoint.assign_coords(columns)
    return replace(ledger, per_datapoint=per_datapoint, provenance={**ledger.provenance, OBSERVED: sites, MODEL: model})


def same_model(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two ledgers of the same data, by their provenance, have one model: its density at fixed points agrees."""
    pair = [np.array(provenance[MODEL]["probe"]) for provenance in (first, second)]
    if first[MODEL]["dim"] != second[MODEL]["dim"] or len(pair[0]) != len(pair[1]):
        return False
    tolerance = ROUNDING["float32" if "float32" in (first["dtype"], second["dtype"]) else "float64"]
    return bool(np.allclose(pair[0], pair[1], rtol=tolerance, atol=tolerance))
