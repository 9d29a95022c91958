"""Losses that can be recorded: tensors from end to end, no number read off on the way."""

from typing import Any

import torch
from pyro.distributions.util import is_identically_zero
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyrogaps.density.runs import Program


def is_recordable(estimator: Any) -> bool:
    """Whether `estimator` is a loss that `tensor_loss` knows: Pyro's `Trace_ELBO`, or one that says `recordable`.

    Subclasses may do anything in a step, so that they do not inherit it.
    """
    kind = type(estimator)
    return kind is Trace_ELBO or vars(kind).get("recordable", False) is True


def tensor_loss(estimator: Any, model: Program, guide: Program, args: tuple[Any, ...]) -> Tensor:
    """The estimator's `differentiable_loss`.

    `Trace_ELBO` sums its value in Python's floats, which reads them off; here it is summed in tensors.

    Raises `NotImplementedError` for a guide whose draws are not all reparametrised.
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
