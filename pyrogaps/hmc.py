"""One batched Hamiltonian Monte Carlo transition on a path of densities.

Neal (2011), MCMC using Hamiltonian dynamics, arXiv:1206.1901.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class HMCState(NamedTuple):
    """Positions and, for each of the K densities that a path mixes, log density and gradient there.

    Shapes: `position (S, B, dim)`, `log_densities` K times `(S, B)`, `gradients` K times `(S, B, dim)`. The target is
    sum_k weight_k log density_k, so a new point of the path costs no evaluation.
    """

    position: Tensor
    log_densities: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


class HMCInfo(NamedTuple):
    """What happened in a transition: acceptance probability and decision, each `(S, B)`."""

    acceptance: Tensor
    accepted: Tensor


@dataclass(frozen=True)
class Evaluation:
    """How a path is evaluated: the whole state at a position, or the gradients there alone, which can cost less."""

    state: Callable[[Tensor], HMCState]
    gradients: Callable[[Tensor], tuple[Tensor, ...]]

    def __call__(self, position: Tensor) -> HMCState:
        return self.state(position)


Evaluate = Callable[[Tensor], HMCState] | Evaluation


def transition(
    state: HMCState,
    evaluate: Evaluate,
    weights: tuple[Tensor, ...],
    step_size: Tensor,
    num_leapfrog: int,
    scale: Tensor,
    velocity: Tensor,
    uniform: Tensor,
) -> tuple[HMCState, HMCInfo]:
    """Leave exp(sum_k weights_k log density_k) invariant: `num_leapfrog` leapfrog steps and an accept decision.

    Args:
        state: where the chains are.
        evaluate: positions to state, called `num_leapfrog` times; an `Evaluation` gives gradients alone till the last.
        weights: K mixing weights, each broadcasting to `(S, B)`.
        step_size: broadcasting to `(S, B)`; it must not depend on the running chains.
        scale: the preconditioner, standard deviations `(B, dim)` or a lower Cholesky factor `(B, dim, dim)`: the mass
            matrix is the inverse of the covariance it stands for.
        velocity: standard normal noise `(S, B, dim)`.
        uniform: uniform noise `(S, B)`.

    A proposal whose density is not finite is rejected.
    """
    step = step_size[..., None]
    energy = _log_target(state, weights) - 0.5 * velocity.square().sum(-1)
    velocity = velocity + 0.5 * step * _push(state.gradients, weights, scale)
    position = state.position + step * apply_scale(scale, velocity)
    for _ in range(num_leapfrog - 1):
        # The half steps of the velocity before and after a position are one.
        gradients = evaluate.gradients(position) if isinstance(evaluate, Evaluation) else evaluate(position).gradients
        velocity = velocity + step * _push(gradients, weights, scale)
        position = position + step * apply_scale(scale, velocity)
    proposal = evaluate(position)
    velocity = velocity + 0.5 * step * _push(proposal.gradients, weights, scale)
    difference = _log_target(proposal, weights) - 0.5 * velocity.square().sum(-1) - energy
    difference = torch.where(torch.isfinite(difference), difference, torch.full_like(difference, -torch.inf))
    acceptance = difference.clamp(max=0.0).exp()
    accepted = uniform < acceptance
    return _select(accepted, proposal, state), HMCInfo(acceptance, accepted)


def apply_scale(scale: Tensor, vector: Tensor) -> Tensor:
    """`L v` for a diagonal `(B, dim)` or lower-triangular `(B, dim, dim)` scale and `v` `(S, B, dim)`."""
    if scale.dim() == 2:
        return scale * vector
    return torch.einsum("bij,sbj->sbi", scale, vector)


def apply_transpose(scale: Tensor, vector: Tensor) -> Tensor:
    """`L^T v`, as `apply_scale`."""
    if scale.dim() == 2:
        return scale * vector
    return torch.einsum("bij,sbi->sbj", scale, vector)


def _push(gradients: tuple[Tensor, ...], weights: tuple[Tensor, ...], scale: Tensor) -> Tensor:
    force = sum(
        (weight[..., None] * gradient for weight, gradient in zip(weights[1:], gradients[1:], strict=True)),
        start=weights[0][..., None] * gradients[0],
    )
    return apply_transpose(scale, force)


def _log_target(state: HMCState, weights: tuple[Tensor, ...]) -> Tensor:
    terms = [weight * value for weight, value in zip(weights, state.log_densities, strict=True)]
    return sum(terms[1:], start=terms[0])


def _select(accepted: Tensor, proposal: HMCState, state: HMCState) -> HMCState:
    def pick(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(accepted if new.dim() == accepted.dim() else accepted[..., None], new, old)

    return HMCState(
        pick(proposal.position, state.position),
        tuple(pick(n, o) for n, o in zip(proposal.log_densities, state.log_densities, strict=True)),
        tuple(pick(n, o) for n, o in zip(proposal.gradients, state.gradients, strict=True)),
    )
