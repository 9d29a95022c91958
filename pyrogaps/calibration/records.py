"""Results of a calibration per datapoint, with coordinates named by site and element."""

from typing import Any, TypeAlias

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyrogaps.calibration.calibration import LATENT, SIMULATED
from pyrogaps.calibration.ranks import Ranks
from pyrogaps.density import JointDensity
from pyrogaps.density.layout import Site

Evaluated: TypeAlias = tuple[Ranks, Tensor | None]  # of a chunk: ranks, and whether refinement converged


def per_simulated(joint: JointDensity, parts: list[Evaluated], truth: Tensor) -> xr.Dataset:
    """`Calibration.per_simulated` from the results of the chunks."""
    variables: dict[str, tuple[Any, np.ndarray]] = {
        name: ((SIMULATED, LATENT), torch.cat([getattr(ranks, name) for ranks, _ in parts]).numpy())
        for name in ("rank", "pit")
    }
    variables["truth"] = ((SIMULATED, LATENT), truth.detach().cpu().numpy())
    variables["log_joint_pit"] = (SIMULATED, torch.cat([ranks.log_joint for ranks, _ in parts]).numpy())
    convergence = [converged for _, converged in parts if converged is not None]
    if convergence:
        variables["converged"] = (SIMULATED, torch.cat(convergence).cpu().numpy())
    labels: list[str] = []
    sites: list[str] = []
    for name, shape in shapes_of(joint).items():
        elements = [f"{name}[{','.join(map(str, at))}]" if shape else name for at in np.ndindex(*shape)]
        labels, sites = [*labels, *elements], [*sites, *[name] * len(elements)]
    return xr.Dataset(variables, {LATENT: labels, "site": (LATENT, sites)})


def shapes_of(joint: JointDensity) -> dict[str, list[int]]:
    """The shape of one datapoint's unconstrained value by site, in the order of the flat vector."""
    return {name: _own_shape(site) for name, site in joint.sites.items()}


def _own_shape(site: Site) -> list[int]:
    """The shape without batch axes of size one, which only separate rows."""
    batch = len(site.shape) - site.unconstrained_event_dim
    return [size for size in site.shape[:batch] if size != 1] + list(site.shape[batch:])
