r"""One annealing loop, from a start f_0 to log p(x, z), whatever moves the chains.

$$\log f_b(z) = (1 - b) \log f_0(z) + b \log p(x_n, z), \quad 0 = b_0 < \dots < b_T = 1$$

Neal (2001), arXiv:physics/9803008; in reverse: Grosse et al. (2015), arXiv:1511.02543.
"""

import math
from collections.abc import Iterator
from typing import Any, Generic, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from pyrogaps.hmc import Integrator, State, transition
from pyrogaps.streams import Noise

Schedule = Literal["linear", "sigmoid", "thermodynamic"]
# Steps are drawn within this share of their size, so that no trajectory closes on itself.
JITTER = 0.3
WARM_UP = 8  # transitions before a pilot run begins


class Move(Integrator[State], Protocol[State]):
    """What moves the chains: an HMC integrator whose targets are the densities along a path."""

    @property
    def adaptation(self) -> "Adaptation": ...

    def target(self, beta: Tensor) -> Any:
        """log f_b, at inverse temperatures `()` or `(B,)`, as the integrator names it."""
        ...

    def difference(self, state: State) -> Tensor:
        """log p(x, z) - log f_0(z), `(S, B)`, in double precision."""
        ...


class Adaptation(NamedTuple):
    """How a pilot run adapts step sizes: by Robbins-Monro on the logarithm, datapoint by datapoint.

    Attributes:
        first: step size at the beginning.
        warm_up_rate, rate: how far the logarithm moves for an acceptance that is off by 1.
        warm_up_at: the temperature, counted from 0, at which the chains warm up.
        longest: the largest step size.
    """

    first: float
    warm_up_rate: float
    rate: float
    warm_up_at: int = 0
    longest: float = math.inf


class StepSizes:
    """Step sizes `(T, B)` along the path that a pilot run has left."""

    def __init__(self, sizes: Tensor) -> None:
        self.sizes = sizes

    def at(self, temperature: int) -> Tensor:
        """For the transition at b_t, t = 1 .. T."""
        return self.sizes[temperature - 1]

    def learn(self, acceptance: Tensor, rate: float) -> None:
        """Nothing is learned: E[w] = p(x) needs step sizes that do not depend on the running chains."""


class AdaptedStepSizes:
    """Step sizes of a pilot run, `current` `(B,)`."""

    def __init__(self, adaptation: Adaptation, target_acceptance: float, like: Tensor) -> None:
        self._adaptation, self._target = adaptation, target_acceptance
        self._log = torch.full_like(like[0, :, 0], adaptation.first, dtype=torch.float64).log()

    @property
    def current(self) -> Tensor:
        return self._log.exp()

    def at(self, temperature: int) -> Tensor:
        """For the next transition, whatever its temperature."""
        return self.current

    def learn(self, acceptance: Tensor, rate: float) -> None:
        """Move towards the acceptance that is aimed at, from that of a transition `(S, B)`."""
        moved = self._log + rate * (acceptance.double().mean(0) - self._target)
        self._log = moved.clamp(max=math.log(self._adaptation.longest))


class Annealed(NamedTuple, Generic[State]):
    """Chains after the transition at one temperature: where they are, log-weights and acceptance, each `(S, B)`."""

    state: State
    log_weights: Tensor
    acceptance: Tensor


def anneal(
    move: Move[State],
    state: State,
    betas: Tensor,
    steps: StepSizes | AdaptedStepSizes,
    noise: Noise,
    *,
    reverse: bool = False,
) -> Iterator[Annealed[State]]:
    r"""Run chains from b = 0 to 1 or, `reverse`, from 1 to 0, temperature by temperature.

    Forward, log w = sum_t (b_t - b_{t-1}) (log p(x, z_{t-1}) - log f_0(z_{t-1})) with z_0 from f_0 has E[w] = p(x).
    In reverse from an exact posterior draw the same sum has E[1/w] = 1/p(x). Both need fixed step sizes; with
    `AdaptedStepSizes` the weights are biased.

    Args:
        move: what moves the chains.
        state: of the chains, where they begin.
        betas: b_0 .. b_T, `(T+1,)` or, datapoint by datapoint, `(T+1, B)`.
        steps: step sizes.
        noise: of the chains, used for nothing else.
    """
    log_weights = torch.zeros_like(move.difference(state))
    temperatures = range(1, len(betas))
    for t in reversed(temperatures) if reverse else temperatures:
        increment = betas[t] - betas[t - 1]
        if not reverse:
            log_weights = log_weights + increment * move.difference(state)
        state, acceptance = _moved(move, state, betas[t], steps.at(t), noise)
        steps.learn(acceptance, move.adaptation.rate)
        if reverse:
            log_weights = log_weights + increment * move.difference(state)
        yield Annealed(state, log_weights, acceptance)


