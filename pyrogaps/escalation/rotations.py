r"""Annealing from a Gaussian by moves that keep it exactly.

The Hamiltonian of $\log f_b = \log f_0 + b\, r$, with $r = \log p(x, z) - \log f_0(z)$, is split into the Gaussian's,
whose flow is a rotation known in closed form, and that of $b\, r$, a kick. In coordinates $u$ with
$z = \mu + L u$ one step of length $\varepsilon$ is

$$v \leftarrow v + \tfrac\varepsilon2 b\, \nabla_u r, \quad
  (u, v) \leftarrow (u \cos\varepsilon + v \sin\varepsilon,\; v \cos\varepsilon - u \sin\varepsilon), \quad
  v \leftarrow v + \tfrac\varepsilon2 b\, \nabla_u r$$

It is reversible and keeps volume, as a leapfrog step does, but its error is that of the residual alone: near a Gaussian
$\varepsilon$ is about a quarter turn, and one gradient makes a draw that hardly remembers the last. Split HMC: Shahbaba
et al. (2014), arXiv:1106.5941.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyrogaps.anneal import JITTER, GaussianStart, schedule
from pyrogaps.capture import BoundDensity
from pyrogaps.hmc import apply_scale, apply_transpose
from pyrogaps.streams import Noise

WARM_UP = 8
QUARTER_TURN = 0.5 * math.pi
ADAPT = 0.7


class State(NamedTuple):
    """Whitened positions u `(S, B, dim)`, the residual r `(S, B)` there and its gradient in u."""

    position: Tensor
    residual: Tensor
    gradient: Tensor


class Annealed(NamedTuple):
    """A run from b = 0 to 1: log-weights `(S, B)`, acceptance `(B,)`, the step lengths used `(T, B)`."""

    log_weights: Tensor
    acceptance: Tensor
    steps: Tensor


class Rotations:
    """The path from f_0 = `start` to log p(x, z) = `joint` for B datapoints, S points of each."""

    def __init__(self, start: GaussianStart, joint: BoundDensity, num_points: int, num_steps: int) -> None:
        self.start, self.joint, self.num_points, self.num_steps = start, joint, num_points, num_steps

    def pilot(self, num_temperatures: int, target_acceptance: float, noise: Noise) -> Annealed:
        """A run along the path that adapts the step lengths as it goes, whose weights are therefore biased."""
        return self._run(num_temperatures, noise, adapt_to=target_acceptance)

    def run(self, steps: Tensor, noise: Noise) -> Annealed:
        """A run with the step lengths `(T, B)` of a pilot: E[w] = p(x)."""
        return self._run(len(steps), noise, steps=steps)

    def _run(
        self, num_temperatures: int, noise: Noise, *, steps: Tensor | None = None, adapt_to: float | None = None
    ) -> Annealed:
        betas = schedule("linear", num_temperatures).tolist()
        first = noise.normal(self.num_points, self.joint.dim)
        state = self._state(self.start.kept(first))
        log_weights = torch.zeros(state.residual.shape, dtype=torch.float64, device=first.device)
        length = torch.ones(first.shape[1], dtype=torch.float64, device=first.device)
        acceptances, used = [], []
        for t in range(1 - WARM_UP if adapt_to is not None else 1, num_temperatures + 1):
            if t > 0:
                log_weights = log_weights + (betas[t] - betas[t - 1]) * state.residual.double()
            state, acceptance = self._move(state, betas[max(t, 1)], length if steps is None else steps[t - 1], noise)
            if adapt_to is not None:
                length = (length * (ADAPT * (acceptance - adapt_to)).exp()).clamp(max=QUARTER_TURN)
            if t > 0:
                acceptances.append(acceptance)
                used.append(length)
        return Annealed(log_weights, torch.stack(acceptances).mean(0), torch.stack(used) if steps is None else steps)

    def _move(self, state: State, beta: float, length: Tensor, noise: Noise) -> tuple[State, Tensor]:
        """One transition that leaves f_b invariant, and its acceptance rate `(B,)`; `length` is jittered."""
        turn = (length * (1 + JITTER * (2 * noise.uniform(self.num_points) - 1))).to(state.position.dtype)[..., None]
        velocity = self.start.kept(noise.normal(self.num_points, self.joint.dim))
        before, uniform = _energy(state, velocity, beta), noise.uniform(self.num_points)
        proposal, cosine, sine = state, turn.cos(), turn.sin()
        for _ in range(self.num_steps):
            velocity = velocity + 0.5 * beta * turn * proposal.gradient
            position = proposal.position * cosine + velocity * sine
            velocity = velocity * cosine - proposal.position * sine
            proposal = self._state(position)
            velocity = velocity + 0.5 * beta * turn * proposal.gradient
        difference = before - _energy(proposal, velocity, beta)
        difference = torch.where(torch.isfinite(difference), difference, torch.full_like(difference, -torch.inf))
        acceptance = difference.clamp(max=0.0).exp()
        accepted = uniform < acceptance
        pairs = zip(proposal, state, strict=True)
        kept = State(
            *(torch.where(accepted if new.dim() == 2 else accepted[..., None], new, old) for new, old in pairs)
        )
        return kept, acceptance.double().mean(0)

    def _state(self, position: Tensor) -> State:
        start = self.start
        z = start.kept(start.loc + apply_scale(start.scale, position))
        (log_joint,), (gradient,) = self.joint(z.contiguous())
        residual = log_joint - start.peak + 0.5 * position.square().sum(-1)
        return State(position, residual, start.kept(apply_transpose(start.scale, gradient)) + position)


def _energy(state: State, velocity: Tensor, beta: float) -> Tensor:
    return 0.5 * (state.position.square().sum(-1) + velocity.square().sum(-1)) - beta * state.residual
