"""The optimisation that all families share: stochastic gradient ascent on the ELBO of every datapoint at once."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.capture import BoundDensity
from pyrogaps.density.draws import BlockedGuide
from pyrogaps.density.local import NoInverseError
from pyrogaps.density.paths import Paths
from pyrogaps.errors import InputError
from pyrogaps.memory import free_cycles
from pyrogaps.refine.adam import Adam
from pyrogaps.refine.local import Refinable, keep_where, points_of
from pyrogaps.refine.objective import Objective
from pyrogaps.refine.settings import Refinement
from pyrogaps.run import Run
from pyrogaps.streams import Chunk, Stream

# Nats to a unit, for a time: at the optimum slopes are about 1, and Adam would long remember a far steeper start. Not
# to the end, because where slopes are skewed, clipped ones are biased.
CLIP, CLIP_FRACTION = 3.0, 0.3
PLAIN_FRACTION = 0.1  # mirrored draws never leave a saddle between two modes
NUM_TRACE = 50
MEASURE_EVERY = 5
MIN_FURTHER_STEPS = 50
MAX_ERROR = 0.02  # nats, of the difference by which convergence is judged


@dataclass(frozen=True)
class Progress:
    """How a refinement went: `converged (B,)`, `kept_start (B,)`, the ELBO in nats `(NUM_TRACE,)`, a mean over B."""

    converged: Tensor
    kept_start: Tensor
    trace: Tensor


@dataclass(frozen=True)
class Optimisation:
    r"""Maximise $\mathbb E_q[\log p(x_n, z) - \log q(z)]$ over the parameters of every datapoint of a chunk.

    The gradient is the path derivative (Roeder et al., 2017, arXiv:1703.09194), whose variance vanishes as q approaches
    the posterior. Draws come in mirrored pairs, except in the first tenth of the steps. Adam's step is taken in the
    family's own units and decays by a cosine, and the iterates of the last fifth are averaged. The trace holds the ELBO
    of some steps only, because values cost as much as gradients.

    Streams are named after `name`, so that the refinements of several families are independent.
    """

    refinable: Refinable
    density: Objective
    chunk: Chunk
    settings: Refinement
    run: Run
    name: str

    def maximise(self) -> Progress:
        """Refine, compare the result with its start and with a run of further steps, and keep the best of the three."""
        refinable, start = self.refinable, _copy(self.refinable)
        further_steps = max(MIN_FURTHER_STEPS, self.settings.num_steps // 10)
        share = 1 / (self.settings.num_steps + further_steps)  # of the progress bar's stage
        trace = self._ascend(self.settings.num_steps, f"refine {self.name}", share, clip=CLIP)
        finish, before = _copy(refinable), self._scores(refinable)
        self._ascend(further_steps, f"refine further {self.name}", share)
        further = self._scores(refinable)
        converged = settled(before, further, self.settings.tolerance)
        better = further.mean(0) > before.mean(0)
        keep_where(~better, finish, refinable)
        best, highest = _copy(refinable), torch.where(better, further, before)
        keep_where(torch.ones_like(better), start, refinable)
        at_start = self._scores(refinable)
        kept = at_start.mean(0) > highest.mean(0)
        # A start that is kept because refinement made it worse is no optimum that anything is known of.
        converged = converged & ~(kept & ~settled(highest, at_start, self.settings.tolerance))
        keep_where(~kept, best, refinable)
        return Progress(converged, kept, _thin(trace))

    def take_better(self, other: Refinable) -> Tensor:
        """Set the parameters to those of `other` for the datapoints whose bound is higher there: `(B,)`."""
        scores = [self._scores(guide).mean(0) for guide in (self.refinable, other)]
        better = scores[1] > scores[0]
        keep_where(better, _copy(other), self.refinable)
        return better

    def _ascend(self, num_steps: int, purpose: str, share: float, clip: float = math.inf) -> Tensor:
        """Take `num_steps` of Adam, end at the mean of the last fifth; returns the ELBO at some of them `(some, B)`."""
        refinable, stream = self.refinable, self.run.stream(purpose)
        adam, tail = Adam(refinable), max(1, num_steps // 5)
        history, average = [], [torch.zeros_like(parameter) for parameter in refinable.parameters]
        every = max(1, min(MEASURE_EVERY, num_steps // (2 * NUM_TRACE)))
        for step in range(num_steps):
            mirrored = step >= PLAIN_FRACTION * num_steps
            elbo, gradients = self._path_gradient(stream, step, measure=step % every == 0, mirrored=mirrored)
            if elbo is not None:
                history.append(elbo)
            self.run.bar.advance(share, history[-1])
            rate = self.settings.learning_rate * max(1e-3, 0.5 * (1 + math.cos(math.pi * step / num_steps)))
            adam.step(gradients, rate, clip if step < CLIP_FRACTION * num_steps else math.inf)
            free_cycles()
            if step >= num_steps - tail:
                for total, parameter in zip(average, refinable.parameters, strict=True):
                    total.add_(parameter.detach(), alpha=1 / tail)
        keep_where(torch.ones(len(self.chunk), dtype=torch.bool, device=average[0].device), average, refinable)
        return torch.stack(history)

    def _path_gradient(
        self, stream: Stream, step: int, *, measure: bool, mirrored: bool
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """The gradient of the ELBO and, if asked to `measure` it, the ELBO `(B,)`, on the draws of one step."""
        num_particles, density, log_joint = self._num_particles, self.density.at_step(step), None
        with torch.enable_grad():  # which the caller may have switched off
            guide = BlockedGuide(self.refinable, self.chunk)
            paths = guide.sample_path(num_particles, stream, step, antithetic=mirrored)
            if paths is not None:
                return self._gradient_along(paths, density, measure=measure)
            draws, own_log_q = guide.sample_extended(num_particles, stream, step, antithetic=mirrored)
            if not draws.requires_grad:
                raise InputError(
                    "family: its draws have no reparameterised gradient (rsample), so it cannot be refined"
                )
            point = draws.detach().requires_grad_()
            try:
                log_q = guide.log_prob(point)
                (score,) = torch.autograd.grad(log_q.sum(), point)
                entropy: Tensor | float = 0.0
            except NoInverseError:  # log q at the draws as functions of the parameters, which has more variance
                log_q, score, entropy = own_log_q, torch.zeros_like(point), -own_log_q.sum() / num_particles
            z = point.detach()[..., : density.dim].contiguous()
            if measure:
                (log_joint,), (gradient,) = density(z)
            else:
                (gradient,) = density.gradients(z)
            gradient = torch.nn.functional.pad(gradient, (0, draws.shape[-1] - density.dim))
            path = torch.nan_to_num(gradient - score, nan=0.0, posinf=0.0, neginf=0.0)
            target = (path * draws).sum() / num_particles + entropy
            # A reverse model's own parameters move no draw: they are fitted to the auxiliary variables by likelihood.
            log_reverse = guide.log_reverse(point.detach())
            if log_reverse is not None:
                target = target + log_reverse.sum() / num_particles
            # A guide may use some of its parameters for some of the data only.
            parameters = self.refinable.parameters
            gradients = torch.autograd.grad(target, parameters, allow_unused=True, materialize_grads=True)
        return None if log_joint is None else (log_joint - log_q.detach()).mean(0), gradients

    def _gradient_along(
        self, paths: Paths, density: BoundDensity, *, measure: bool
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """As `_path_gradient`, from draws and log q as a function of the draws alone, and where discrete sites take all
        their states, from the derivative of these states' weights.
        """
        z, weighted = paths.z.detach().contiguous(), paths.log_weights is not None
        elbo = log_joint = None
        if measure or weighted:
            (log_joint,), (gradient,) = density(z)
        else:
            (gradient,) = density.gradients(z)
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        target = paths.mean((gradient * paths.z).sum(-1) - paths.log_q).sum()
        if log_joint is not None:
            log_ratio = log_joint - paths.log_q.detach()
            elbo = paths.mean(log_ratio)
            target = target + paths.of_weights(log_ratio).sum() if weighted else target
        gradients = torch.autograd.grad(target, self.refinable.parameters, allow_unused=True, materialize_grads=True)
        return elbo, gradients

    @property
    def _num_particles(self) -> int:
        return points_of(self.refinable, self.settings.num_particles)[0]

    def _scores(self, refinable: Refinable) -> Tensor:
        """The ELBO on the selection draws, the same for all that are compared: `(rounds, B)`, -inf where not finite."""
        guide, scores, number = BlockedGuide(refinable, self.chunk), list[Tensor](), self._num_particles
        stream = self.run.stream(f"select {self.name}")
        with torch.no_grad():
            for first in range(max(2, self.settings.num_selection // self.settings.num_particles)):
                paths = guide.sample_paths(number, stream, first) or Paths(*guide.sample(number, stream, first))
                (log_joint,) = self.density.at_step(first).values(paths.z)
                scores.append(paths.mean((log_joint - paths.log_q).double()))
                free_cycles()
        scored = torch.stack(scores)
        return torch.where(torch.isfinite(scored), scored, torch.full_like(scored, -math.inf))


def _copy(refinable: Refinable) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in refinable.parameters]


def settled(before: Tensor, after: Tensor, tolerance: float) -> Tensor:
    """Whether further steps, from scores `before` to `after`, gained nothing, see `no_gain`: `(B,)`.

    What cannot be compared, because the ELBO has heavy tails there, has not settled.
    """
    gain, error = after - before, error_of(before, after)
    known = (error <= MAX_ERROR) | (gain.mean(0) + 2 * error <= tolerance)
    return no_gain(before, after, tolerance) & known


def no_gain(before: Tensor, after: Tensor, tolerance: float) -> Tensor:
    """Whether `after`, `(rounds, B)`, is not above `before` by more than the tolerance and two standard errors: `(B,)`.

    Both are on the same draws, so their difference is known far better than either.
    """
    return (after - before).mean(0) <= tolerance + 2 * error_of(before, after)  # False for NaN


def error_of(before: Tensor, after: Tensor) -> Tensor:
    """The standard error of the mean gain from `before` to `after`, `(rounds, B)` on the same draws: `(B,)`."""
    return (after - before).std(0) / math.sqrt(len(after))


def _thin(trace: Tensor) -> Tensor:
    """The mean over datapoints at `NUM_TRACE` evenly spaced stretches of the run."""
    return torch.stack([part.double().mean() for part in torch.tensor_split(trace, NUM_TRACE)])
