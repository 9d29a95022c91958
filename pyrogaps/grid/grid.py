"""`posterior_grid`: the true posterior and every guide, as densities on one grid per datapoint."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr

from pyrogaps.density import Data, JointDensity
from pyrogaps.density.draws import Posterior
from pyrogaps.density.runs import Program
from pyrogaps.density.shared import datapoints_needed
from pyrogaps.errors import InputError, counted
from pyrogaps.grid.modes import count_modes
from pyrogaps.grid.quadrature import Array, around, integrate
from pyrogaps.grid.scoring import Scorer, array, extent, in_rows
from pyrogaps.guard import guarded
from pyrogaps.problem import Problem
from pyrogaps.progress import ProgressBar
from pyrogaps.settings import Plate, Seed, checked, within
from pyrogaps.streams import seeded

TRUE = "true posterior"
# A guide's gap, an integral over the grid, is NaN where the grid misses more than this share of the guide's mass.
MASS_TOLERANCE = 0.01


@guarded
@checked()
def posterior_grid(
    model: Program,
    guides: Mapping[str, Program | Posterior] | Program | Posterior,
    data: Data,
    *,
    datapoints: Sequence[int] | None = None,
    num_points: Annotated[int, within("of at least 10")] = 200,
    plate: Plate = None,
    seed: Seed = 0,
    progress: bool = True,
) -> xr.Dataset:
    r"""Evaluate p(z|x_n) and each q(z|x_n) on a grid of the two latent dimensions, in unconstrained space.

    $$p(z \mid x_n) = p(x_n, z) / p(x_n), \quad p(x_n) = \int p(x_n, z) \, dz \text{ by quadrature}$$

    so that log p(x_n) is exact up to `log_evidence_error`: a reference for AIS and every bound. Each datapoint has a
    window that holds its posterior and its guides. A guide with draws but no density at a point (one with auxiliary
    variables) is shown by a kernel density of 20,000 draws.

    Args:
        model, data, plate: as for `JointDensity`; two latent dimensions in all.
        guides: by name, Pyro guides, `GuideDensity`s, or what `refine` returned for these `data`; one alone is called
            "guide".
        datapoints: indices of the datapoints to evaluate; default all.
        num_points: number of points along each dimension.
        seed: seed of the draws behind windows and kernel densities.
        progress: whether to show a progress bar.

    Returns:
        A Dataset over "datapoint", "posterior" (the first is "true posterior"), "z_1", "z_2", with

        - `density`: per unit of area, and its coordinates `grid_1` (datapoint, z_1), `grid_2` (datapoint, z_2);
        - `log_evidence` and `log_evidence_error` (datapoint): log p(x_n) by quadrature, nats, and its difference
          from half the resolution;
        - `gap` (datapoint, posterior): log p(x_n) - L[q] = KL(q || p(z|x_n)), nats, by quadrature on this grid; NaN
          where q cannot be scored or the grid misses a hundredth of its mass;
        - `mass`: the share of each posterior on the grid; `num_modes`: its number of modes there;
        - `x`: the datapoints, where `data` is one tensor.

    Raises:
        InputError: where the latent space does not have two dimensions, or p(x_n, z) cannot be integrated.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> grid = pg.posterior_grid(model, {"guide": guide}, x[:2], num_points=50, progress=False)
        >>> bool((grid["log_evidence"] - model.log_evidence(x[:2]).detach().numpy() < 1e-4).all())
        True
    """
    guides = guides if isinstance(guides, Mapping) else {"guide": guides}
    if TRUE in guides:
        raise InputError(f"guides: '{TRUE}' is reserved for the exact posterior. Choose another name")
    with datapoints_needed(
        "A grid is of one datapoint's latents. Make the others parameters of the model (pyro.param)"
    ):
        problem = Problem.without_guide(model, next(iter(guides.values()), None), data, plate)
    joint = problem.joint
    _refuse_other_dimensions(joint)
    number = joint.num_datapoints
    posteriors = {name: _posterior(name, problem, guide) for name, guide in guides.items()}
    indices = _indices(datapoints, number)
    panels = []
    for index in ProgressBar(indices, desc="posteriors on a grid", disable=not progress):
        with seeded(seed, "posterior grid", index, device=joint.device), torch.no_grad():
            panels.append(_Panel(joint, posteriors, index).evaluate(num_points))
    variables = {name: (DIMS[name], np.stack([panel[name] for panel in panels])) for name in DIMS}
    variables |= _observed(indices, joint)
    names = [TRUE, *posteriors]
    dataset = xr.Dataset(variables, {"datapoint": indices, "posterior": names}).set_coords(["grid_1", "grid_2"])
    for name in ("log_evidence", "log_evidence_error", "gap"):
        dataset[name].attrs["units"] = "nats"
    return dataset


PER_POSTERIOR = ("datapoint", "posterior")
DIMS: dict[str, tuple[str, ...]] = {
    "density": (*PER_POSTERIOR, "z_1", "z_2"),
    "grid_1": ("datapoint", "z_1"),
    "grid_2": ("datapoint", "z_2"),
    "log_evidence": ("datapoint",),
    "log_evidence_error": ("datapoint",),
    "gap": PER_POSTERIOR,
    "mass": PER_POSTERIOR,
    "num_modes": PER_POSTERIOR,
}


def _refuse_other_dimensions(joint: JointDensity) -> None:
    if joint.dim != 2:
        sites = ", ".join(f"'{name}' {site.size}" for name, site in joint.sites.items())
        where = f" (sites: {sites})" if sites else ": all its latents are discrete"
        raise InputError(f"model: a grid needs two latent dimensions, but this model has {joint.dim}{where}")


def _posterior(name: str, problem: Problem, guide: Program | Posterior) -> Posterior:
    posterior, number = problem.with_guide(guide).guided(), problem.num_datapoints
    size = posterior.joint.num_datapoints
    if size != number:
        raise InputError(
            f"guides: '{name}' is a posterior of {counted(size, 'datapoint')}, but the data have {number}. Build it "
            "for these data"
        )
    return posterior


def _indices(datapoints: Sequence[int] | None, number: int) -> list[int]:
    indices = list(range(number)) if datapoints is None else [*datapoints]
    outside = [index for index in indices if not 0 <= index < number]
    if outside or not indices:
        raise InputError(f"datapoints: expected indices from 0 to {number - 1}, got {outside[:5] or 'none'}")
    return indices


class _Panel:
    """One datapoint's densities; call it inside `seeded` and `no_grad`."""

    def __init__(self, joint: JointDensity, posteriors: Mapping[str, Posterior], index: int) -> None:
        self.joint, self.index = joint, torch.tensor([index])
        self.name = f"datapoint {index}"
        self.guides = {name: Scorer(joint, posterior, self.index) for name, posterior in posteriors.items()}

    def evaluate(self, num_points: int) -> dict[str, Any]:
        guides = [guide.window for guide in self.guides.values()]
        prior = array(self.joint.sample_prior(1024, self.index)[:, 0])
        exact = integrate(self.log_joint, around(extent(prior, self.name), *guides), self.name)
        window = around(exact.body, *guides)
        axes, cell = window.axes(num_points), window.cell(num_points)
        log_p = self.log_joint(window.points(num_points)) - exact.log_evidence
        densities, gaps = [np.exp(log_p)], [0.0]
        for guide in self.guides.values():
            density, log_q = guide.on(window, num_points)
            densities.append(density)
            gaps.append(_divergence(density, log_q, log_p, cell))
        grids = np.stack(densities).reshape(-1, num_points, num_points)
        return {
            "density": grids,
            "grid_1": axes[0],
            "grid_2": axes[1],
            "log_evidence": exact.log_evidence,
            "log_evidence_error": exact.error,
            "gap": np.array(gaps),
            "mass": grids.sum((1, 2)) * cell,
            "num_modes": np.array([count_modes(grid) for grid in grids]),
        }

    def log_joint(self, points: Array) -> Array:
        return in_rows(lambda z: self.joint(z, self.index), points, self.joint)


def _divergence(density: Array, log_q: Array | None, log_p: Array, cell: float) -> float:
    """KL(q || p) as a sum over the grid; NaN where the grid does not hold q."""
    if log_q is None or abs(density.sum() * cell - 1) > MASS_TOLERANCE:
        return np.nan
    held = density > 0
    return float((density[held] * (log_q[held] - log_p[held])).sum() * cell)


def _observed(indices: list[int], joint: JointDensity) -> dict[str, tuple[tuple[str, ...], Any]]:
    """The datapoints themselves, where they are rows of one tensor."""
    tensor = joint.passed.tensor
    if tensor is None or joint.plate is None:
        return {}
    x = tensor[indices].detach().cpu().numpy()
    return {"x": (("datapoint", *(f"x_dim_{k}" for k in range(x.ndim - 1))), x)}
