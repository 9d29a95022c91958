"""A sandwich of log p(x) on simulated data, and a longer refinement of some datapoints: the certificate of a ledger."""

from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from pyrogaps.ais import bdmc
from pyrogaps.bounds import Plate, elbo
from pyrogaps.density import IndexedData
from pyrogaps.density.data import part_of
from pyrogaps.errors import InputError
from pyrogaps.escalation import Escalation, check_ladder
from pyrogaps.gaps.certificate import Certificate
from pyrogaps.gaps.work import Work
from pyrogaps.refine import refine
from pyrogaps.streams import derive_seed


def check_certifiable(work: Work) -> None:
    """Raise `InputError` for a guide that holds parameters for each datapoint and brings no family for others."""
    if not work.own.on_other_data:
        raise InputError(
            f"certificate: the guide's plate '{work.joint.plate}' has the data set's full size, so it holds parameters "
            "for each datapoint and has none for simulated ones; give it a method local_family(model) that makes a new "
            "one, or leave certificate out"
        )


def certify(work: Work, per_datapoint: xr.Dataset, settings: Certificate, batch_size: int) -> xr.Dataset:
    """The certificate of a ledger: `lower` and `upper` bounds of log p(x), with `lower_mcse`, over "simulated"
    datapoints; `gain` of L[q*], with `gain_mcse`, over "refined_again" datapoints, whose coordinates are their indices.

    Raises `InputError` where the model cannot be simulated.
    """
    joint, own, seed = work.joint, work.own.elsewhere, derive_seed(work.seed, "certificate")
    plate: Plate = joint.plate or False
    bounds = _bounds(work, own, part_of(joint.data, settings.num_simulated)[0], batch_size, seed)
    data, chosen = part_of(joint.data, settings.num_refined_again)
    longer = replace(work.refinement, num_steps=settings.longer * work.refinement.num_steps)
    again = refine(work.model, own, data, settings=longer, plate=plate, batch_size=batch_size, seed=seed)
    reached = elbo(again.joint.model, again, data, num_particles=work.num_particles, plate=plate, seed=seed)
    own_bound = per_datapoint.isel(family=0, datapoint=chosen.numpy())
    gain = reached.value.cpu().numpy() - own_bound["elbo_refined"].values
    error = np.hypot(reached.mcse.cpu().numpy(), own_bound["elbo_refined_mcse"].values)
    found = {name: ("simulated", value.cpu().numpy(), {"units": "nats"}) for name, value in bounds.items()}
    gains = {"gain": gain, "gain_mcse": error}
    found |= {name: ("refined_again", value, {"units": "nats"}) for name, value in gains.items()}
    return xr.Dataset(found, {"refined_again": chosen.numpy()}, {"longer": settings.longer})


def _bounds(work: Work, own: Any, data: IndexedData, batch_size: int, seed: int) -> dict[str, Tensor]:
    """Bounds of log p(x) on data simulated in the shape of `data`, the lower one by what measures the ledger's."""
    evidence, joint = work.evidence, work.joint
    if isinstance(evidence, Escalation):
        check = check_ladder(
            work.model, own, data, settings=evidence, refinement=work.refinement, lowest=work.lowest_rung,
            plate=joint.plate or False, batch_size=batch_size, seed=seed,
        )  # fmt: skip
        return {"lower": check.lower, "upper": check.upper, "lower_mcse": check.lower_mcse}
    sandwich = bdmc(
        work.model, data, guide_or_family=own, settings=evidence, refinement=work.refinement,
        plate=joint.plate or False, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    return {"lower": sandwich.lower, "upper": sandwich.upper, "lower_mcse": sandwich.forward.mcse}
