"""Supports as a person would write them."""

import math
from typing import Any

import torch
from torch.distributions import constraints

from pyrogaps.density.layout import leaf
from pyrogaps.density.supports import is_circular, support_of

WORDS = {
    "_Boolean": "0 and 1",
    "_Real": "the real line",
    "_LowerCholesky": "lower triangular matrices with a positive diagonal",
    "_CorrCholesky": "Cholesky factors of correlation matrices",
    "_CorrMatrix": "correlation matrices",
    "_LowerTriangular": "lower triangular matrices",
    "_Square": "square matrices",
    "_Symmetric": "symmetric matrices",
    "_PositiveDefinite": "positive definite matrices",
    "_PositiveSemidefinite": "positive semidefinite matrices",
    "_SoftplusPositive": "the positive reals",
    "_SoftplusLowerCholesky": "lower triangular matrices with a positive diagonal",
    "_OrderedVector": "vectors in increasing order",
    "_PositiveOrderedVector": "positive vectors in increasing order",
    "_Sphere": "the unit sphere",
    "_UnitLowerCholesky": "lower triangular matrices with ones on the diagonal",
}


def support_words(fn: Any) -> str:
    """The support of a distribution, such as "the positive reals", "(0, 1)" or "the simplex of 3"."""
    return in_words(support_of(fn), tuple(fn.event_shape), circular=is_circular(leaf(fn)))


def in_words(support: Any, event_shape: tuple[int, ...] = (), *, circular: bool = False) -> str:
    """A constraint in words; `event_shape` says how long its vectors are."""
    while hasattr(support, "base_constraint"):  # of independent elements, or of the components of a mixture
        support = support.base_constraint
    size = f" of {event_shape[-1]}" if event_shape else ""
    kind = type(support).__name__
    if kind in ("_Simplex", "_OneHot", "_Multinomial"):
        words = {"_Simplex": "the simplex", "_OneHot": "one-hot vectors", "_Multinomial": "vectors of counts"}
        return words[kind] + size
    if isinstance(support, constraints.greater_than | constraints.greater_than_eq):
        low = _bound(support.lower_bound)
        if low == "0":
            return "the positive reals" if isinstance(support, constraints.greater_than) else "the nonnegative reals"
        return f"the reals above {low}"
    if isinstance(support, constraints.less_than):
        return f"the reals below {_bound(support.upper_bound)}"
    if isinstance(support, constraints.integer_interval):
        return f"the whole numbers from {_bound(support.lower_bound)} to {_bound(support.upper_bound)}"
    if kind == "_IntegerGreaterThan":
        return f"the whole numbers from {_bound(support.lower_bound)} on"
    if isinstance(support, constraints.interval | constraints.half_open_interval):
        low, high = _bound(support.lower_bound), _bound(support.upper_bound)
        return f"angles from {low} to {high}" if circular else f"({low}, {high})"
    if isinstance(support, constraints.cat | constraints.stack):
        parts = dict.fromkeys(in_words(part) for part in support.cseq)
        return " beside ".join(parts)
    return WORDS.get(kind, f"the support {support}")


def _bound(value: Any) -> str:
    """An end of an interval; of ends that differ between elements, the first and the last."""
    ends = torch.as_tensor(value).double().flatten()
    first, last = float(ends[0]), float(ends[-1])
    return _number(first) if bool((ends == first).all()) else f"{_number(first)} ... {_number(last)}"


def _number(value: float) -> str:
    for factor, sign in ((1, ""), (-1, "-")):
        if math.isclose(value, factor * math.pi, rel_tol=1e-6):
            return f"{sign}pi"
    return f"{value:.4g}"
