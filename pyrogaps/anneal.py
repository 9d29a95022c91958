"""The pieces of annealed importance sampling: where paths start, how they are scheduled and tuned, a run along one."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyrogaps.hmc import Evaluate, Evaluation, HMCState, apply_scale, transition
from pyrogaps.streams import Noise

Schedule = Literal["linear", "sigmoid", "thermodynamic"]
Gradients = Callable[[Tensor], tuple[Tensor, ...]]
Joint = Callable[[Tensor], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
JITTER = 0.3
FEW_DRAWS = 16  # at a time, in double precision


@dataclass(frozen=True)
class GaussianStart:
    """f_0 = N(loc, L L^T) per datapoint: `loc (B, dim)`, `scale` a diagonal `(B, dim)` or factors L `(B, dim, dim)`.

    Coordinates that are not `active` `(B, dim)`, such as those past the end of a sequence, are in no density: they are
    0 in draws and count for nothing in f_0, and L does not mix them with others.
    """

    loc: Tensor
    scale: Tensor
    active: Tensor | None = None

    def draw(self, noise: Tensor) -> Tensor:
        """Points `(S, B, dim)` from standard noise of that shape."""
        return self.kept(self.loc + apply_scale(self.scale, noise))

    def log_density(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log f_0 `(S, B)` and its gradient `(S, B, dim)`."""
        centred = self.kept(z - self.loc)
        if self.scale.dim() == 2:
            whitened = centred / self.scale
        else:
            # Not by the precision: its rounding errors grow with the square of the correlations.
            whitened = torch.einsum("bij,sbj->sbi", self._inverse, centred)
        return self.peak - 0.5 * whitened.square().sum(-1), self.gradient(z)

    def gradient(self, z: Tensor) -> Tensor:
        """The gradient of log f_0, `(S, B, dim)`."""
        centred = self.kept(self.loc - z)
        if self.scale.dim() == 2:
            return centred * self._precision
        return torch.einsum("bij,sbj->sbi", self._precision, centred)

    def at(self, members: Tensor) -> "GaussianStart":
        """f_0 of the datapoints at places `members`, which may repeat."""
        return GaussianStart(
            self.loc[members], self.scale[members], None if self.active is None else self.active[members]
        )

    def factor(self) -> Tensor:
        """L of every datapoint, `(B, dim, dim)`, a copy."""
        return torch.diag_embed(self.scale) if self.scale.dim() == 2 else self.scale.clone()

    @cached_property
    def moves(self) -> Tensor:
        """`scale` as the preconditioner of moves: those that are not active stay where they are."""
        if self.active is None:
            return self.scale
        active = self.active if self.scale.dim() == 2 else self.active[..., None]
        return torch.where(active, self.scale, torch.zeros_like(self.scale))

    def kept(self, z: Tensor) -> Tensor:
        """`z` `(*, B, dim)` with 0 in what is not active."""
        return z if self.active is None else torch.where(self.active, z, torch.zeros_like(z))

    @cached_property
    def _inverse(self) -> Tensor:
        identity = torch.eye(self.scale.shape[-1], dtype=self.scale.dtype, device=self.scale.device)
        inverse: Tensor = torch.linalg.solve_triangular(self.scale, identity.expand_as(self.scale), upper=False)
        return inverse

    @cached_property
    def _precision(self) -> Tensor:
        if self.scale.dim() == 2:
            return self.scale.square().reciprocal()
        return torch.cholesky_inverse(self.scale)

    @cached_property
    def peak(self) -> Tensor:
        """log f_0 at its mean, `(B,)`."""
        diagonal = self.scale if self.scale.dim() == 2 else self.scale.diagonal(dim1=-2, dim2=-1)
        return -self.kept(diagonal.log() + 0.5 * math.log(2 * math.pi)).sum(-1)


class Tuning(NamedTuple):
    """What a pilot run leaves for the run that counts: inverse temperatures `(T+1, B)` and step sizes `(T, B)`."""

    inverse_temperatures: Tensor
    step_sizes: Tensor


class AnnealResult(NamedTuple):
    """A run along a path: log-weights `(S, B)`, mean acceptance `(B,)`, where the chains ended `(S, B, dim)` and traces
    per temperature.
    """

    log_weights: Tensor
    acceptance: Tensor
    position: Tensor
    acceptance_by_temperature: Tensor
    ess_by_temperature: Tensor


