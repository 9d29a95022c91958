"""A sandwich of log p(x) on simulated data, and a longer refinement of some datapoints: the certificate of a ledger."""

from dataclasses import replace

import numpy as np
import xarray as xr
from torch import Tensor

from pyrogaps.ais import sandwich
from pyrogaps.bounds import elbo
from pyrogaps.density.data import part_of
from pyrogaps.errors import InputError
from pyrogaps.escalation import Escalation, check_ladder
from pyrogaps.gaps.certificate import Certificate
from pyrogaps.gaps.work import Work
from pyrogaps.problem import Simulated
from pyrogaps.refine import refine_all
from pyrogaps.streams import derive_seed


def check_certifiable(work: Work) -> None:
    """Raise `InputError` for a guide that holds parameters for each datapoint and brings no family for others."""
    if not work.own.on_other_data:
        raise InputError(
            f"certificate: the guide's plate '{work.problem.plate}' has the data set's full size, so it holds "
            "parameters for each datapoint and has none for simulated ones; give it a method local_family(model) that "
            "makes a new one, or leave certificate out"
        )


def certify(work: Work, per_datapoint: xr.Dataset, settings: Certificate, batch_size: int) -> xr.Dataset:
    """The certificate of a ledger: `lower` and `upper` bounds of log p(x), with `lower_mcse`, over "simulated"
    datapoints; `gain` of L[q*], with `gain_mcse`, over "refined_again" datapoints, whose coordinates are their indices.

    Raises `InputError` where the model cannot be simulated.
    """
    problem, seed = work.own.elsewhere(work.problem), derive_seed(work.seed, "certificate")
    part, _ = part_of(problem.joint.data, settings.num_simulated)
    bounds = _bounds(work, problem.over(part).simulated(seed), batch_size, seed)
    part, chosen = part_of(problem.joint.data, settings.num_refined_again)
    again = problem.over(part)
    longer = replace(work.refinement, num_steps=settings.longer * work.refinement.num_steps)
    # The bounds on simulated data refine too, from streams of their own.
    stream = derive_seed(seed, "refined again")
    refined = refine_all(again, work.own.over(again), longer, batch_size, stream)
    reached = elbo(again.with_guide(refined), num_particles=work.num_particles, seed=stream)
    own_bound = per_datapoint.isel(family=0, datapoint=chosen.numpy())
    gain = reached.value.cpu().numpy() - own_bound["elbo_refined"].values
    error = np.hypot(reached.mcse.cpu().numpy(), own_bound["elbo_refined_mcse"].values)
    found = {name: ("simulated", value.cpu().numpy(), {"units": "nats"}) for name, value in bounds.items()}
    gains = {"gain": gain, "gain_mcse": error}
    found |= {name: ("refined_again", value, {"units": "nats"}) for name, value in gains.items()}
    return xr.Dataset(found, {"refined_again": chosen.numpy()}, {"longer": settings.longer})


def _bounds(work: Work, simulated: Simulated, batch_size: int, seed: int) -> dict[str, Tensor]:
    """Bounds of log p(x) on simulated data, the lower one by what measures the ledger's."""
    family, evidence = work.own.over(simulated.problem), work.evidence
    if isinstance(evidence, Escalation):
        check = check_ladder(simulated, family, evidence, work.refinement, batch_size, seed, work.lowest_rung)
        return {"lower": check.lower, "upper": check.upper, "lower_mcse": check.lower_mcse}
    as_it_is = simulated.problem.posterior if evidence.initial == "guide" else None
    found = sandwich(simulated, as_it_is or family, evidence, work.refinement, batch_size, seed)
    return {"lower": found.lower, "upper": found.upper, "lower_mcse": found.forward.mcse}
