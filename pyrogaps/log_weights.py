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

# `Estimate.reliable` asks for no more than these, and for no fewer draws.
RELIABLE_MCSE = 0.1
RELIABLE_DRAWS = 16
RELIABLE_KHAT, RELIABLE_KHAT_DRAWS = 0.5, 100


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
    """Pareto k-hat of importance log-weights `(S, N)`, one per column: above 0.7 the estimate is not to be trusted.

    Vehtari et al. (2024), Pareto smoothed importance sampling, arXiv:1507.02646, as ArviZ computes it. NaN where the
    weights do not vary in their tail or there are fewer than 25 of them.
    """
    columns = log_weights.double().cpu().numpy().T
    result = np.full(len(columns), np.nan)
    if columns.shape[1] >= 25:
        for n, column in enumerate(columns):
            if np.isfinite(column).all() and np.ptp(column) > 1e-9:
                # The tail may be one value, or a few of them.
                with suppress(ValueError), np.errstate(all="ignore"):
                    result[n] = float(array_stats.psislw(column.max() - column, r_eff=1.0)[1])  # type: ignore[no-untyped-call]
    return torch.from_numpy(result)


def hall_interval(log_weights: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    r"""A central interval for the log of the weights' expectation from `log_weights` `(S, *)`: its ends `(*)`, in nats.

    Weights are skewed, so Student's t of their mean is too: Hall's cubic removes that to first order,

    $$g(T) = T + \frac{\gamma}{6\sqrt S}(2T^2 + 1) + \frac{\gamma^2}{27 S}T^3$$

    with $\gamma$ the sample skewness, is close to t-distributed (S - 1 degrees of freedom) and has an inverse in closed
    form. The lower end is -infinity where the draws do not bound the mean away from zero. Hall (1992),
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
        """The log of the mean at which g(T) = t, over the sample mean."""
        third = torch.where(skew.abs() < 1e-4, 1e-4, skew) / 3
        cubic = 1 + third * 3 * (t / root - third / (2 * number))
        inverse = root * (cubic.sign() * cubic.abs().pow(1 / 3) - 1) / third
        return torch.log((1 - inverse * deviation / root).clamp(min=0.0))

    value = log_mean_exp(log_weights)
    return value + end(quantile), value + end(-quantile)


@dataclass(frozen=True)
class Estimate:
    """A per-datapoint estimate in nats and what it rests on; every tensor has shape `(N,)` but `log_weights` `(S, N)`.

    `direction` says what the value is in expectation: "lower bound", "upper bound" or "estimate". `ess` and `khat` are
    of the weights whose log-mean-exp the value is; a mean of log-weights has neither.
    """

    value: Tensor
    mcse: Tensor
    direction: str
    log_weights: Tensor | None = None
    ess: Tensor | None = None
    khat: Tensor | None = None
    acceptance: Tensor | None = None

    def interval(self, probability: float = 0.95) -> tuple[Tensor, Tensor]:
        """A central confidence interval, `(N,)` each; NaN without `log_weights`.

        Of a mean by Student's t, of a log-mean-exp by `hall_interval`; see `reliable` for when to believe it.
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
        """Whether `interval` covers about as it says (93 to 97 of 100 for 95), `(N,)`.

        For a mean, wherever it is finite. For a log-mean-exp, where there are at least 16 draws, the relative standard
        error of the mean weight is at most 0.1, so that the logarithm is as good as straight over the interval (its
        bias, half the square, is at most a twentieth of the error), and k-hat is at most 0.5, so that the weights
        have a variance; of fewer than 100 draws k-hat is too noisy to be heeded. Draws cannot tell of a mode
        that none of them has hit: BDMC can.
        """
        finite = torch.isfinite(self.value) & torch.isfinite(self.mcse)
        if self.log_weights is None or len(self.log_weights) < 2:
            return torch.zeros_like(finite)
        if self.ess is None:
            return finite
        gate = finite & (self.mcse <= RELIABLE_MCSE) & (len(self.log_weights) >= RELIABLE_DRAWS)
        if self.khat is None or len(self.log_weights) < RELIABLE_KHAT_DRAWS:
            return gate
        return gate & ~(self.khat > RELIABLE_KHAT).to(gate.device)


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
