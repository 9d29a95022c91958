"""A sandwich of log p(x) on simulated data, and a longer refinement of some datapoints: the certificate of a ledger."""

from dataclasses import replace

import numpy as np
import torch
import xarray as xr
from torch.utils._pytree import tree_leaves

from pyrogaps import memory
from pyrogaps.bounds import log_weights_of
from pyrogaps.density import JointDensity
from pyrogaps.density.data import part_of
from pyrogaps.errors import InputError, counted
from pyrogaps.evidence.bdmc import two_sided
from pyrogaps.gaps.certificate import Certificate
from pyrogaps.gaps.measure import Measure
from pyrogaps.log_weights import mean_estimate
from pyrogaps.refine import OwnFamily, refine_all
from pyrogaps.run import Run


def check_certifiable(measure: Measure) -> None:
    """Raise `InputError` where log p(x) is known exactly, and for a guide that holds parameters for each datapoint and
    brings no family for others.
    """
    if not measure.problem.dim:
        raise InputError(
            "certificate: all latents are discrete and summed out, so log p(x) is exact and needs no bounds. Leave "
            "certificate out"
        )
    family = measure.refiner.family
    if isinstance(family, OwnFamily) and not family.on_other_data:
        raise InputError(
            f"certificate: the guide's plate '{measure.problem.plate}' has the size of the data set, so the guide has "
            "no parameters for simulated datapoints. Define a method local_family(model) that returns a new guide, or "
            "leave certificate out"
        )


def check_size(joint: JointDensity, settings: Certificate, max_memory: int | str | None) -> None:
    """Raise `InputError` for simulated data that do not fit the memory."""
    first = torch.zeros(1, dtype=torch.long)
    leaves = [leaf for leaf in tree_leaves(joint.fetch(first)) if isinstance(leaf, torch.Tensor)]
    each = sum(leaf.numel() * leaf.element_size() for leaf in [*leaves, joint.zeros(1)])
    number = settings.num_simulated if joint.plate is not None else 1
    room = memory.available() * 4 // 5 if max_memory is None else memory.parse_bytes(max_memory)
    if number * each > room:
        raise InputError(
            f"certificate.num_simulated: {counted(number, 'datapoint')} take {memory.format_bytes(number * each)}, and "
            f"{memory.format_bytes(room)} are left. Use at most {room // each}; {Certificate.num_simulated} are the "
            "default"
        )


def certify(measure: Measure, per_datapoint: xr.Dataset, settings: Certificate, run: Run) -> xr.Dataset:
    """The certificate of a ledger, over "simulated" datapoints: `lower`, log p(x) by the ledger's evidence, which is a
    lower bound where the evidence gives one, with `lower_mcse`, and its upper bound `upper`. Over "refined_again"
    datapoints, whose coordinates are their indices: `gain` of L[q*], with `gain_mcse`.

    Raises `InputError` where the model cannot be simulated.
    """
    problem, refiner, evidence = measure.problem, measure.refiner, measure.evidence
    assert evidence is not None
    own = run.derived("certificate").quiet()
    simulated, there = refiner.simulated(problem, settings.num_simulated, own)
    lower, upper = two_sided(simulated, evidence, there, own)
    bounds = {"lower": lower.value, "upper": upper.value, "lower_mcse": lower.mcse}

    part, chosen = part_of(problem.joint.data, settings.num_refined_again)
    again = refiner.for_other_data(problem).over(part)
    longer = replace(refiner.settings, num_steps=settings.longer * refiner.settings.num_steps)
    fitter = replace(refiner.over(again), settings=longer)
    # The bounds on simulated data refine too, from streams of their own.
    stream = own.derived("refined again")
    refined = refine_all(again, fitter, stream)
    reached = mean_estimate(
        log_weights_of(again.with_guide(refined), measure.num_particles, replace(stream, batch_size=64))
    )
    own_bound = per_datapoint.isel(family=0, datapoint=chosen.numpy())
    gain = reached.value.cpu().numpy() - own_bound["elbo_refined"].values
    error = np.hypot(reached.mcse.cpu().numpy(), own_bound["elbo_refined_mcse"].values)
    columns = {name: ("simulated", value.cpu().numpy(), {"units": "nats"}) for name, value in bounds.items()}
    gains = {"gain": gain, "gain_mcse": error}
    columns |= {name: ("refined_again", value, {"units": "nats"}) for name, value in gains.items()}
    return xr.Dataset(
        columns, {"refined_again": chosen.numpy()}, {"longer": settings.longer, "more": evidence.evidence.more}
    )
