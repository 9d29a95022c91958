"""Gradient estimators of importance-weighted bounds: doubly reparametrised, and score function with a baseline."""

import math
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyrogaps.density.auxiliary import AuxiliaryPosterior
from pyrogaps.density.layout import leaf
from pyrogaps.errors import InputError
from pyrogaps.objectives.particles import Particles, Sites

DRAWN = "_drawn"


class CutDraws(Messenger):
    """Draws a guide's sites and passes on values that are detached from the guide's parameters.

    log q and log p then depend on each value as a leaf. The differentiable draw, which depends on the parameters and on
    earlier leaves, is stored in the site's `infer`.

    Raises `InputError`, naming the site, for a distribution that cannot be reparametrised.
    """

    def _pyro_sample(self, message: Any) -> None:
        if message["done"] or message["is_observed"] or site_is_subsample(message):
            return
        name, fn = message["name"], message["fn"]
        if not fn.has_rsample:
            raise InputError(
                f"site '{name}': {type(leaf(fn)).__name__} cannot be reparametrised, as doubly reparametrised "
                "gradients require. Set doubly_reparametrised=False."
            )
        if isinstance(leaf(fn), AuxiliaryPosterior):
            raise InputError(
                f"site '{name}': doubly reparametrised gradients would not train its reverse model. Set "
                "doubly_reparametrised=False."
            )
        draw = fn.rsample()
        message["infer"] = {**message["infer"], DRAWN: draw}
        message["value"], message["done"] = draw.detach().requires_grad_(), True


def doubly_reparametrised(particles: Particles) -> Tensor:
    r"""A surrogate of the bound, summed over datapoints, with Tucker et al.'s gradient (arXiv:1810.04152).

    $$\nabla_\theta: \sum_k \tilde w_k \nabla_\theta \log p_\theta(x, z_k), \quad
      \nabla_\phi: \sum_k \tilde w_k^2 \, \frac{\partial \log w_k}{\partial z_k} \nabla_\phi z_k(\epsilon_k)$$

    with normalised weights $\tilde w_k$. The sites must come from a run under `CutDraws`. A draw also depends on
    earlier draws, so derivatives are propagated from the last site to the first.
    """
    normalised = particles.log_weights.detach().softmax(0)
    surrogate = (normalised * particles.log_model).sum()
    leaves = [site["value"] for sites in particles.sites for site in _cut(sites)]
    weighted = (normalised.square() * particles.log_weights).sum()
    derivatives = iter(_gradients(weighted, leaves))
    for sites in particles.sites:
        run = _cut(sites)
        surrogate = surrogate + _along_paths(run, [next(derivatives) for _ in run])
    return surrogate


def _cut(sites: Sites) -> list[Any]:
    return [site for site in sites.values() if DRAWN in site["infer"]]


def _along_paths(run: list[Any], derivatives: list[Tensor]) -> Tensor:
    """Sum over a run's sites of the draw times the bound's total derivative in it, held constant."""
    leaves = [site["value"] for site in run]
    total = torch.zeros((), dtype=leaves[0].dtype, device=leaves[0].device) if leaves else torch.zeros(())
    for number in reversed(range(len(run))):
        draw, derivative = run[number]["infer"][DRAWN], derivatives[number]
        total = total + (derivative * draw).sum()
        if number and draw.requires_grad:
            passed = _gradients(draw, leaves[:number], derivative)
            derivatives[:number] = [direct + more for direct, more in zip(derivatives[:number], passed, strict=True)]
    return total


def _gradients(output: Tensor, leaves: list[Tensor], weights: Tensor | None = None) -> list[Tensor]:
    """Derivatives of `output` with respect to `leaves`; zero if it does not depend on them."""
    if not leaves or not output.requires_grad:
        return [torch.zeros_like(value) for value in leaves]
    gradients = torch.autograd.grad(output, leaves, weights, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(value) if gradient is None else gradient
        for value, gradient in zip(leaves, gradients, strict=True)
    ]


def score_surrogate(log_weights: Tensor, log_score: Tensor, bound: Tensor) -> Tensor:
    r"""A surrogate for the gradient of draws without reparametrisation, each with its own baseline.

    $$\sum_k (\hat L - \hat L_{-k}) \nabla_\phi \log q_\phi(z_k | x)$$

    where $\hat L_{-k}$ is the bound with $w_k$ replaced by the geometric mean of the other weights. The baseline leaves
    the expectation unchanged (VIMCO, Mnih and Rezende, arXiv:1602.06725). A single particle has no baseline.

    Args:
        log_weights: `(K, n)`.
        log_score: log q of the draws without reparametrisation, `(K, n)`, with gradients.
        bound: `(n,)`.
    """
    signal = bound - _leave_one_out(log_weights.detach()) if len(log_weights) > 1 else bound.expand_as(log_weights)
    return (signal.detach() * log_score).sum()


def _leave_one_out(log_weights: Tensor) -> Tensor:
    """The bound with each particle left out in turn, `(K, n)`."""
    number = len(log_weights)
    itself = torch.eye(number, dtype=torch.bool, device=log_weights.device)[..., None]
    table = log_weights.expand(number, *log_weights.shape)  # (left out, particle, n)
    mean = torch.where(itself, 0.0, table).sum(1, keepdim=True) / (number - 1)
    return torch.where(itself, mean, table).logsumexp(1) - math.log(number)
