"""The optimisation that all families share: stochastic gradient ascent on every datapoint's ELBO at once."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.density.draws import BlockedGuide
from pyrogaps.refine.adam import Adam
from pyrogaps.refine.local import Refinable, keep_where
from pyrogaps.refine.objective import Objective
from pyrogaps.refine.path import PathGradient
from pyrogaps.refine.settings import Refinement
from pyrogaps.streams import Chunk

# Nats to a unit, for a time: at the optimum slopes are about 1, and Adam would long remember a far steeper start. Not
# to the end, because where slopes are skewed, clipped ones are biased.
CLIP, CLIP_FRACTION = 3.0, 0.3
PLAIN_FRACTION = 0.1  # mirrored draws never leave a saddle between two modes
NUM_TRACE = 50
MEASURE_EVERY = 5


@dataclass(frozen=True)
class Progress:
    """How a refinement went: `converged (B,)`, `kept_start (B,)`, the ELBO in nats `(NUM_TRACE,)`, a mean over B."""

    converged: Tensor
    kept_start: Tensor
    trace: Tensor


Report = Callable[[float, Tensor], None]


def optimise(
    refinable: Refinable,
    density: Objective,
    chunk: Chunk,
    settings: Refinement,
    seed: int,
    name: str,
    report: Report | None = None,
) -> Progress:
    r"""Maximise $\mathbb E_q[\log p(x_n, z) - \log q(z)]$ over the parameters of every datapoint of a chunk.

    The gradient is the path derivative, whose variance vanishes as q approaches the posterior; draws come in mirrored
    pairs, but for the first tenth. Adam's step is taken in the family's own units and decays by a cosine, and the
    iterates of the last fifth are averaged. The trace takes the ELBO of some steps: values cost as much as gradients.
    """
    start = _copy(refinable)
    again = max(50, settings.num_steps // 10)

    def tell(elbo: Tensor) -> None:
        if report is not None:
            report(1 / (settings.num_steps + again), elbo)

    numbers = settings.num_steps, again
    mirrored = sum(_is_mirrored(step, number) for number in numbers for step in range(number))
    gradient = PathGradient(
        refinable, chunk, settings.num_particles, seed, {True: mirrored, False: sum(numbers) - mirrored}
    )
    trace = _ascend(refinable, gradient, density, settings, settings.num_steps, f"refine {name}", tell, clip=CLIP)
    finish, before = _copy(refinable), _score(refinable, density, chunk, settings, seed, name)
    _ascend(refinable, gradient, density, settings, again, f"refine further {name}", tell)
    further = _score(refinable, density, chunk, settings, seed, name)
    converged = _no_gain(before, further, settings.tolerance)
    better = _mean(further) > _mean(before)
    keep_where(~better, finish, refinable)
    best, highest = _copy(refinable), _mean(torch.where(better, further, before))
    keep_where(torch.ones_like(better), start, refinable)
    kept = _mean(_score(refinable, density, chunk, settings, seed, name)) > highest
    keep_where(~kept, best, refinable)
    return Progress(converged, kept, _thin(trace))


def _ascend(
    refinable: Refinable,
    gradient: PathGradient,
    density: Objective,
    settings: Refinement,
    num_steps: int,
    stream: str,
    tell: Callable[[Tensor], None],
    clip: float = math.inf,
) -> Tensor:
    """Take `num_steps` of Adam, end at the mean of the last fifth; returns the ELBO at some of them `(some, B)`."""
    adam, tail = Adam(refinable), max(1, num_steps // 5)
    history, average = [], [torch.zeros_like(parameter) for parameter in refinable.parameters]
    every = max(1, min(MEASURE_EVERY, num_steps // (2 * NUM_TRACE)))
    for step in range(num_steps):
        mirrored = _is_mirrored(step, num_steps)
        elbo, gradients = gradient(density.at_step(step), stream, step, measure=step % every == 0, mirrored=mirrored)
        if step % every == 0:
            assert elbo is not None
            history.append(elbo)
        tell(history[-1])
        rate = settings.learning_rate * max(1e-3, 0.5 * (1 + math.cos(math.pi * step / num_steps)))
        adam.step(gradients, rate, clip if step < CLIP_FRACTION * num_steps else math.inf)
        if step >= num_steps - tail:
            for total, parameter in zip(average, refinable.parameters, strict=True):
                total.add_(parameter.detach(), alpha=1 / tail)
    keep_where(torch.ones(len(gradient.chunk), dtype=torch.bool, device=average[0].device), average, refinable)
    return torch.stack(history)


def _is_mirrored(step: int, num_steps: int) -> bool:
    return step >= PLAIN_FRACTION * num_steps


def take_better(
    refinable: Refinable,
    other: Refinable,
    density: Objective,
    chunk: Chunk,
    settings: Refinement,
    seed: int,
    name: str,
) -> Tensor:
    """Put `refinable` at the parameters of `other` for the datapoints whose bound is higher there: `(B,)`."""
    scores = [_mean(_score(guide, density, chunk, settings, seed, name)) for guide in (refinable, other)]
    better = scores[1] > scores[0]
    keep_where(better, _copy(other), refinable)
    return better


def _copy(refinable: Refinable) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in refinable.parameters]


def _score(
    refinable: Refinable, density: Objective, chunk: Chunk, settings: Refinement, seed: int, name: str
) -> Tensor:
    """The ELBO on the selection draws, the same for all that are compared: `(rounds, B)`, -inf where not finite."""
    guide, scores = BlockedGuide(refinable, chunk, chunk.start), []
    with torch.no_grad():
        for first in range(max(2, settings.num_selection // settings.num_particles)):
            z, log_q = guide.sample(settings.num_particles, seed, f"select {name}", first)
            (log_joint,) = density.at_step(first).values(z)
            scores.append((log_joint - log_q).double().mean(0))
    scored = torch.stack(scores)
    return torch.where(torch.isfinite(scored), scored, torch.full_like(scored, -math.inf))


def _mean(scores: Tensor) -> Tensor:
    return scores.mean(0)


def _no_gain(before: Tensor, after: Tensor, tolerance: float) -> Tensor:
    """Whether `after`, `(rounds, B)`, is not above `before` by more than the tolerance and two standard errors: `(B,)`.

    Both are on the same draws, so their difference is known far better than either. What cannot be compared has not
    converged.
    """
    gain = after - before
    error = gain.std(0) / math.sqrt(len(gain))
    return gain.mean(0) <= tolerance + 2 * error  # False for NaN


def _thin(trace: Tensor) -> Tensor:
    """The mean over datapoints at `NUM_TRACE` evenly spaced stretches of the run."""
    return torch.stack([part.double().mean() for part in torch.tensor_split(trace, NUM_TRACE)])
