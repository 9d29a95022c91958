r"""Bounds of log p(x) on both sides from independent weights of one run.

Weights with $E[w] = p(x)$ give $E[\log w] \le \log p(x) \le E[w \log w] / E[w]$, by Jensen's inequality twice. The
right side is $E_\pi[\log w]$ under the weighted law $\pi(dw) \propto w$. Independent Metropolis-Hastings that proposes
the weights one after the other (accept w' from w with probability $\min(1, w'/w)$) has $\pi$ as its stationary law.
Two such chains with lag one, $X_0 = w_0$ and $Y_0 = w_1$, share proposals and uniforms: $w_t$ is proposed to $X_{t-1}$
and $Y_{t-2}$. They meet at the first proposal that both accept, at $\tau = \min\{t : X_t = Y_{t-1}\}$, and

$$H = \log X_0 + \sum_{t=1}^{\tau-1} (\log X_t - \log Y_{t-1})$$

is unbiased for $E_\pi[\log w]$ (Jacob, O'Leary and Atchadé, 2020, arXiv:1708.03625; Middleton et al., 2019,
arXiv:1902.01781). Until they meet, X rests at $w_0$ and Y is below it, so every term is positive: to cut a run off, or
to leave out the runs that have not met, biases H downwards.

Here the weights are means of groups, which tightens both bounds, and H is replaced by its expectation over the
uniforms, given the weights. This module does not depend on Pyro.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyrogaps.log_weights import log_mean_exp, mcse_of_log_mean_exp

NUM_GROUPS = 8
NUM_GROUPINGS = 2  # with each group first in turn, 16 orderings
MAX_FRESH = 8  # times the number of weights

More = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class TwoSided:
    """Bounds of log p(x) from the same groups of K weights, `(N,)` each, in nats.

    Attributes:
        lower: mean of the groups' log-mean-exps, a lower bound in expectation, of log p(x) by about Var(w) / 2K.
        upper: estimate of an upper bound, above log p(x) by as much in expectation. It is not clipped: for a single
            datapoint it may lie below `lower`. +infinity where there is no upper bound: the chains of some ordering
            have not met within the fresh draws allowed, or some group has no weight above zero. A mean over datapoints
            is then +infinity too; these datapoints must be counted, not left out.
        upper_mcse: Monte Carlo standard error of `upper`, by a jackknife that deletes an eighth of the weights at a
            time, or that of the log-mean-exp of the weights if larger; +infinity where there is no upper bound.
        num_fresh: draws taken beside the weights.
    """

    lower: Tensor
    upper: Tensor
    upper_mcse: Tensor
    num_fresh: Tensor

    @property
    def met(self) -> Tensor:
        """Whether there is an upper bound."""
        return self.upper < math.inf

    @property
    def width(self) -> Tensor:
        """`upper - lower`. A large width is a reason for distrust. A small one proves nothing: the weights are alike if
        none has reached some part of the posterior.
        """
        return self.upper - self.lower


def two_sided(
    log_weights: Tensor, uniforms: Callable[[int], Tensor], more: More | None = None, *, max_fresh: int | None = None
) -> TwoSided:
    """Lower and upper bounds of log p(x) from independent log-weights `(S, N)`, S of at least 3.

    Orderings of the weights are fixed and alike for all datapoints: independent weights have the same law in any order.
    Where the weights end before the chains of an ordering have met, the ordering goes on with fresh weights.

    Args:
        uniforms: `uniforms(number)` gives U(0, 1) numbers `(number, N)`, such as `Noise.uniform` of a stream.
        more: `more(positions, number)` gives fresh independent log-weights `(number, M)` of the same estimator for the
            datapoints at `positions` `(M,)`. It is called with the same sequence of numbers whichever datapoints need
            them, so that a stream for each call and block makes the result independent of the chunks. None: none.
        max_fresh: draws of `more` for a datapoint, at most; None is `8 S`.
    """
    number = len(log_weights)
    groups = _group_means(log_weights.double())
    whole = groups[:, 0]
    known = (groups > -math.inf).all(0).flatten(0, -2).all(0)
    groups = torch.where(known, groups, 0.0)
    # Each group is first in turn, and the others follow in a circle: (groups, replicates, orderings, N).
    ordered = torch.cat([groups.roll(-shift, 0) for shift in range(len(groups))], 2)
    value, unmet = _expected(ordered)
    tail = _extrapolated(ordered, unmet)
    replicates = (value + tail)[1:].mean(1)
    variance = replicates.var(0, correction=0) * (len(replicates) - 1)

    limit = MAX_FRESH * number if max_fresh is None else max_fresh
    chains = _Chains(ordered[:, 0], unmet[:, 0], uniforms(1)[0], known)
    chains.go_on(uniforms, more, number // len(groups), limit)
    upper = (value[0] + chains.sum).mean(0)
    variance = variance + (chains.sum - tail[0]).mean(0).square()
    absent = ~known | chains.alive.any(0)
    # Eight replicates say little of a skewed estimate. It is hardly known better than the mean of the same weights.
    error = variance.sqrt().maximum(mcse_of_log_mean_exp(log_weights))
    upper, error = (torch.where(absent, math.inf, part) for part in (upper, error))
    return TwoSided(whole.mean((0, 1)), upper, error, chains.num_fresh)


def _group_means(log_weights: Tensor) -> Tensor:
    """Log means of groups, `(groups, 1 + replicates, groupings, N)`: of all weights, then without an eighth of them.

    The groups of a replicate are as many, and smaller.
    """
    number = len(log_weights)
    replicates = min(NUM_GROUPS, number)
    num_groups = min(NUM_GROUPS, number - -(-number // replicates))
    averages = torch.zeros(num_groups, 1 + replicates, NUM_GROUPINGS, number, dtype=torch.float64)
    generator = np.random.default_rng(0)
    for grouping in range(NUM_GROUPINGS):
        order = torch.from_numpy(generator.permutation(number))
        for replicate in range(1 + replicates):
            kept = order if replicate == 0 else order[order * replicates // number != replicate - 1]
            size = len(kept) // num_groups
            for group, members in enumerate(kept[: size * num_groups].split(size)):
                averages[group, replicate, grouping, members] = 1 / size
    largest = log_weights.max(0).values.clamp(min=-1e300)  # finite, also of zero weights alone
    weights = (log_weights - largest).exp()
    means = averages.flatten(0, 2).to(weights.device) @ weights
    return (means.log() + largest).view(*averages.shape[:3], -1)


def _expected(h: Tensor) -> tuple[Tensor, Tensor]:
    """Expectation of H over the uniforms, up to the last group: `(*)` from `h` `(groups, *)`, log-weights in order.

    Also the probability that the chains have not met by then and Y is at group j, `(groups - 1, *)` for j = 1, 2, ...
    """
    first, number = h[0], len(h)
    reject = -torch.expm1((h - first).clamp(max=0.0))  # probability that X stays
    at = reject[1:2].clone()
    value = first + at[0] * (first - h[1])
    for t in range(2, number):
        # X and Y have the same uniform, and Y accepts whatever X does.
        stays = -torch.expm1((h[t] - h[1:t]).clamp(max=0.0))
        moves = (at * (reject[t] - stays).clamp(min=0.0)).sum(0, keepdim=True)
        at = torch.cat([at * stays, moves])
        value = value + (at * (first - h[1 : t + 1])).sum(0)
    return value, at


def _extrapolated(h: Tensor, unmet: Tensor) -> Tensor:
    """What the terms after the last group add in expectation, if X goes on to accept as often as in the groups.

    Only the standard error uses it. The rate has half an acceptance added, and so is never zero.
    """
    accept = ((h[1:] - h[0]).clamp(max=0.0).exp().sum(0) + 0.5) / (len(h) - 0.5)
    return (unmet * (h[0] - h[1:])).sum(0) * (1 - accept) / accept


class _Chains:
    """The chains of all orderings after the last group, `(orderings, N)`: `sum` of the terms, `alive` if not met.

    One uniform for each datapoint decides for all its orderings, so that few datapoints need fresh weights. Each
    ordering takes the fresh weights in their order and stops by what it has met so far, which keeps it unbiased.
    """

    def __init__(self, h: Tensor, unmet: Tensor, uniform: Tensor, known: Tensor) -> None:
        cumulative = unmet.cumsum(0)
        uniform = uniform.to(cumulative)
        self.alive = (uniform < cumulative[-1]) & known
        place = (cumulative <= uniform).sum(0).clamp(max=len(unmet) - 1)
        self.first, self._second = h[0], h[1:].gather(0, place[None])[0]
        self.sum = torch.zeros_like(self.first)
        self.num_fresh = torch.zeros(h.shape[-1], dtype=torch.long, device=h.device)

    def go_on(self, uniforms: Callable[[int], Tensor], more: More | None, size: int, limit: int) -> None:
        """Propose means of `size` fresh weights until all have met, or `limit` draws are taken."""
        taken, steps = 0, 1
        while more is not None and len(positions := self.alive.any(0).nonzero()[:, 0]):
            steps = min(steps, (limit - taken) // size)
            if steps < 1:
                break
            fresh = more(positions, steps * size).to(self.sum).unflatten(0, (steps, size))
            numbers = uniforms(steps).to(self.sum)[:, positions]
            for proposal, uniform in zip(log_mean_exp(fresh.transpose(0, 1)), numbers, strict=True):
                self._propose(positions, proposal, uniform.log())
            taken, steps = taken + steps * size, taken // size + steps
            self.num_fresh[positions] = taken

    def _propose(self, positions: Tensor, proposal: Tensor, log_uniform: Tensor) -> None:
        first, second, alive = self.first[:, positions], self._second[:, positions], self.alive[:, positions]
        # A weight of zero is no proposal: its logarithm would be the state of neither chain.
        alive_after = alive & ((log_uniform >= proposal - first) | (proposal == -math.inf))
        second = torch.where(log_uniform < proposal - second, proposal, second)
        self._second[:, positions], self.alive[:, positions] = second, alive_after
        counts = alive_after & (proposal > -math.inf)
        self.sum[:, positions] += torch.where(counts, first - second, 0.0)
