"""The log-likelihood of some datapoints under decoded others, each decoded once."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import softplus

from pyrogaps.density.layout import leaf, plate_dim, rows_first
from pyrogaps.mapa.continuous_bernoulli import log_normaliser

# Parameters that say the same: the first is taken.
ALTERNATIVES = (("logits", "probs"), ("scale_tril", "covariance_matrix", "precision_matrix"))
# Exponential families log p = x eta - A(eta) that are scored by one matrix product without loss of digits.
LOG_NORMALISERS: dict[str, Callable[[Tensor], Tensor]] = {"Bernoulli": softplus, "ContinuousBernoulli": log_normaliser}


def pair_log_likelihood(site: Any, plate: str, rows: Tensor, columns: Tensor) -> Tensor:
    r"""log p(x_n | z_i) of an observed site, n = `rows` `(B,)` and i = `columns` `(B, C)`: shape `(B, C)`, nats.

    Both count rows of the data plate in the run that `site` comes from, whose distribution must depend on z alone.
    Bernoulli data are scored by one matrix product; other distributions are built again with the parameters of each
    pair; those that cannot be, for all rows against all.
    """
    fn, value = site["fn"], site["value"]
    dim = plate_dim(site, plate)
    assert dim is not None
    value, inner = value.expand(fn.batch_shape + fn.event_shape), leaf(fn)
    rows, columns = rows.to(value.device), columns.to(value.device)
    axis = dim - (fn.event_dim - inner.event_dim)
    if type(inner).__name__ in LOG_NORMALISERS:
        return _by_product(inner, value, axis, rows).gather(1, columns)
    names = _parameters(inner)
    if names is None:
        return _by_all(inner, value, axis, rows).gather(1, columns)
    pairs = columns.flatten()
    rebuilt = type(inner)(**{name: _taken(inner, name, axis, pairs) for name in names}, validate_args=False)
    value = value.index_select(axis - inner.event_dim, rows.repeat_interleave(columns.shape[1]))
    return rows_first(rebuilt.log_prob(value), axis, len(pairs)).reshape(columns.shape)


def _by_product(inner: Any, value: Tensor, axis: int, rows: Tensor) -> Tensor:
    eta = inner.logits.expand(inner.batch_shape).movedim(axis, 0).flatten(1)
    x = value.movedim(axis, 0)[rows].flatten(1)
    normaliser = LOG_NORMALISERS[type(inner).__name__](eta)
    products: Tensor = x.to(eta.dtype) @ eta.T
    return products - normaliser.sum(1)


def _by_all(inner: Any, value: Tensor, axis: int, rows: Tensor) -> Tensor:
    value_axis = axis - inner.event_dim
    x = value.movedim(value_axis, 0)[rows].unsqueeze(value_axis)
    terms: Tensor = inner.log_prob(x).movedim(axis, 1)
    return terms.flatten(2).sum(-1) if terms.dim() > 2 else terms


def _parameters(inner: Any) -> list[str] | None:
    """Names of the parameters that a distribution can be built from; None where its constructor takes more."""
    told = set(inspect.signature(type(inner).__init__).parameters) - {"self", "validate_args"}
    if not told or not told <= set(inner.arg_constraints):
        return None
    for first, *others in ALTERNATIVES:
        told -= set(others) if first in told else set()
    return sorted(told)


def _taken(inner: Any, name: str, axis: int, rows: Tensor) -> Tensor:
    """A parameter at `rows` of its data plate, as it is where it is the same for all."""
    event_dim = getattr(inner.arg_constraints[name], "event_dim", 0)
    value: Tensor = getattr(inner, name)
    axis = axis - event_dim
    value = value.expand(inner.batch_shape + value.shape[value.dim() - event_dim :])
    if value.stride(axis) == 0:
        return value.narrow(axis, 0, 1)
    return value.index_select(axis, rows)
