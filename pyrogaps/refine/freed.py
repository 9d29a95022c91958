"""A guide's own family, kind (b): its site distributions with their parameters freed per datapoint."""

from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import transform_to

from pyrogaps.density import JointDensity
from pyrogaps.density.layout import leaf
from pyrogaps.density.local import FactorisedGuide, GuideSite
from pyrogaps.gaussians import Gaussian
from pyrogaps.refine.families import Start

FREE_PARAMETERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "Normal": (dist.Normal, ("loc", "scale")),
    "LogNormal": (dist.LogNormal, ("loc", "scale")),
    "MultivariateNormal": (dist.MultivariateNormal, ("loc", "scale_tril")),
    "LowRankMultivariateNormal": (dist.LowRankMultivariateNormal, ("loc", "cov_factor", "cov_diag")),
    "Laplace": (dist.Laplace, ("loc", "scale")),
    "Cauchy": (dist.Cauchy, ("loc", "scale")),
    "StudentT": (dist.StudentT, ("df", "loc", "scale")),
    "Gumbel": (dist.Gumbel, ("loc", "scale")),
    "Gamma": (dist.Gamma, ("concentration", "rate")),
    "Exponential": (dist.Exponential, ("rate",)),
    "HalfNormal": (dist.HalfNormal, ("scale",)),
    "HalfCauchy": (dist.HalfCauchy, ("scale",)),
    "Weibull": (dist.Weibull, ("scale", "concentration")),
    "Beta": (dist.Beta, ("concentration1", "concentration0")),
    "Dirichlet": (dist.Dirichlet, ("concentration",)),
}

# Those that are Gaussian in unconstrained space.
GAUSSIAN = (dist.Normal, dist.LogNormal, dist.MultivariateNormal)
CONSTRAINTS = {"cov_factor": dist.constraints.real}


def can_be_freed(guide: FactorisedGuide) -> bool:
    """Whether every site distribution is one that `FREE_PARAMETERS` knows."""
    return all(type(leaf(fn)).__name__ in FREE_PARAMETERS for fn in guide.distributions.values())


def is_learned(guide: FactorisedGuide) -> bool:
    """Whether any parameter of its distributions, which can be freed, depends on something that requires gradients."""
    leaves = [leaf(fn) for fn in guide.distributions.values()]
    return any(
        getattr(inner, name).requires_grad for inner in leaves for name in FREE_PARAMETERS[type(inner).__name__][1]
    )


@dataclass
class _FreedSite:
    """One site: how to build its distribution again from constant and freed parameters."""

    term: GuideSite
    build: Any
    event_dims: int
    constants: dict[str, Tensor]
    freed: dict[str, int]  # parameter name -> position in the list of leaves
    transforms: dict[str, Any]
    axis: int  # of datapoints, among the batch dimensions of the leaf distribution


