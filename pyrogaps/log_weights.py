"""Log-weight arithmetic: means, log-mean-exps, their Monte Carlo errors and diagnostics.

All results are in double precision, with draws along the first axis. This module does not depend on Pyro.
"""

import math
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from arviz_stats.base import array_stats  # type: ignore[attr-defined]
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor

from pyrogaps.errors import counted

# Limits of `Estimate.reliable`: largest standard error and k-hat, fewest draws of the estimate and of k-hat.
MAX_MCSE, MAX_KHAT = 0.1, 0.5
MIN_DRAWS, MIN_KHAT_DRAWS = 16, 100


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
    r"""Standard error of `log_mean_exp` by the delta method, $\sqrt{\mathrm{Var}(w)/S} / \bar w$, `(S, *)` to `(*)`."""
    weights = normalised(log_weights) * len(log_weights)
    return mcse_of_mean(weights)


def pareto_khat(log_weights: Tensor) -> Tensor:
    """Pareto k-hat of importance log-weights `(S, N)`, one per column; above 0.7 the estimate is unreliable.

    Vehtari et al. (2024), Pareto smoothed importance sampling, arXiv:1507.02646, as ArviZ computes it. NaN if the tail
    is constant or there are fewer than 25 weights.
    """
    columns = log_weights.double().cpu().numpy().T
    result = np.full(len(columns), np.nan)
    if columns.shape[1] >= 25:
        for n, column in enumerate(columns):
            if np.isfinite(column).all() and np.ptp(column) > 1e-9:
                # ArviZ raises ValueError if the tail has too few distinct values.
                with suppress(ValueError), np.errstate(all="ignore"):
                    result[n] = float(array_stats.psislw(column.max() - column, r_eff=1.0)[1])  # type: ignore[no-untyped-call]
    return torch.from_numpy(result)


def hall_interval(log_weights: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    r"""Central confidence interval for the log of the expected weight, from `log_weights` `(S, *)`; ends `(*)` in nats.

    Weights are skewed, and so is Student's t of their mean. Hall's cubic removes the skewness to first order:

    $$g(T) = T + \frac{\gamma}{6\sqrt S}(2T^2 + 1) + \frac{\gamma^2}{27 S}T^3$$

    with $\gamma$ the sample skewness. g(T) is close to t-distributed (S - 1 degrees of freedom) and its inverse has a
    closed form. The lower end is -infinity if the draws do not bound the mean away from zero. Hall (1992),
    doi:10.1111/j.2517-6161.1992.tb01872.x.
    """
    number = len(log_weights)
    ratio = normalised(log_weights) * number
    deviation = ratio.std(0)
    spread = deviation.clamp(min=1e-300)
    cubes = ((ratio - 1) / spread).pow(3).sum(0)
    skew = cubes * number / ((number - 1) * (number - 2)) if number > 2 else torch.zeros_like(deviation)
    quantile, root = float(stats.t.ppf(0.5 + probability / 2, max(number - 1, 1))), math.sqrt(number)

    def end(t: float) -> Tensor:
        """Log ratio of the mean at which g(T) = t to the sample mean."""
        third = torch.where(skew.abs() < 1e-4, 1e-4, skew) / 3
        cubic = 1 + third * 3 * (t / root - third / (2 * number))
        inverse = root * (cubic.sign() * cubic.abs().pow(1 / 3) - 1) / third
        return torch.log((1 - inverse * deviation / root).clamp(min=0.0))

    value = log_mean_exp(log_weights)
    return value + end(quantile), value + end(-quantile)


@dataclass(frozen=True, repr=False)
class Estimate:
    """A per-datapoint estimate in nats with its diagnostics; tensors have shape `(N,)`, `log_weights` `(S, N)`.

    `direction` is what the value is in expectation: "lower bound", "upper bound" or "estimate". `ess` and `khat`
    describe the weights if the value is their log-mean-exp; a mean of log-weights has neither.
    """

    value: Tensor
    mcse: Tensor
    direction: str
    log_weights: Tensor | None = None
    ess: Tensor | None = None
    khat: Tensor | None = None
    acceptance: Tensor | None = None

    def __repr__(self) -> str:
        number = len(self.value)
        error, noise = (
            float(self.value.std(correction=min(1, number - 1))) / math.sqrt(number),
            self.mcse.norm() / number,
        )
        return (
            f"{type(self).__name__}({counted(number, 'datapoint')}: mean {float(self.value.mean()):.3f}"
            f"{f' ± {error:.3f}' if number > 1 and math.isfinite(error) else ''} nats"
            f"{f', Monte Carlo error {noise:.3f}' if math.isfinite(noise) else ''}; {self.direction}; "
            f"{int(self.reliable.sum())} reliable)"
        )

    def interval(self, probability: float = 0.95) -> tuple[Tensor, Tensor]:
        """A central confidence interval, `(N,)` each; NaN without `log_weights`.

        Student's t for a mean, `hall_interval` for a log-mean-exp. Its coverage is checked where `reliable` is True.
        """
        if self.log_weights is None:
            unknown = torch.full_like(self.value, math.nan)
            return unknown, unknown
        if self.ess is not None:
            return hall_interval(self.log_weights, probability)
        half = self.mcse * float(stats.t.ppf(0.5 + probability / 2, max(len(self.log_weights) - 1, 1)))
        return self.value - half, self.value + half

    @property
    def reliable(self) -> Tensor:
        """Whether the coverage of `interval` is about nominal (93% to 97% for 95%), `(N,)`.

        A mean is reliable if it is finite. A log-mean-exp is reliable under three conditions. There are at least 16
        draws. The relative standard error of the mean weight is at most 0.1, so that the logarithm is nearly linear
        over the interval (its bias, half the square, is at most a twentieth of the error). And k-hat is at most 0.5, so
        that the weights have a finite variance; with fewer than 100 draws k-hat is too noisy and is ignored. These
        checks cannot detect a mode that no draw has reached; BDMC can.
        """
        finite = torch.isfinite(self.value) & torch.isfinite(self.mcse)
        if self.log_weights is None or len(self.log_weights) < 2:
            return torch.zeros_like(finite)
        if self.ess is None:
            return finite
        reliable = finite & (self.mcse <= MAX_MCSE) & (len(self.log_weights) >= MIN_DRAWS)
        if self.khat is None or len(self.log_weights) < MIN_KHAT_DRAWS:
            return reliable
        return reliable & ~(self.khat > MAX_KHAT).to(reliable.device)


def mean_estimate(log_weights: Tensor) -> Estimate:
    """The ELBO of log-weights `(S, N)`: their mean, a lower bound of log p(x) in expectation."""
    return Estimate(log_weights.double().mean(0), mcse_of_mean(log_weights), "lower bound", log_weights)


def log_mean_exp_estimate(log_weights: Tensor, *, acceptance: Tensor | None = None) -> Estimate:
    """Estimate of log p(x) from unbiased weights, `(S, N)` in logs: a lower bound in expectation, consistent in S."""
    return Estimate(
        log_mean_exp(log_weights),
        mcse_of_log_mean_exp(log_weights),
        "lower bound",
        log_weights,
        effective_sample_size(log_weights),
        pareto_khat(log_weights),
        acceptance,
    )
