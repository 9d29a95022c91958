"""Whether a further family is the guide's own: then its refined bound is a second estimate of the same number."""

import inspect
from typing import Any

import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyrogaps.density import JointDensity
from pyrogaps.density.layout import leaf
from pyrogaps.density.local import FactorisedGuide
from pyrogaps.family import LocalFamily
from pyrogaps.problem import Problem
from pyrogaps.refine.families import Family, instantiate_few
from pyrogaps.refine.own import OwnFamily
from pyrogaps.refine.parameters import names_of
from pyrogaps.run import Run

# What a family is in unconstrained space.
INDEPENDENT, FULL = "independent normals", "normals with a full covariance"
NORMALS = ("Normal", "LogNormal", "MultivariateNormal")
PLAIN = (int, float, str, type(None))


def is_own_family(own: OwnFamily | Family, family: Family, problem: Problem, run: Run) -> bool:
    """Whether `family` is known to be the guide's own: normals with the same freedom, or a guide of the same class with
    parameters of the same shapes. False where that is not known.
    """
    run = run.derived("same family")
    kind = _kind_of_own(own, problem.joint, run) if isinstance(own, OwnFamily) else _kind(own, problem.joint, run)
    return kind is not None and kind == _kind(family, problem.joint, run)


def _kind_of_own(own: OwnFamily, joint: JointDensity, run: Run) -> Any:
    if own.family is not None:
        return _kind(own.family, joint, run)
    if own.kind != "freed":
        return None
    with torch.no_grad(), run.random_state_kept(joint):
        local = own.density.at(torch.arange(min(2, joint.num_datapoints)))
    assert isinstance(local, FactorisedGuide)
    if not all(_is_free(own, term.name, leaf(local.distributions[term.name])) for term in local.terms):
        return None
    return _kind_of_normals([leaf(fn) for fn in local.distributions.values()], joint.dim)


def _is_free(own: OwnFamily, site: str, fn: Any) -> bool:
    """Whether every element of every parameter of a site is free, for each datapoint."""
    if (
        type(fn).__name__ not in ("Normal", "LogNormal", "MultivariateNormal")
        or not {*names_of(fn)} <= own.varies[site]
    ):
        return False
    return own.freedom is None or all(own.freedom.tied((site, name)) is None for name in names_of(fn))


def _kind_of_normals(distributions: list[Any], dim: int) -> str | None:
    if all(fn.event_dim == 0 for fn in distributions):
        return INDEPENDENT
    whole = len(distributions) == 1 and distributions[0].event_shape.numel() == dim
    return _full(dim) if whole else None


def _full(dim: int) -> str:
    return FULL if dim > 1 else INDEPENDENT


def _kind(family: Family, joint: JointDensity, run: Run) -> Any:
    guide = instantiate_few(family, joint, 1 if joint.plate is None else 2, run)
    if isinstance(guide, AutoNormal):
        return INDEPENDENT
    if LocalFamily.of(guide).location_scale is not None:
        return _full(joint.dim)
    shapes = {name: tuple(value.shape) for name, value in guide.named_parameters()}
    return type(guide), shapes, _settings(guide)


def _settings(guide: nn.Module) -> dict[str, Any]:
    """The plain values and functions that a guide keeps: its settings."""
    kept = {name: value for name, value in vars(guide).items() if not name.startswith("_pyro")}
    plain = {name: value for name, value in kept.items() if isinstance(value, PLAIN)}
    return plain | {name: value for name, value in kept.items() if inspect.isroutine(value) or inspect.isclass(value)}