class FreedGuide:
    """A factorised guide at the datapoints of a chunk, its varying or learned parameters now leaves, one per datapoint.

    A parameter is freed when it varies with the data or depends on parameters that require gradients (`varies` says
    which, so that the family does not depend on the chunk); a constant scale stays constant.
    """

    def __init__(self, guide: FactorisedGuide, joint: JointDensity, first: int, varies: dict[str, set[str]]) -> None:
        self.joint = joint
        self._first = first  # datapoint of the chunk
        self.active, self.count = guide.active, len(guide.indices)
        self.parameters: list[Tensor] = []
        self.axes: list[int] = []
        self.units: list[Tensor | float] = []
        self.sites = [self._free(term, guide.distributions[term.name], varies[term.name]) for term in guide.terms]
        self.rows = [slice(None)] * len(self.parameters)

    def _free(self, term: GuideSite, fn: Any, names: set[str]) -> _FreedSite:
        inner = leaf(fn)
        build, parameters = FREE_PARAMETERS[type(inner).__name__]
        event_dims = fn.event_dim - inner.event_dim
        axis = term.site.batch_axis - event_dims
        constants, freed, transforms = {}, {}, {}
        for name in parameters:
            value = getattr(inner, name).detach()
            value = value.expand(inner.batch_shape + value.shape[value.dim() - _event_dims(inner, name) :]).contiguous()
            if name not in names:
                constants[name] = value
                continue
            constraint = CONSTRAINTS.get(name, inner.arg_constraints[name])
            transforms[name] = transform_to(constraint)
            freed[name] = len(self.parameters)
            self.parameters.append(transforms[name].inv(value).clone().requires_grad_())
            self.axes.append((axis - _event_dims(inner, name)) % value.dim() if self.joint.plate is not None else 0)
            self.units.append(_unit(inner, name, value))
        return _FreedSite(term, build, event_dims, constants, freed, transforms, axis)

    def start_at(self, start: Start) -> bool:
        """Start at a factorised Gaussian; whether it can, which it does where all its sites are free Normals."""
        if any(site.build is not dist.Normal or set(site.freed) != {"loc", "scale"} for site in self.sites):
            return False
        for site in self.sites:
            values = {"loc": start.loc, "scale": start.scale.clamp(min=1e-6)}
            shaped = {name: site.term.site.unflatten(value) for name, value in values.items()}
            for name, position in site.freed.items():
                parameter = self.parameters[position]
                with torch.no_grad():
                    parameter.copy_(site.transforms[name].inv(shaped[name].reshape(parameter.shape)))
            self.units[site.freed["loc"]] = shaped["scale"].reshape(self.parameters[site.freed["loc"]].shape).clone()
        return True

    def move_to(self, gaussian: Gaussian) -> bool:
        """Set the means and scales that are free; False where a site is not Gaussian in unconstrained space."""
        if any(site.build not in GAUSSIAN for site in self.sites):
            return False
        correlated = gaussian.matrix.dim() == 3
        diagonal = gaussian.matrix.diagonal(dim1=-2, dim2=-1) if correlated else gaussian.matrix
        for site in self.sites:
            layout = site.term.site
            values = {"loc": layout.unflatten(gaussian.loc), "scale": layout.unflatten(diagonal)}
            if correlated:
                values["scale_tril"] = gaussian.matrix[:, layout.columns, layout.columns]
            with torch.no_grad():
                for name, position in site.freed.items():
                    parameter = self.parameters[position]
                    parameter.copy_(site.transforms[name].inv(values[name].reshape(parameter.shape)))
        return True

    def free_columns(self, dim: int) -> tuple[Tensor, Tensor]:
        """Which means, and which scales, are free: booleans `(dim,)` each."""
        loc, scale = (torch.zeros(dim, dtype=torch.bool, device=self.joint.device) for _ in range(2))
        for site in self.sites:
            loc[site.term.site.columns] = "loc" in site.freed
            scale[site.term.site.columns] = "scale" in site.freed or "scale_tril" in site.freed
        return loc, scale

    def at(self, indices: Tensor) -> FactorisedGuide:
        """The guide at datapoints `indices` of the chunk, differentiable in `parameters`."""
        positions = indices - self._first
        distributions = {site.term.name: self._build(site, positions) for site in self.sites}
        active = None if self.active is None else self.active[positions]
        return FactorisedGuide(self.joint, positions, [site.term for site in self.sites], distributions, active)

    def _build(self, site: _FreedSite, indices: Tensor) -> Any:
        values = {}
        for name, position in site.freed.items():
            values[name] = site.transforms[name](self._rows(self.parameters[position], self.axes[position], indices))
        for name, value in site.constants.items():
            axis = site.axis - _event_dims(site.build, name)
            values[name] = self._rows(value, axis, indices)
        return site.build(**values, validate_args=False).to_event(site.event_dims)

    def _rows(self, value: Tensor, axis: int, indices: Tensor) -> Tensor:
        if self.joint.plate is None or len(indices) == self.count:
            return value
        return value.index_select(axis, indices.to(value.device))


def _event_dims(distribution: Any, name: str) -> int:
    """How many of a parameter's dimensions belong to the event: 1 for a vector location, 2 for a matrix."""
    kind = distribution.__name__ if isinstance(distribution, type) else type(distribution).__name__
    if kind in ("MultivariateNormal", "LowRankMultivariateNormal"):
        return 2 if name in ("scale_tril", "cov_factor") else 1
    return 1 if kind == "Dirichlet" else 0


def _unit(inner: Any, name: str, value: Tensor) -> Tensor | float:
    """A natural step in a parameter, as it is freed: its own scale where it is in units of the latent, else 1."""
    matrix = type(inner).__name__ in ("MultivariateNormal", "LowRankMultivariateNormal")
    if name not in ("loc", "cov_factor", "scale_tril"):
        return 1.0
    scale: Tensor = (inner.stddev if matrix else inner.scale).detach()
    if name == "loc":
        return scale.expand_as(value).clone()
    rows = scale[..., None].expand_as(value)
    if name == "cov_factor":
        return rows.clone()
    # Below the diagonal it is freed as it is, on the diagonal by its logarithm.
    return rows.tril(-1) + torch.eye(value.shape[-1], dtype=value.dtype, device=value.device)


def varying_parameters(guide: FactorisedGuide) -> dict[str, set[str]]:
    """For each term, the parameters that differ between datapoints or depend on something that requires gradients.

    `guide` must come from a run with gradients enabled.
    """
    result = {}
    for term in guide.terms:
        fn = guide.distributions[term.name]
        inner, varying = leaf(fn), set()
        for name in FREE_PARAMETERS[type(inner).__name__][1]:
            value = getattr(inner, name)
            if value.requires_grad or (guide.joint.plate is not None and _differs(value, inner, fn, term, name)):
                varying.add(name)
        result[term.name] = varying
    return result


def _differs(value: Tensor, inner: Any, fn: Any, term: GuideSite, name: str) -> bool:
    axis = term.site.batch_axis - (fn.event_dim - inner.event_dim) - _event_dims(inner, name)
    if value.dim() < -axis or value.shape[axis] == 1:
        return False
    return not torch.equal(value, value.narrow(axis, 0, 1).expand_as(value))
