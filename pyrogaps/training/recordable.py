"""Losses that can be recorded: computed in tensors throughout, without reading a value."""

from typing import Any

import torch
from pyro.distributions.util import is_identically_zero
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyrogaps.density.runs import Program


def is_recordable(estimator: Any) -> bool:
    """Whether `tensor_loss` supports `estimator`: Pyro's `Trace_ELBO`, or a class that sets `recordable = True`.

    Subclasses do not inherit the attribute, because they may override any part of a step.
    """
    kind = type(estimator)
    return kind is Trace_ELBO or vars(kind).get("recordable", False) is True


def tensor_loss(estimator: Any, model: Program, guide: Program, args: tuple[Any, ...]) -> Tensor:
    """The estimator's `differentiable_loss`.

    `Trace_ELBO` sums Python floats, which reads values from tensors; this function sums tensors instead.

    Raises `NotImplementedError` if a draw of the guide is not reparametrised.
    """
    if type(estimator) is not Trace_ELBO:
        loss: Tensor = estimator.differentiable_loss(model, guide, *args)
        return loss
    particles = [_elbo(*traces) for traces in estimator._get_traces(model, guide, args, {})]
    return -torch.stack(particles).mean()


def _elbo(model_trace: Any, guide_trace: Any) -> Tensor:
    total = torch.as_tensor(model_trace.log_prob_sum())
    for site in guide_trace.nodes.values():
        if site["type"] == "sample":
            if not is_identically_zero(site["score_parts"].score_function):
                raise NotImplementedError(f"site '{site['name']}' is not reparametrised")
            total = total - site["log_prob_sum"]
    return total
