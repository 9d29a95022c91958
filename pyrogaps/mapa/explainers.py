r"""The datapoints that explain each datapoint of a batch in one step: the most probable, and draws from the others.

For any function f of datapoints, the weighted sum of f over them is an unbiased estimate of the sum of f over all M
datapoints in a row of the posterior.
"""

import math

import torch
from torch import Tensor

from pyrogaps.mapa.posterior import MapaPosterior

# Limits and step of the trapezoidal rule in log time. The integrand's mode lies between 0 and log(S + 1), and its width
# is at least 1 / sqrt(S + 1). It falls off at least as exp(u) to the left and as exp(u - exp(u)) to the right. It is
# smooth, so the rule's error falls exponentially with the number of steps. The total error, with that of the limits, is
# below 1e-8.
LEFT, RIGHT, MAX_STEP = -22.0, 3.5, 0.25


def explainers(
    posterior: MapaPosterior, indices: Tensor, num_top: int, num_samples: int, *, replacement: bool
) -> tuple[Tensor, Tensor]:
    r"""K = `num_top` datapoints with weight 1 and S = `num_samples` draws from the rest, for each of `indices` `(B,)`.

    The draws are from q~, the posterior without the K, renormalised. With replacement, each has the weight of
    importance sampling, 1 / (S q~(i)). Without replacement, `log_weights_without_replacement` gives the weights. Where
    fewer than S of the rest have positive probability, the surplus draws have weight 0 and repeat the most probable
    datapoint.

    Returns datapoints `(B, K + S)` and their log-weights, `(B, K + S)`, double precision, without gradients.
    """
    positions, log_weights = _selected(posterior, indices, num_top, num_samples, replacement=replacement)
    return posterior.indices[indices].long().gather(1, positions), log_weights


def explaining_mixture(
    posterior: MapaPosterior, indices: Tensor, num_top: int, num_samples: int
) -> tuple[Tensor, Tensor]:
    """The datapoints of `explainers`, drawn without replacement, and log q(i|x_n) renormalised over them.

    Both are `(B, K + S)`. Where fewer than S of the rest have positive probability, the surplus draws have q = 0.
    """
    positions, log_weights = _selected(posterior, indices, num_top, num_samples, replacement=False)
    log_q = posterior.log_q[indices].gather(1, positions).masked_fill(log_weights == -torch.inf, -torch.inf)
    return posterior.indices[indices].long().gather(1, positions), log_q.log_softmax(1)


def _selected(
    posterior: MapaPosterior, indices: Tensor, num_top: int, num_samples: int, *, replacement: bool
) -> tuple[Tensor, Tensor]:
    """Positions of the datapoints of `explainers` in their rows of the posterior, and their log-weights."""
    log_q = posterior.log_q[indices]
    top = torch.arange(num_top, device=log_q.device).expand(len(indices), -1)
    log_weights = log_q.new_zeros(len(indices), num_top)
    if not num_samples:
        return top, log_weights
    rest = log_q[:, num_top:]
    total = rest.logsumexp(1, keepdim=True)
    alive = total > -torch.inf
    rest = torch.where(alive, rest - total, torch.zeros_like(rest))
    draw = _with_replacement if replacement else _without_replacement
    positions, drawn = draw(rest, num_samples)
    drawn = torch.where(alive, drawn, torch.full_like(drawn, -torch.inf))
    positions = torch.where(drawn > -torch.inf, positions + num_top, torch.zeros_like(positions))
    return torch.cat([top, positions], 1), torch.cat([log_weights, drawn], 1)


def _with_replacement(log_q: Tensor, number: int) -> tuple[Tensor, Tensor]:
    positions = log_q.exp().multinomial(number, replacement=True)
    return positions, -math.log(number) - log_q.gather(1, positions)


def _without_replacement(log_q: Tensor, number: int) -> tuple[Tensor, Tensor]:
    keys = log_q - torch.empty_like(log_q).exponential_().log()  # Gumbel trick: the largest are the draws
    positions = keys.topk(number, 1).indices
    drawn = log_q.gather(1, positions)
    log_rest = log_q.scatter(1, positions, -torch.inf).logsumexp(1)
    return positions, log_weights_without_replacement(drawn, log_rest)


def log_weights_without_replacement(log_q: Tensor, log_rest: Tensor) -> Tensor:
    r"""Log-weights `(B, S)` of S draws without replacement.

    Murthy's estimator of $\sum_i f_i$ from a drawn set D is $\sum_{s \in D} W_s f_s$ with the weights
    $W_s = p(D | s \text{ first}) / p(D)$. It is unbiased, since $\sum_{D \ni s} p(D) W_s = \sum_{D \ni s}
    p(D | s \text{ first}) = 1$. Its variance is never larger than with replacement. It is exact where D holds all
    datapoints, and where f is proportional to q.

    Let every i arrive after an exponential time of rate q_i. Then D holds those that arrive before the first of the
    rest:

    $$p(D) = \int_0^\infty r e^{-r t} \prod_{s \in D} (1 - e^{-q_s t}) \,dt, \quad r = \sum_{i \notin D} q_i$$

    and $p(D | s \text{ first})$ is the same without the factor of s. So $W_s$ is the mean of $1 / (1 - e^{-q_s t})$,
    the weight of priority sampling, over the threshold t given D. The trapezoidal rule in u = log(r t) computes both
    integrals.

    Args:
        log_q: log-probabilities of the draws, `(B, S)`.
        log_rest: log of the sum of all other probabilities, `(B,)`.

    Source: M. N. Murthy (Sankhya 18, 1957); Kool et al. (ICLR 2020, arXiv:2002.06043); priority sampling: N.
    Duffield, C. Lund, M. Thorup (J. ACM 54, 2007, doi:10.1145/1314690.1314696).
    """
    alive = (log_q > -torch.inf) & (log_rest > -torch.inf)[:, None]
    # log(q_s t) = log(q_s / r) + u. Where there is no rest, or no draw, its value is not used.
    ratio = torch.where(alive, log_q - log_rest[:, None], torch.zeros_like(log_q))
    number = log_q.shape[1]
    step = min(MAX_STEP, 0.75 / math.sqrt(number + 1))
    u = torch.arange(LEFT, RIGHT + math.log(number + 1), step, dtype=log_q.dtype, device=log_q.device)
    factors = _log1mexp(ratio[..., None] + u)
    factors = torch.where(alive[..., None], factors, torch.zeros_like(factors))
    log_p = factors.sum(1) + u - u.exp()
    log_weights = (log_p[:, None] - factors).logsumexp(-1) - log_p.logsumexp(-1)[:, None]
    return torch.where(log_q > -torch.inf, log_weights, log_q)


def _log1mexp(log_x: Tensor) -> Tensor:
    """log(1 - exp(-x)), given log x."""
    return torch.where(log_x < -30, log_x, torch.log(-torch.expm1(-log_x.clamp(min=-30, max=30).exp())))
