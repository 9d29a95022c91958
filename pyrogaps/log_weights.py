"""Log-weight arithmetic: means, log-mean-exps, their Monte Carlo errors and the diagnostics that gate them.

Everything is computed in double precision, with draws along the first axis. Nothing here knows Pyro.
"""

import math
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from arviz_stats.base import array_stats  # type: ignore[attr-defined]
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor

KHAT_TRUSTED = 0.7
RELATIVE_VARIANCE_TRUSTED = 0.1


def log_mean_exp(log_weights: Tensor) -> Tensor:
    r"""$\log \frac1S \sum_s e^{w_s}$ over the first axis, `(S, *)` to `(*)`, in nats."""
    return torch.logsumexp(log_weights.double(), 0) - math.log(len(log_weights))


def normalised(log_weights: Tensor) -> Tensor:
    """Weights `(S, *)` scaled to sum to one over the first axis."""
    return torch.softmax(log_weights.double(), 0)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    r"""Kish's $(\sum_s w_s)^2 / \sum_s w_s^2$, between 1 and S, `(S, *)` to `(*)`."""
    return 1.0 / normalised(log_weights).square().sum(0)


def mcse_of_mean(draws: Tensor) -> Tensor:
    r"""Standard error of the mean of independent draws, $\sqrt{\mathrm{Var}_s / S}$, `(S, *)` to `(*)`."""
    return draws.double().std(0) / math.sqrt(len(draws)) if len(draws) > 1 else torch.full(draws.shape[1:], math.nan)


def mcse_of_log_mean_exp(log_weights: Tensor) -> Tensor:
    r"""Standard error of `log_mean_exp` by the delta method, $\sqrt{\mathrm{Var}(w)/S} \,/\, \bar w$, `(S, *)` to `(*)`."""
    weights = normalised(log_weights) * len(log_weights)
    return mcse_of_mean(weights)


def pareto_khat(log_weights: Tensor) -> Tensor:
    """Pareto k-hat of importance log-weights `(S, N)`, one per column: above 0.7 the estimate is not to be trusted.

    Vehtari et al. (2024), Pareto smoothed importance sampling, arXiv:1507.02646, as ArviZ computes it. NaN where the
    weights do not vary in their tail or there are fewer than 25 of them.
    """
    columns = log_weights.double().cpu().numpy().T
    result = np.full(len(columns), np.nan)
    if columns.shape[1] >= 25:
        for n, column in enumerate(columns):
            if np.isfinite(column).all() and np.ptp(column) > 1e-9:
                with suppress(ValueError):  # all of the tail is one value
                    result[n] = float(array_stats.psislw(column.max() - column, r_eff=1.0)[1])
    return torch.from_numpy(result)


@dataclass(frozen=True)
class Estimate:
    """A per-datapoint estimate in nats and what it rests on; every tensor has shape `(N,)` but `log_weights` `(S, N)`.

    `direction` says what the value is in expectation: "lower bound", "upper bound" or "estimate".
    """

    value: Tensor
    mcse: Tensor
    direction: str
    log_weights: Tensor | None = None
    ess: Tensor | None = None
    khat: Tensor | None = None
    acceptance: Tensor | None = None

    def interval(self, probability: float = 0.95) -> tuple[Tensor, Tensor]:
        """A central t interval of the given probability, `(N,)` each; see `reliable` for when to believe it."""
        draws = len(self.log_weights) if self.log_weights is not None else 10**6
        half = self.mcse * float(stats.t.ppf(0.5 + probability / 2, max(draws - 1, 1)))
        return self.value - half, self.value + half

    @property
    def reliable(self) -> Tensor:
        """Whether `interval` covers as it says, `(N,)`.

        Always for means. For a log-mean-exp the gate is on the variance of the weights: the relative variance of their
        mean, (1/ESS - 1/S), below 0.1 / S x 10, that is ESS above half of S; and k-hat, where known, below 0.7.
        """
        if self.ess is None or self.log_weights is None:
            return torch.isfinite(self.value)
        gate = self.ess > len(self.log_weights) / (1 + RELATIVE_VARIANCE_TRUSTED * 10)
        if self.khat is not None:
            gate &= ~(self.khat > KHAT_TRUSTED)
        return gate


def mean_estimate(log_weights: Tensor) -> Estimate:
    """The ELBO of log-weights `(S, N)`: their mean, a lower bound of log p(x) in expectation."""
    return Estimate(log_weights.double().mean(0), mcse_of_mean(log_weights), "lower bound", log_weights)


def log_mean_exp_estimate(log_weights: Tensor, *, acceptance: Tensor | None = None) -> Estimate:
    """log p(x) of unbiased log-weights `(S, N)`: a lower bound in expectation, consistent as S grows."""
    return Estimate(
        log_mean_exp(log_weights),
        mcse_of_log_mean_exp(log_weights),
        "lower bound",
        log_weights,
        effective_sample_size(log_weights),
        pareto_khat(log_weights),
        acceptance,
    )