def schedule(kind: Schedule, num_temperatures: int) -> Tensor:
    """Inverse temperatures 0 = b_0 < ... < b_T = 1, `(T+1,)`; "thermodynamic" is sigmoid until the pilot sets it."""
    fraction = torch.linspace(0, 1, num_temperatures + 1, dtype=torch.float64)
    if kind == "linear":
        return fraction
    curve = torch.sigmoid(4.0 * (2 * fraction - 1))
    return (curve - curve[0]) / (curve[-1] - curve[0])


def anneal(
    state: HMCState,
    evaluate: Evaluate,
    tuning: Tuning,
    num_leapfrog: int,
    scale: Tensor,
    noise: Noise,
    *,
    reverse: bool,
) -> AnnealResult:
    r"""Run chains along log f_b = (1-b) log f_0 + b log p(x, z), from b = 0 to 1 or, `reverse`, from 1 to 0.

    Forward, log w = sum_t (b_t - b_{t-1}) (log p(x, z_{t-1}) - log f_0(z_{t-1})) with z_0 from f_0 has E[w] = p(x).
    In reverse from an exact posterior draw the same sum has E[1/w] = 1/p(x). Both need step sizes that do not depend on
    the running chains. Neal (2001), arXiv:physics/9803008; Grosse et al. (2015), arXiv:1511.02543.
    """
    betas, steps = tuning
    num_chains, dim = len(state.position), state.position.shape[-1]
    log_weights = torch.zeros(state.position.shape[:2], dtype=torch.float64, device=state.position.device)
    acceptances, ess = [], []
    order = range(len(steps), 0, -1) if reverse else range(1, len(steps) + 1)
    for t in order:
        increment = betas[t] - betas[t - 1]
        if not reverse:
            log_weights = log_weights + increment * _difference(state)
        state, info = transition(
            state,
            evaluate,
            _mix(betas[t], state),
            (steps[t - 1] * (1 + JITTER * (2 * noise.uniform(num_chains) - 1))).to(state.position.dtype),
            num_leapfrog,
            scale,
            noise.normal(num_chains, dim),
            noise.uniform(num_chains),
        )
        if reverse:
            log_weights = log_weights + increment * _difference(state)
        acceptances.append(info.acceptance.mean(0))
        ess.append(_relative_ess(-log_weights if reverse else log_weights))
    by_temperature = torch.stack(acceptances)
    return AnnealResult(log_weights, by_temperature.mean(0), state.position, by_temperature.mean(1), torch.stack(ess))


def joined(runs: list[AnnealResult]) -> AnnealResult:
    """Runs of the same datapoints by chains of their own, as one; the effective share is the mean over runs.

    Where the chains ended is left out: `(S, B, dim)` of all of them may be too much.
    """
    if len(runs) == 1:
        return runs[0]
    shares = torch.tensor([len(run.log_weights) for run in runs], dtype=torch.float64)
    shares = (shares / shares.sum()).to(runs[0].log_weights.device)

    def mean(parts: list[Tensor]) -> Tensor:
        weighted: Tensor = torch.tensordot(shares.to(parts[0].dtype), torch.stack(parts), 1)
        return weighted

    return AnnealResult(
        torch.cat([run.log_weights for run in runs]),
        mean([run.acceptance for run in runs]),
        runs[0].position[:0],
        mean([run.acceptance_by_temperature for run in runs]),
        mean([run.ess_by_temperature for run in runs]),
    )


def pilot(
    state: HMCState,
    evaluate: Evaluate,
    betas: Tensor,
    num_leapfrog: int,
    scale: Tensor,
    noise: Noise,
    target_acceptance: float,
) -> tuple[Tensor, Tensor]:
    """Adapt step sizes along the path on chains that are thrown away.

    Robbins-Monro on the acceptance averaged over chains, separately for every datapoint, smoothed over neighbouring
    temperatures. Returns step sizes `(T, B)` and the spread of log p(x, z) - log f_0(z) over chains `(T, B)`.
    """
    num_chains, num_datapoints, dim = state.position.shape
    log_step = torch.full((num_datapoints,), dim**-0.25, dtype=torch.float64, device=state.position.device).log()
    warm_up, log_steps, spreads = 8, [], []
    for t in range(-warm_up, len(betas)):
        if t == 0:
            continue
        step = (log_step.exp() * (1 + JITTER * (2 * noise.uniform(num_chains) - 1))).to(state.position.dtype)
        weights = _mix(betas[max(t, 0)].expand(num_datapoints), state)
        velocity, uniform = noise.normal(num_chains, dim), noise.uniform(num_chains)
        state, info = transition(state, evaluate, weights, step, num_leapfrog, scale, velocity, uniform)
        rate = 1.0 if t < 0 else 0.5
        log_step = log_step + rate * (info.acceptance.double().mean(0) - target_acceptance)
        if t > 0:
            log_steps.append(log_step)
            spreads.append(_difference(state).std(0))
    return _smooth(torch.stack(log_steps)).exp(), _smooth(torch.stack(spreads))


