"""Batched Hamiltonian Monte Carlo transitions, with the integrator as an argument.

Neal (2011), MCMC using Hamiltonian dynamics, arXiv:1206.1901.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from pyrogaps.scales import Scale, apply_scale, apply_transpose

# The positions of chains `(S, B, dim)` and what is known there: a named tuple of tensors, and of tuples of them.
State = TypeVar("State", bound=tuple[Any, ...])


class Integrator(Protocol[State]):
    """Hamiltonian dynamics on a family of targets; `at` names one of them, a number or the weights of a mixture."""

    def propose(self, state: State, velocity: Tensor, at: Any, step: Tensor) -> tuple[State, Tensor]:
        """State and velocity after a trajectory of steps of length `step` `(S, B, 1)`, reversible, volume kept."""
        ...

    def log_density(self, state: State, velocity: Tensor, at: Any) -> Tensor:
        """log of the target times that of the velocity, `(S, B)`, up to a constant: minus the Hamiltonian."""
        ...


class HMCInfo(NamedTuple):
    """What happened in a transition: acceptance probability and decision, each `(S, B)`."""

    acceptance: Tensor
    accepted: Tensor


def transition(
    integrator: Integrator[State], state: State, at: Any, step_size: Tensor, velocity: Tensor, uniform: Tensor
) -> tuple[State, HMCInfo]:
    """Leave the target `at` invariant: a trajectory and an accept decision.

    Args:
        integrator: `Leapfrog`, or another that is reversible and keeps volume.
        state: where the chains are.
        at: the target, as the integrator names it.
        step_size: broadcasting to `(S, B)`; it must not depend on the running chains.
        velocity: standard normal noise `(S, B, dim)`.
        uniform: uniform noise `(S, B)`.

    A proposal whose density is not finite is rejected.
    """
    before = integrator.log_density(state, velocity, at)
    proposal, velocity = integrator.propose(state, velocity, at, step_size[..., None])
    difference = integrator.log_density(proposal, velocity, at) - before
    difference = torch.where(torch.isfinite(difference), difference, torch.full_like(difference, -torch.inf))
    acceptance = difference.clamp(max=0.0).exp()
    accepted = uniform < acceptance
    return _select(accepted, proposal, state), HMCInfo(acceptance, accepted)


class HMCState(NamedTuple):
    """Positions and, for each of the K densities that a path mixes, log density and gradient there.

    Shapes: `position (S, B, dim)`, `log_densities` K times `(S, B)`, `gradients` K times `(S, B, dim)`. The target is
    sum_k weight_k log density_k, so a new point of the path costs no evaluation.
    """

    position: Tensor
    log_densities: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True)
class Evaluation:
    """How a path is evaluated: the whole state at a position, or the gradients there alone, which can cost less."""

    state: Callable[[Tensor], HMCState]
    gradients: Callable[[Tensor], tuple[Tensor, ...]]

    def __call__(self, position: Tensor) -> HMCState:
        return self.state(position)


Evaluate = Callable[[Tensor], HMCState] | Evaluation


@dataclass(frozen=True)
class Leapfrog:
    """Leapfrog steps on sum_k weights_k log density_k; `at` is the K weights, each broadcasting to `(S, B)`.

    Attributes:
        evaluate: positions to state, called once a step; an `Evaluation` gives gradients alone until the last one.
        scale: the preconditioner, standard deviations `(B, dim)`, a lower Cholesky factor `(B, dim, dim)` or a
            `Factor`: the mass matrix is the inverse of the covariance it stands for.
        num_steps: of a trajectory.
    """

    evaluate: Evaluate
    scale: Scale
    num_steps: int

    def propose(
        self, state: HMCState, velocity: Tensor, at: tuple[Tensor, ...], step: Tensor
    ) -> tuple[HMCState, Tensor]:
        evaluate, scale = self.evaluate, self.scale
        velocity = velocity + 0.5 * step * _push(state.gradients, at, scale)
        position = state.position + step * apply_scale(scale, velocity)
        for _ in range(self.num_steps - 1):
            # The half steps of the velocity before and after a position are one.
            known = evaluate.gradients(position) if isinstance(evaluate, Evaluation) else evaluate(position).gradients
            velocity = velocity + step * _push(known, at, scale)
            position = position + step * apply_scale(scale, velocity)
        proposal = evaluate(position)
        return proposal, velocity + 0.5 * step * _push(proposal.gradients, at, scale)

    def log_density(self, state: HMCState, velocity: Tensor, at: tuple[Tensor, ...]) -> Tensor:
        terms = [weight * value for weight, value in zip(at, state.log_densities, strict=True)]
        return sum(terms[1:], start=terms[0]) - 0.5 * velocity.square().sum(-1)


def _push(gradients: tuple[Tensor, ...], weights: tuple[Tensor, ...], scale: Scale) -> Tensor:
    force = sum(
        (weight[..., None] * gradient for weight, gradient in zip(weights[1:], gradients[1:], strict=True)),
        start=weights[0][..., None] * gradients[0],
    )
    return apply_transpose(scale, force)


def _select(accepted: Tensor, proposal: Any, state: Any) -> Any:
    """`proposal` where it was accepted, else `state`, entry by entry."""
    if isinstance(state, Tensor):
        return torch.where(accepted if state.dim() == accepted.dim() else accepted[..., None], proposal, state)
    chosen = [_select(accepted, new, old) for new, old in zip(proposal, state, strict=True)]
    return type(state)(*chosen) if hasattr(state, "_fields") else tuple(chosen)
