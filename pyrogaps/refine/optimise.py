"""The optimisation that all families share: stochastic gradient ascent on every datapoint's ELBO at once."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.density.draws import BlockedGuide
from pyrogaps.errors import InputError
from pyrogaps.refine.local import Refinable, keep_where
from pyrogaps.refine.settings import Refinement
from pyrogaps.streams import Chunk

BETAS, EPSILON = (0.9, 0.99), 1e-8
NUM_TRACE = 50


@dataclass(frozen=True)
class Progress:
    """How a refinement went: `converged (B,)`, `kept_start (B,)`, and the ELBO in nats `(NUM_TRACE,)`, a mean over B."""

    converged: Tensor
    kept_start: Tensor
    trace: Tensor


Report = Callable[[float, Tensor], None]
Evaluate = Callable[[Tensor], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]


def optimise(
    refinable: Refinable,
    evaluate: Evaluate,
    chunk: Chunk,
    settings: Refinement,
    seed: int,
    name: str,
    report: Report | None = None,
) -> Progress:
    r"""Maximise $\mathbb E_q[\log p(x_n, z) - \log q(z)]$ over the parameters of every datapoint of a chunk.

    The gradient is the path derivative (Roeder et al., 2017, arXiv:1703.09194), whose variance vanishes as q approaches
    the posterior; draws come in mirrored pairs. Adam's step is taken in the family's own units, decays by a cosine,
    and the iterates of the last fifth are averaged. `evaluate` gives log p(x, z) and its gradient at `(S, B, dim)`.
    """
    start = [parameter.detach().clone() for parameter in refinable.parameters]
    adam = _Adam(refinable)
    history, average = [], [torch.zeros_like(value) for value in start]
    tail = max(1, settings.num_steps // 5)
    for step in range(settings.num_steps):
        elbo, gradients = _path_gradient(refinable, evaluate, chunk, settings.num_particles, seed, name, step)
        history.append(elbo)
        if report is not None:
            report(1 / settings.num_steps, elbo)
        rate = settings.learning_rate * max(1e-3, 0.5 * (1 + math.cos(math.pi * step / settings.num_steps)))
        adam.step(gradients, rate)
        if step >= settings.num_steps - tail:
            for total, parameter in zip(average, refinable.parameters, strict=True):
                total += parameter.detach() / tail
    keep_where(torch.ones(len(chunk), dtype=torch.bool, device=average[0].device), average, refinable)
    kept = _keep_better(refinable, start, evaluate, chunk, settings, seed, name)
    trace = torch.stack(history)
    return Progress(_converged(trace, settings.tolerance), kept, _thin(trace))


def _path_gradient(
    refinable: Refinable, evaluate: Evaluate, chunk: Chunk, num_particles: int, seed: int, name: str, step: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    guide = BlockedGuide(refinable, chunk, chunk.start)
    with torch.enable_grad():
        z, _ = guide.sample(num_particles, seed, f"refine {name}", step, antithetic=True)
        if not z.requires_grad:
            raise InputError("family: its draws have no reparameterised gradient (rsample), so it cannot be refined")
        point = z.detach().requires_grad_()
        log_q = guide.log_prob(point)
        (score,) = torch.autograd.grad(log_q.sum(), point)
        (log_joint,), (gradient,) = evaluate(point.detach())
        path = torch.nan_to_num(gradient - score, nan=0.0, posinf=0.0, neginf=0.0)
        gradients = torch.autograd.grad((path * z).sum() / num_particles, refinable.parameters)
    return (log_joint - log_q.detach()).mean(0), gradients


class _Adam:
    """Adam with steps in each parameter's own units; every element for itself, so no datapoint feels another."""

    def __init__(self, refinable: Refinable) -> None:
        self.refinable, self.count = refinable, 0
        self.first = [torch.zeros_like(p) for p in refinable.parameters]
        self.second = [torch.zeros_like(p) for p in refinable.parameters]

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...], rate: float) -> None:
        self.count += 1
        zipped = zip(self.refinable.parameters, gradients, self.refinable.units, self.first, self.second, strict=True)
        for parameter, gradient, unit, first, second in zipped:
            scaled = torch.nan_to_num(gradient * unit)
            first.lerp_(scaled, 1 - BETAS[0])
            second.lerp_(scaled.square(), 1 - BETAS[1])
            mean = first / (1 - BETAS[0] ** self.count)
            spread = (second / (1 - BETAS[1] ** self.count)).sqrt()
            parameter += rate * unit * mean / (spread + EPSILON)


def _keep_better(
    refinable: Refinable, start: list[Tensor], evaluate: Evaluate, chunk: Chunk, settings: Refinement, seed: int, name: str
) -> Tensor:
    """Compare the start with what came out on fresh draws, and put the start back where it was better: `(B,)`."""
    finish = [parameter.detach().clone() for parameter in refinable.parameters]
    everywhere = torch.ones(len(chunk), dtype=torch.bool, device=finish[0].device)
    after = _score(refinable, evaluate, chunk, settings, seed, name)
    keep_where(everywhere, start, refinable)
    before = _score(refinable, evaluate, chunk, settings, seed, name)
    better = after >= before
    keep_where(better, finish, refinable)
    return ~better


def _score(refinable: Refinable, evaluate: Evaluate, chunk: Chunk, settings: Refinement, seed: int, name: str) -> Tensor:
    """The ELBO on the selection draws, `(B,)`; -inf where it is not finite."""
    guide, total = BlockedGuide(refinable, chunk, chunk.start), torch.zeros(len(chunk), dtype=torch.float64)
    rounds = max(1, settings.num_selection // settings.num_particles)
    with torch.no_grad():
        for first in range(rounds):
            z, log_q = guide.sample(settings.num_particles, seed, f"select {name}", first)
            (log_joint,), _ = evaluate(z)
            total = total.to(z.device) + (log_joint - log_q).double().mean(0) / rounds
    return torch.nan_to_num(total, nan=-math.inf)


def _converged(trace: Tensor, tolerance: float) -> Tensor:
    """Whether the mean ELBO of the last tenth of `trace (steps, B)` is that of the tenth before, within tolerance."""
    tenth = len(trace) // 10
    if tenth < 2:
        return torch.zeros(trace.shape[1], dtype=torch.bool, device=trace.device)
    last, before = trace[-tenth:].double(), trace[-2 * tenth : -tenth].double()
    error = ((last.var(0) + before.var(0)) / tenth).sqrt()
    return (last.mean(0) - before.mean(0)).abs() < tolerance + 3 * error


def _thin(trace: Tensor) -> Tensor:
    """The mean over datapoints at `NUM_TRACE` evenly spaced stretches of the run."""
    return torch.stack([part.double().mean() for part in torch.tensor_split(trace, NUM_TRACE)])