def pilot(
    move: Move[State], state: State, betas: Tensor, steps: AdaptedStepSizes, noise: Noise
) -> Iterator[Annealed[State]]:
    """As `anneal`, after a warm-up: adapts `steps` on chains whose weights are not used in an estimate."""
    adaptation = move.adaptation
    for _ in range(WARM_UP):
        state, acceptance = _moved(move, state, betas[adaptation.warm_up_at], steps.current, noise)
        steps.learn(acceptance, adaptation.warm_up_rate)
    yield from anneal(move, state, betas, steps, noise)


def _moved(move: Move[State], state: State, beta: Tensor, step: Tensor, noise: Noise) -> tuple[State, Tensor]:
    """One transition that leaves f_b invariant, and its acceptance `(S, B)`."""
    position: Tensor = state[0]
    num_chains, _, dim = position.shape
    jittered = step * (1 + JITTER * (2 * noise.uniform(num_chains) - 1))
    velocity, uniform = noise.normal(num_chains, dim), noise.uniform(num_chains)
    state, info = transition(move, state, move.target(beta), jittered.to(position.dtype), velocity, uniform)
    return state, info.acceptance


class Tuning(NamedTuple):
    """What a pilot run leaves for the run that counts: inverse temperatures `(T+1, B)` and step sizes `(T, B)`."""

    inverse_temperatures: Tensor
    step_sizes: Tensor


def schedule(kind: Schedule, num_temperatures: int) -> Tensor:
    """Inverse temperatures 0 = b_0 < ... < b_T = 1, `(T+1,)`; "thermodynamic" is sigmoid until the pilot sets it."""
    fraction = torch.linspace(0, 1, num_temperatures + 1, dtype=torch.float64)
    if kind == "linear":
        return fraction
    curve = torch.sigmoid(4.0 * (2 * fraction - 1))
    return (curve - curve[0]) / (curve[-1] - curve[0])


def tune(kind: Schedule, num_temperatures: int, pilot_betas: Tensor, step_sizes: Tensor, spreads: Tensor) -> Tuning:
    """The schedule and the step sizes along it, interpolated from a pilot run's.

    "thermodynamic" places inverse temperatures at equal steps of the length integral sqrt(Var_b[log p - log f_0]) db,
    for every datapoint (Gelman and Meng, 1998). `spreads` `(T, B)` are those standard deviations along the pilot.
    """
    step_sizes, spreads = _smooth(step_sizes.log()).exp(), _smooth(spreads)
    num_datapoints = step_sizes.shape[1]
    betas = schedule(kind, num_temperatures)[:, None].expand(-1, num_datapoints).to(step_sizes.device)
    grid = pilot_betas.to(step_sizes.device)
    if kind == "thermodynamic":
        floor = 1e-3 + 0.05 * spreads.mean(0)
        length = torch.cumsum(spreads.clamp(min=0).maximum(floor) * grid.diff()[:, None], 0)
        length = torch.cat([torch.zeros_like(length[:1]), length])
        targets = torch.linspace(0, 1, num_temperatures + 1, dtype=torch.float64, device=grid.device)[:, None]
        betas = _interpolate(targets * length[-1], length, grid[:, None].expand_as(length))
        betas = torch.cat([torch.zeros_like(betas[:1]), betas[1:-1], torch.ones_like(betas[:1])])
    knots = grid[1:, None].expand_as(step_sizes)
    return Tuning(betas, _interpolate(betas[1:].contiguous(), knots, step_sizes.log()).exp())


def _smooth(values: Tensor, width: int = 2) -> Tensor:
    """A running mean over `2 width + 1` temperatures, `(T, B)`."""
    padded = torch.cat([values[:1].expand(width, -1), values, values[-1:].expand(width, -1)])
    return padded.unfold(0, 2 * width + 1, 1).mean(-1)


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear interpolation, column by column: `x (Q, B)`, increasing `knots (P, B)`, `values (P, B)`."""
    right = torch.searchsorted(knots.T.contiguous(), x.T.contiguous()).T.clamp(1, len(knots) - 1)
    x0, x1 = knots.gather(0, right - 1), knots.gather(0, right)
    y0, y1 = values.gather(0, right - 1), values.gather(0, right)
    fraction = ((x - x0) / (x1 - x0).clamp(min=1e-300)).clamp(0, 1)
    return y0 + fraction * (y1 - y0)
