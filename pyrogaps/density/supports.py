"""The support of a distribution, also where torch does not know it, and the map to it."""

import math
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.distributions import TransformedDistribution, biject_to, constraints, transform_to
from torch.distributions.transforms import AffineTransform, ComposeTransform, IndependentTransform, Transform

from pyrogaps.density.layout import leaf
from pyrogaps.density.state_numbers import state_number
from pyrogaps.errors import InputError

REPARAMETRISED = {
    "ProjectedNormal": "reparametrise it: pyro.poutine.reparam(model, {'site': ProjectedNormalReparam()}) of "
    "pyro.infer.reparam, and let the guide draw the site with _normal after its name",
    "Wishart": "build the matrix from an LKJCholesky site and a site of positive scales",
}
# Their draws do not fill the support that they declare, or lie with positive probability at a point of it.
SINGULAR = {
    "ExpRelaxedCategorical": "use RelaxedOneHotCategorical, whose draws are the exponentials",
    "ZeroInflatedDistribution": "its zeros have a probability of their own; draw a Bernoulli site for them beside it",
}

# They declare the real line, over which their periodic densities have no finite integral, but draw from one turn.
CIRCULAR = ("VonMises", "SineBivariateVonMises", "SineSkewed")
TURN = constraints.interval(-math.pi, math.pi)
UNKNOWN = constraints.Constraint()  # no bijection leads to it

_MIXTURE = getattr(constraints, "MixtureSameFamilyConstraint", None)
if _MIXTURE is not None:
    # A mixture has the support of its components. Recent torch has a constraint for it, but no bijection to it.
    for registry in (biject_to, transform_to):
        registry.register(_MIXTURE, lambda support, registry=registry: registry(support.base_constraint))


def bijection(fn: Any, name: str) -> Any:
    """The map from unconstrained space, for a discrete site from numbers of states, to the support of `fn`, the
    distribution of site `name`.
    """
    if (kind := type(leaf(fn)).__name__) in SINGULAR:
        raise InputError(f"site '{name}': {kind} has no density over its declared support; {SINGULAR[kind]}")
    support = support_of(fn)
    if support.is_discrete:
        return state_number(fn, name)
    try:
        return biject_to(support)
    except NotImplementedError as error:
        remedy = REPARAMETRISED.get(kind, "use a distribution on the real line and transform its draws")
        raise InputError(
            f"site '{name}': there is no map from the real line to the support of a {kind}; {remedy}"
        ) from error


def support_of(fn: Any) -> Any:
    """`fn.support`, but the real line where none is declared, one turn for distributions on the circle, and where a
    transformed distribution ends in an affine map, its true image.

    torch takes the real line for the image of every affine map, but `biject_to(constraints.positive)` ends in one.
    """
    try:
        return _support_of(fn)
    except NotImplementedError:
        return constraints.independent(constraints.real, fn.event_dim) if fn.event_dim else constraints.real


def _support_of(fn: Any) -> Any:
    inner = leaf(fn)
    if is_circular(inner):
        support = _turn_through(inner)
        return constraints.independent(support, fn.event_dim) if fn.event_dim and support is not UNKNOWN else support
    declared = getattr(type(inner), "support", None) is not TransformedDistribution.support
    steps = [] if declared else _steps(inner.transforms)
    if not steps or not _is_affine(steps[-1]):
        return fn.support
    start = next((step.codomain for step in reversed(steps) if not _is_affine(step)), None)
    support = support_of(inner.base_dist) if start is None else start
    trailing = [step for step in takewhile(_is_affine, reversed(steps)) if isinstance(step, AffineTransform)]
    for step in reversed(trailing):
        support = _image(support, step)
    if support is None:
        return fn.support
    extra = fn.event_dim - getattr(support, "event_dim", 0)
    return constraints.independent(support, extra) if extra > 0 else support


def is_circular(fn: Any) -> bool:
    """Whether a periodic distribution of angles is at the bottom of `fn`."""
    inner = leaf(fn)
    parts = [getattr(inner, name, None) for name in ("base_dist", "_component_distribution", "component0")]
    return type(inner).__name__ in CIRCULAR or any(part is not None and is_circular(part) for part in parts)


def _turn_through(inner: Any) -> Any:
    """The image of one turn under the transforms of a distribution of angles; `UNKNOWN` where it is no interval."""
    if type(inner).__name__ in CIRCULAR or hasattr(inner, "_component_distribution") or hasattr(inner, "component0"):
        return TURN
    if getattr(type(inner), "support", None) is not TransformedDistribution.support:
        return UNKNOWN
    support: Any = _turn_through(leaf(inner.base_dist))
    for step in _steps(inner.transforms):
        if support is UNKNOWN or not step.bijective or step.domain.event_dim or step.codomain.event_dim:
            return UNKNOWN
        ends = step(torch.as_tensor(support.lower_bound)), step(torch.as_tensor(support.upper_bound))
        support = constraints.interval(torch.minimum(*ends), torch.maximum(*ends))
    return support


def _is_affine(step: Transform) -> bool:
    return isinstance(step, AffineTransform)


def _steps(transforms: list[Transform]) -> list[Transform]:
    """Single transforms of elements, without compositions."""
    flat: list[Transform] = []
    for step in transforms:
        while isinstance(step, IndependentTransform):
            step = step.base_transform
        flat += _steps(step.parts) if isinstance(step, ComposeTransform) else [step]
    return flat


def _image(support: Any, step: AffineTransform) -> Any:
    """The image of a half line or an interval under a monotone affine map; None where it is not known."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    scale = torch.as_tensor(step.scale)
    rising = bool((scale > 0).all())
    if not rising and not bool((scale < 0).all()):
        return None

    def at(bound: float | Tensor) -> Any:
        return step.loc + step.scale * bound

    if isinstance(support, constraints.greater_than | constraints.greater_than_eq):
        end = at(support.lower_bound)
        return constraints.greater_than(end) if rising else constraints.less_than(end)
    if isinstance(support, constraints.less_than):
        end = at(support.upper_bound)
        return constraints.less_than(end) if rising else constraints.greater_than(end)
    if isinstance(support, constraints.interval):
        ends = (support.lower_bound, support.upper_bound) if rising else (support.upper_bound, support.lower_bound)
        return constraints.interval(*(at(end) for end in ends))
    return None
