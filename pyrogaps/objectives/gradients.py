"""Gradient estimators of importance-weighted bounds: doubly reparametrised, and by scores with a baseline."""

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
    """Draws a guide's sites itself and hands the values on cut off from the parameters behind them.

    log q and log p then depend on a draw as on a variable of its own, a leaf. The draw, which depends on the parameters
    and on the leaves before it, is kept in the site's `infer`.

    Raises `InputError`, naming the site, for a distribution that cannot be reparametrised.
    """

    def _pyro_sample(self, message: Any) -> None:
        if message["done"] or message["is_observed"] or site_is_subsample(message):
            return
        name, fn = message["name"], message["fn"]
        if not fn.has_rsample:
            raise InputError(
                f"site '{name}': {type(leaf(fn)).__name__} cannot be reparametrised, which doubly reparametrised "
                "gradients need; set doubly_reparametrised=False"
            )
        if isinstance(leaf(fn), AuxiliaryPosterior):
            raise InputError(
                f"site '{name}': its reverse model would not be trained by doubly reparametrised gradients; set "
                "doubly_reparametrised=False"
            )
        draw = fn.rsample()
        message["infer"] = {**message["infer"], DRAWN: draw}
        message["value"], message["done"] = draw.detach().requires_grad_(), True


def doubly_reparametrised(particles: Particles) -> Tensor:
    r"""A surrogate of the bound, summed over datapoints, with Tucker et al.'s gradient (arXiv:1810.04152).

    $$\nabla_\theta: \sum_k \tilde w_k \nabla_\theta \log p_\theta(x, z_k), \quad
      \nabla_\phi: \sum_k \tilde w_k^2 \, \frac{\partial \log w_k}{\partial z_k} \nabla_\phi z_k(\epsilon_k)$$

    with normalised weights $\tilde w_k$. The sites must come from a run under `CutDraws`. A site's draw depends on
    earlier ones too: what reaches it from later draws is added to its own derivative, last site first.
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
    """The sum over a run's sites of draw times the bound's whole derivative in it, itself held constant."""
    leaves = [site["value"] for site in run]
    total = torch.zeros((), dtype=leaves[0].dtype, device=leaves[0].device) if leaves else torch.zeros(())
    for number in reversed(range(len(run))):
        draw, derivative = run[number]["infer"][DRAWN], derivatives[number]
        total = total + (derivative * draw).sum()
        if number and draw.requires_grad:
            passed = _gradients(draw, leaves[:number], derivative)
            derivatives[:number] = [own + more for own, more in zip(derivatives[:number], passed, strict=True)]
    return total


def _gradients(output: Tensor, leaves: list[Tensor], weights: Tensor | None = None) -> list[Tensor]:
    """Derivatives of `output` in `leaves`, zero where it does not depend on them."""
    if not leaves or not output.requires_grad:
        return [torch.zeros_like(each) for each in leaves]
    found = torch.autograd.grad(output, leaves, weights, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(each) if one is None else one for each, one in zip(leaves, found, strict=True)]


def score_surrogate(log_weights: Tensor, log_score: Tensor, bound: Tensor) -> Tensor:
    r"""A surrogate that adds the gradient of draws without reparametrisation, each with a baseline of its own.

    $$\sum_k (\hat L - \hat L_{-k}) \nabla_\phi \log q_\phi(z_k | x)$$

    where $\hat L_{-k}$ is the bound with the geometric mean of the others in place of $w_k$, which does not touch the
    expectation (VIMCO, Mnih and Rezende, arXiv:1602.06725). With one particle there are no others: a plain score.

    Args:
        log_weights: `(K, n)`.
        log_score: log q of the draws in question, `(K, n)`, with gradients.
        bound: `(n,)`.
    """
    signal = bound - _leave_one_out(log_weights.detach()) if len(log_weights) > 1 else bound.expand_as(log_weights)
    return (signal.detach() * log_score).sum()


def _leave_one_out(log_weights: Tensor) -> Tensor:
    """The bound without each particle in turn, `(K, n)`."""
    number = len(log_weights)
    itself = torch.eye(number, dtype=torch.bool, device=log_weights.device)[..., None]
    table = log_weights.expand(number, *log_weights.shape)  # (left out, particle, n)
    mean = torch.where(itself, 0.0, table).sum(1, keepdim=True) / (number - 1)
    return torch.where(itself, mean, table).logsumexp(1) - math.log(number)
