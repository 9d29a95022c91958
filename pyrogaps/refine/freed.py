"""A guide's own family, kind (b): its site distributions with their parameters freed per datapoint."""

from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrogaps.density import JointDensity
from pyrogaps.density.local import FactorisedGuide, GuideSite
from pyrogaps.gaussians import Gaussian
from pyrogaps.refine.families import Start
from pyrogaps.refine.freedom import Freedom
from pyrogaps.refine.parameters import (
    axis_of,
    build_of,
    free_leaf,
    from_rows,
    names_of,
    rebuilt,
    to_rows,
    transform_of,
    unit_of,
    value_of,
)

# Those that are Gaussian in unconstrained space.
GAUSSIAN = (dist.Normal, dist.LogNormal, dist.MultivariateNormal)


def can_be_freed(guide: FactorisedGuide) -> bool:
    """Whether every site distribution is one that `FREE_PARAMETERS` knows, perhaps behind fixed transforms."""
    return all(free_leaf(fn) is not None for fn in guide.distributions.values())


def is_learned(guide: FactorisedGuide) -> bool:
    """Whether any parameter of its distributions, which can be freed, depends on something that requires gradients."""
    leaves = [free_leaf(fn) for fn in guide.distributions.values()]
    return any(getattr(inner, name).requires_grad for inner in leaves for name in names_of(inner))


@dataclass(frozen=True)
class _Tied:
    """A parameter whose elements are not all free: `values` of the guide `(B, K)`, and `labels` `(K,)` of the residual
    that is added to each element, -1 for none.
    """

    values: Tensor
    labels: Tensor
    like: Tensor


@dataclass
class _FreedSite:
    """One site: how to build its distribution again from constant and freed parameters."""

    term: GuideSite
    fn: Any
    inner: Any
    constants: dict[str, Tensor]
    freed: dict[str, int]  # parameter name -> position in the list of leaves
    tied: dict[str, _Tied]
    transforms: dict[str, Any]

    @property
    def build(self) -> Any:
        return build_of(self.inner)

    def axis(self, name: str) -> int:
        """The axis of datapoints in a parameter."""
        return axis_of(self.term, self.fn, self.inner, name)


class FreedGuide:
    """A factorised guide at the datapoints of a chunk, its varying or learned parameters now leaves, one per datapoint.

    A parameter is freed when it varies with the data or depends on parameters that require gradients (`varies` says
    which, so that the family does not depend on the chunk); a constant scale stays constant. Elements that the guide
    moves only together stay tied, see `freedom`.
    """

    def __init__(
        self,
        guide: FactorisedGuide,
        joint: JointDensity,
        first: int,
        varies: dict[str, set[str]],
        freedom: Freedom | None = None,
    ) -> None:
        self.joint = joint
        self._first = first  # datapoint of the chunk
        self.active, self.count = guide.active, len(guide.indices)
        self.parameters: list[Tensor] = []
        self.axes: list[int] = []
        self.units: list[Tensor | float] = []
        self.sites = [
            self._free(term, guide.distributions[term.name], varies[term.name], freedom) for term in guide.terms
        ]
        self.rows = [slice(None)] * len(self.parameters)

    def _free(self, term: GuideSite, fn: Any, names: set[str], freedom: Freedom | None) -> _FreedSite:
        inner = free_leaf(fn)
        site = _FreedSite(term, fn, inner, {}, {}, {}, {})
        for name in names_of(inner):
            value = value_of(inner, name).detach().contiguous()
            if name not in names:
                site.constants[name] = value
                continue
            transform, unit = transform_of(inner, name), unit_of(inner, name, value)
            site.transforms[name], site.freed[name] = transform, len(self.parameters)
            labels = None if freedom is None else freedom.tied((term.name, name))
            if labels is None:
                axis = site.axis(name) % value.dim() if self.joint.plate is not None else 0
                self._leaf(transform.inv(value).clone(), axis, unit)
                continue
            row_axis = site.axis(name) if self.joint.plate is not None else None
            rows, labels = to_rows(transform.inv(value), row_axis), labels.to(value.device)
            site.tied[name] = _Tied(rows, labels, value)
            first = torch.stack([(labels == k).nonzero()[0, 0] for k in range(int(labels.max()) + 1)])
            units = to_rows(torch.as_tensor(unit).to(value).expand_as(value), row_axis)[:, first]
            self._leaf(torch.zeros_like(units), 0, units)
        return site

    def _leaf(self, value: Tensor, axis: int, unit: Tensor | float) -> None:
        self.parameters.append(value.requires_grad_())
        self.axes.append(axis)
        self.units.append(unit)

    def start_at(self, start: Start) -> bool:
        """Start at a factorised Gaussian; whether it can, which it does where all its sites are free Normals."""
        free = {"loc", "scale"}
        if any(site.build is not dist.Normal or set(site.freed) != free or site.tied for site in self.sites):
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
        if any(site.build not in GAUSSIAN or site.tied for site in self.sites):
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
            values[name] = site.transforms[name](self._real(site, name, self.parameters[position], indices))
        for name, value in site.constants.items():
            values[name] = self._rows(value, site.axis(name), indices)
        return rebuilt(site.fn, lambda inner: site.build(**values, validate_args=False), masks=False)

    def _real(self, site: _FreedSite, name: str, parameter: Tensor, indices: Tensor) -> Tensor:
        """A freed parameter as real numbers, in its full shape."""
        tied = site.tied.get(name)
        if tied is None:
            return self._rows(parameter, self.axes[site.freed[name]], indices)
        residual, values = self._rows(parameter, 0, indices), self._rows(tied.values, 0, indices)
        added = torch.cat([residual, torch.zeros_like(residual[:, :1])], 1)[:, tied.labels]
        return from_rows(values + added, tied.like, site.axis(name) if self.joint.plate is not None else None)

    def _rows(self, value: Tensor, axis: int, indices: Tensor) -> Tensor:
        if self.joint.plate is None or len(indices) == self.count:
            return value
        return value.index_select(axis, indices.to(value.device))


def varying_parameters(guide: FactorisedGuide) -> dict[str, set[str]]:
    """For each term, the parameters that differ between datapoints or depend on something that requires gradients.

    `guide` must come from a run with gradients enabled.
    """
    result = {}
    for term in guide.terms:
        fn = guide.distributions[term.name]
        inner, varying = free_leaf(fn), set()
        for name in names_of(inner):
            value = getattr(inner, name)
            if value.requires_grad or (guide.joint.plate is not None and _differs(value, inner, fn, term, name)):
                varying.add(name)
        result[term.name] = varying
    return result


def _differs(value: Tensor, inner: Any, fn: Any, term: GuideSite, name: str) -> bool:
    axis = axis_of(term, fn, inner, name)
    if value.dim() < -axis or value.shape[axis] == 1:
        return False
    return not torch.equal(value, value.narrow(axis, 0, 1).expand_as(value))
