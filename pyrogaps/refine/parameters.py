"""The parameters of distributions that can be freed: which there are, where they stand, and how to put others there."""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import TransformedDistribution, transform_to
from torch.distributions import transforms as tf

from pyrogaps.density.layout import leaf
from pyrogaps.density.local import GuideSite

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

# Those whose states can be listed, for guides that draw them after continuous latents.
DISCRETE_PARAMETERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "Bernoulli": (dist.Bernoulli, ("logits",)),
    "Categorical": (dist.Categorical, ("logits",)),
    "OneHotCategorical": (dist.OneHotCategorical, ("logits",)),
    "OneHotCategoricalStraightThrough": (dist.OneHotCategorical, ("logits",)),
}
KNOWN = FREE_PARAMETERS | DISCRETE_PARAMETERS

# Those that are Gaussian in unconstrained space.
GAUSSIAN = (dist.Normal, dist.LogNormal, dist.MultivariateNormal)
CONSTRAINTS = {"cov_factor": dist.constraints.real}


# Transforms without parameters, and those whose parameters are numbers.
FIXED = (tf.ExpTransform, tf.SigmoidTransform, tf.TanhTransform, tf.SoftplusTransform, tf.StickBreakingTransform)
FIXED_BY_NUMBERS = (tf.AffineTransform, tf.PowerTransform)


def free_leaf(fn: Any) -> Any:
    """The distribution whose parameters can be freed: inside `Independent`, masks and fixed transforms; else None.

    A transform is fixed if it has no parameters other than numbers. The parameters of flows are learned.
    """
    inner = leaf(fn)
    while type(inner).__name__ not in KNOWN:
        if not isinstance(inner, TransformedDistribution) or not all(map(_is_fixed, inner.transforms)):
            return None
        inner = leaf(inner.base_dist)
    return inner


def _is_fixed(transform: Any) -> bool:
    if isinstance(transform, tf.ComposeTransform):
        return all(map(_is_fixed, transform.parts))
    if isinstance(transform, tf.IndependentTransform):
        return _is_fixed(transform.base_transform)
    if isinstance(transform, FIXED_BY_NUMBERS):
        values = [value for value in vars(transform).values() if isinstance(value, Tensor)]
        return not any(value.requires_grad or value.dim() for value in values)
    return type(transform) in FIXED


def rebuilt(fn: Any, change: Callable[[Any], Any], *, masks: bool) -> Any:
    """`fn` with `change` applied to its `free_leaf`; with or without the masks that it carries."""
    if type(fn).__name__ == "Independent":
        return rebuilt(fn.base_dist, change, masks=masks).to_event(fn.reinterpreted_batch_ndims)
    if type(fn).__name__ == "MaskedDistribution":
        inner = rebuilt(fn.base_dist, change, masks=masks)
        return inner.mask(fn._mask) if masks else inner
    if type(fn).__name__ in KNOWN:
        return change(fn)
    return dist.TransformedDistribution(rebuilt(fn.base_dist, change, masks=masks), fn.transforms)


def build_of(inner: Any) -> Any:
    """The class that makes distributions of this kind."""
    return KNOWN[type(inner).__name__][0]


def names_of(inner: Any) -> tuple[str, ...]:
    """The names of its parameters."""
    return KNOWN[type(inner).__name__][1]


def value_of(inner: Any, name: str) -> Tensor:
    """A parameter of a distribution in its full shape, with the batch dimensions of the distribution."""
    value: Tensor = getattr(inner, name)
    full: Tensor = value.expand(inner.batch_shape + value.shape[value.dim() - event_dims(inner, name) :])
    return full


def transform_of(inner: Any, name: str) -> Any:
    """The map from real numbers to values of a parameter."""
    if name == "logits" and type(inner).__name__ != "Bernoulli":
        return Contrasts()
    return transform_to(CONSTRAINTS.get(name, inner.arg_constraints[name]))


class Contrasts(tf.Transform):
    """From logits to logits of the same probabilities; back to those relative to the last state, which is always 0.

    They are linear in what a network adds to its logits, which normalised ones are not. Where the last state is
    impossible, they are relative to the most probable one.
    """

    bijective = True
    domain = codomain = dist.constraints.real_vector

    def _call(self, x: Tensor) -> Tensor:
        return x

    def _inverse(self, y: Tensor) -> Tensor:
        last = y[..., -1:]
        return y - torch.where(torch.isfinite(last), last, y.amax(-1, keepdim=True))


def axis_of(term: GuideSite, fn: Any, inner: Any, name: str) -> int:
    """The axis of rows in a parameter of the site distribution `fn` of a term, negative."""
    axis: int = term.site.batch_axis - (fn.event_dim - len(inner.event_shape)) - event_dims(inner, name)
    return axis


def to_rows(value: Tensor, axis: int | None) -> Tensor:
    """The elements of a tensor by rows, `(R, K)`; one row where there is no axis of rows."""
    return (
        value.reshape(1, -1)
        if axis is None
        else value.movedim(axis, 0).flatten(1)
        if value.dim() > 1
        else value[:, None]
    )


def rows_of(terms: list[GuideSite], distributions: dict[str, Any], in_plate: bool) -> dict[tuple[str, str], Tensor]:
    """The parameters of the site distributions of all terms as real numbers, by rows, `(R, K)`."""
    values = {}
    for term in terms:
        fn = distributions[term.name]
        inner = free_leaf(fn)
        for name in names_of(inner):
            axis = axis_of(term, fn, inner, name) if in_plate else None
            values[term.name, name] = to_rows(transform_of(inner, name).inv(value_of(inner, name)), axis)
    return values


def from_rows(rows: Tensor, like: Tensor, axis: int | None) -> Tensor:
    """`rows` `(R, K)` in the shape of `like`, which may have another number of rows."""
    if axis is None:
        return rows.reshape(like.shape)
    shape = like.movedim(axis, 0).shape[1:]
    return rows.reshape(len(rows), *shape).movedim(0, axis)


def event_dims(distribution: Any, name: str) -> int:
    """How many of a parameter's dimensions belong to the event: 1 for a vector location, 2 for a matrix."""
    kind = distribution.__name__ if isinstance(distribution, type) else type(distribution).__name__
    if kind in ("MultivariateNormal", "LowRankMultivariateNormal"):
        return 2 if name in ("scale_tril", "cov_factor") else 1
    return 1 if kind == "Dirichlet" or (name == "logits" and kind != "Bernoulli") else 0


def unit_of(inner: Any, name: str, value: Tensor) -> Tensor | float:
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