def tune(kind: Schedule, num_temperatures: int, pilot_betas: Tensor, step_sizes: Tensor, spreads: Tensor) -> Tuning:
    """The schedule and the step sizes along it, interpolated from a pilot run's.

    "thermodynamic" places inverse temperatures at equal steps of the length integral sqrt(Var_b[log p - log f_0]) db,
    for every datapoint (Gelman and Meng, 1998).
    """
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


def moments_start(blocks: Iterable[Tensor], *, diagonal: bool, widen: float, active: Tensor | None) -> GaussianStart:
    """The Gaussian with the mean and covariance of draws, which come in `blocks` `(S, B, dim)`, scales times `widen`.

    `diagonal` leaves covariances out. Coordinates that are not `active` get unit scales.
    """
    number, shift, total, products = 0, torch.empty(0), torch.empty(0), torch.empty(0)
    for draws in blocks:
        if not number:
            shift, dim = draws.mean(0), draws.shape[-1]
            total = torch.zeros_like(shift, dtype=torch.float64)
            products = torch.zeros_like(total) if diagonal else total[..., None].repeat(1, 1, dim)
        number += len(draws)
        for few in (draws - shift).split(FEW_DRAWS):
            centred = few.double()
            total += centred.sum(0)
            products += centred.square().sum(0) if diagonal else torch.einsum("sbi,sbj->bij", centred, centred)
    mean = total / number
    products -= number * (mean.square() if diagonal else mean[..., :, None] * mean[..., None, :])
    covariance = products / (number - 1)
    variance = covariance if diagonal else covariance.diagonal(dim1=-2, dim2=-1)
    loc, scale = shift + mean.to(shift.dtype), variance.clamp(min=0.0).sqrt().to(shift.dtype)
    scale = scale.clamp(min=torch.finfo(scale.dtype).tiny ** 0.5)
    if active is not None:
        scale = torch.where(active, scale, torch.ones_like(scale))
    if diagonal:
        return GaussianStart(loc, widen * scale, active)
    correlation = covariance / (scale[..., :, None] * scale[..., None, :]).double()
    identity = torch.eye(scale.shape[-1], dtype=torch.float64, device=scale.device)
    variances = correlation.diagonal(dim1=-2, dim2=-1).clamp(min=0.5)
    correlation = correlation * (1 - identity) + identity * variances[..., None]
    factor = torch.linalg.cholesky(correlation + 1e-4 * identity).to(scale.dtype)
    return GaussianStart(loc, widen * scale[..., None] * factor, active)


def starting_at(start: GaussianStart, joint: Joint, gradients: Gradients | None = None) -> Evaluation:
    """The path's evaluation when f_0 is a Gaussian: its density in closed form beside the model's.

    `joint` gives the model's log density and gradient; `gradients`, where that is cheaper, the gradient alone.
    """
    model_gradients = gradients or (lambda position: joint(position)[1])

    def evaluate(position: Tensor) -> HMCState:
        log_start, start_gradient = start.log_density(position)
        (log_joint,), (gradient,) = joint(position)
        return HMCState(position, (log_start, log_joint), (start_gradient, gradient))

    return Evaluation(evaluate, lambda position: (start.gradient(position), *model_gradients(position)))


def _mix(beta: Tensor, state: HMCState) -> tuple[Tensor, Tensor]:
    beta = beta.to(state.position.dtype).to(state.position.device)
    return 1 - beta, beta


def _difference(state: HMCState) -> Tensor:
    return state.log_densities[1].double() - state.log_densities[0].double()


def _relative_ess(log_weights: Tensor) -> Tensor:
    weights = torch.softmax(log_weights, 0)
    return (1 / weights.square().sum(0) / len(weights)).mean()


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
