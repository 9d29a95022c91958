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

# A share of the largest weight below which a draw does not count in their mean.
NEGLIGIBLE = 1e-13
# Limits of `Estimate.reliable` where something vouches for the weights: standard error, k-hat, draws of each.
MAX_MCSE, MAX_KHAT = 0.2, 0.5
MIN_DRAWS, MIN_KHAT_DRAWS = 16, 100
# Where nothing but the weights does, and they decide by a pilot or their first half. Measured, see
# tests/test_reliable.py: of a proposal half as wide as the target in one dimension less than 0.5% of cases pass.
MAX_MCSE_ALONE, MAX_KHAT_ALONE, KHAT_ALLOWANCE, MIN_DRAWS_ALONE = 0.02, 0.25, 30, 500
MAX_WIDTH = 0.5  # between the two bounds, nats


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


def skewed_interval(log_weights: Tensor, probability: float, khat: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""`hall_interval` with an upper end that allows for the weights beyond the largest, $w_{\max}$.

    $$\text{upper end} + \log\Bigl(1 + \frac{w_{\max} / \bar w - 1}{(S + 1)(1 - k)}\Bigr)$$

    It is the mass that a Pareto tail of shape k has beyond its largest draw; k is `khat` within 0 and 0.8, or 0. Where
    the tail is light this is little.
    """
    low, high = hall_interval(log_weights, probability)
    number = len(log_weights)
    excess = (normalised(log_weights).amax(0) * number - 1).clamp(min=0.0)
    shape = 0.0 if khat is None else khat.to(excess).nan_to_num(0.0).clamp(0.0, 0.8)
    return low, high + torch.log1p(excess / ((number + 1) * (1 - shape)))


def trusted_by_pilot(pilot: Tensor, number: int) -> Tensor:
    """Whether `number` draws can be trusted by the log-weights `(S, N)` of a pilot alone, S of 250 at least: `(N,)`.

    The pilot's k-hat is at most 0.25 + 30 / S, because that of few draws is known less well, and the standard error
    that it predicts for `number` draws at most 0.02 nats. The interval must be of other draws: a pilot that has missed
    the tail of the weights passes more often.
    """
    passed = (mcse_of_log_mean_exp(pilot) * math.sqrt(len(pilot) / number) <= MAX_MCSE_ALONE).cpu()
    heavy = pareto_khat(pilot[:, passed.to(pilot.device)]) > MAX_KHAT_ALONE + KHAT_ALLOWANCE / len(pilot)
    passed[passed.clone()] = ~heavy
    return passed.to(pilot.device)


def that_count(log_weights: Tensor) -> Tensor:
    """Log-weights `(S, N)`, -infinity where a weight is less than `NEGLIGIBLE` of the largest: its rounding, like
    itself, does not reach the mean of the weights.
    """
    return log_weights.where(log_weights >= log_weights.amax(0) + math.log(NEGLIGIBLE), -math.inf)


def rounding_error(*terms: Tensor) -> Tensor:
    """Rounding of a sum of terms, `(S, N)` each, by the precision they are in: machine epsilon times size, `(N,)`."""
    sizes = [torch.where(term.isfinite(), term, 0.0).abs().amax(0).double() for term in terms]
    return torch.stack([size * torch.finfo(term.dtype).eps for size, term in zip(sizes, terms, strict=True)]).sum(0)


@dataclass(frozen=True, repr=False)
class Estimate:
    """A per-datapoint estimate in nats with its diagnostics; tensors have shape `(N,)`, `log_weights` `(S, N)`.

    `direction` is what the value is in expectation: "exact", "lower bound", "upper bound" or "estimate". `ess` and
    `khat` describe the weights if the value is their log-mean-exp; a mean of log-weights has neither.

    `vouched` is True where something other than these weights says that their tail is light: a pilot of other draws, or
    the covariance of the proposal against the measured curvature in every direction. `upper` is an upper bound of the
    same quantity, +infinity where there is none. `doubted` is True where other starts say that modes may be missed, and
    False where they do not or nobody looked. `rounding` is the rounding error of a log-weight in nats; neither
    `mcse` nor the interval is below it. `declared` is where its evidence calls it reliable; None where weights decide.
    """

    value: Tensor
    mcse: Tensor
    direction: str
    log_weights: Tensor | None = None
    ess: Tensor | None = None
    khat: Tensor | None = None
    acceptance: Tensor | None = None
    vouched: Tensor | None = None
    upper: Tensor | None = None
    rounding: Tensor | None = None
    doubted: Tensor | None = None
    declared: Tensor | None = None

    def __repr__(self) -> str:
        number = len(self.value)
        error, noise = (
            float(self.value.std(correction=min(1, number - 1))) / math.sqrt(number),
            self.mcse.norm() / number,
        )
        reliable = f"{int(self.reliable.sum())} reliable" if self.examined else "reliability not examined"
        return (
            f"{type(self).__name__}({counted(number, 'datapoint')}: mean {float(self.value.mean()):.3f}"
            f"{f' ± {error:.3f}' if number > 1 and math.isfinite(error) else ''} nats"
            f"{f', Monte Carlo error {noise:.3f}' if math.isfinite(noise) else ''}; {self.direction}; "
            f"{reliable})"
        )

    def interval(self, probability: float = 0.95) -> tuple[Tensor, Tensor]:
        """A central confidence interval, `(N,)` each; NaN without `log_weights`, but for an exact value.

        Student's t for a mean, `skewed_interval` for a log-mean-exp, and the rounding error on both sides. From 500
        draws on, where nothing vouches for them, it also spans the interval of the second half of the draws, because
        `reliable` is then decided by the first. Its coverage is checked where `reliable` is True.
        """
        if self.direction.startswith("exact"):
            return self.value - self.mcse, self.value + self.mcse
        if self.log_weights is None:
            unknown = torch.full_like(self.value, math.nan)
            return unknown, unknown
        if self.ess is None:
            error = self.mcse * float(stats.t.ppf(0.5 + probability / 2, max(len(self.log_weights) - 1, 1)))
            low, high = self.value - error, self.value + error
        else:
            low, high = skewed_interval(self.log_weights, probability, self.khat)
            if len(self.log_weights) >= MIN_DRAWS_ALONE:
                half = self.log_weights[len(self.log_weights) // 2 :]
                second = skewed_interval(half, probability, self.khat)
                low = torch.where(self._vouched, low, low.minimum(second[0]))
                high = torch.where(self._vouched, high, high.maximum(second[1]))
        slack = torch.zeros_like(low) if self.rounding is None else self.rounding.to(low.device)
        return low - slack, high + slack

    @property
    def reliable(self) -> Tensor:
        """Whether `interval` covers as often as it says, a 95% interval in at least 93% of cases, `(N,)`.

        A mean is reliable if it is finite. A log-mean-exp that is `vouched` is reliable with 16 draws or more and a
        relative standard error of the mean weight of at most 0.2, so that the logarithm is nearly linear over the
        interval. From 100 draws on k-hat must be at most 0.5, so that the weights have a finite variance.

        Otherwise the weights alone decide. That takes 500 draws or more, of which the first half must pass
        `trusted_by_pilot`. Fewer draws of heavy weights look lighter than they are: the weights of a proposal half as
        wide as the target pass the limits above in most cases, and their intervals cover in 80%.

        Where `upper` is more than half a nat above the value, or infinite, the estimate is not reliable. These checks
        cannot detect a mode that no draw has reached; only other starts can. An exact value is reliable if it is
        finite. It is False everywhere where `examined` is.
        """
        reliable = torch.isfinite(self.value) & torch.isfinite(self.mcse)
        if not self.examined:
            return torch.zeros_like(reliable)
        if self.declared is not None:
            reliable = reliable & self.declared.to(reliable.device)
        elif self.ess is not None:
            reliable = reliable & torch.where(self._vouched, self._passes, self._passes_alone)
        if self.upper is not None:
            reliable = reliable & (self.upper.to(reliable.device) - self.value <= MAX_WIDTH)
        return reliable if self.doubted is None else reliable & ~self.doubted.to(reliable.device)

    @property
    def examined(self) -> bool:
        """Whether there is enough to decide on `reliable`: the word of the evidence, or weights that can be judged.

        Fewer than 500 weights for which nothing vouches cannot.
        """
        if self.declared is not None:
            return True
        if self.log_weights is None or len(self.log_weights) < 2:
            return False
        return self.ess is None or self.vouched is not None or len(self.log_weights) >= MIN_DRAWS_ALONE

    @property
    def _vouched(self) -> Tensor:
        nothing = torch.zeros_like(self.value, dtype=torch.bool)
        return nothing if self.vouched is None else self.vouched.to(nothing)

    @property
    def _passes(self) -> Tensor:
        assert self.log_weights is not None
        passes = (self.mcse <= MAX_MCSE) & (len(self.log_weights) >= MIN_DRAWS)
        if self.khat is None or len(self.log_weights) < MIN_KHAT_DRAWS:
            return passes
        return passes & ~(self.khat > MAX_KHAT).to(passes.device)

    @property
    def _passes_alone(self) -> Tensor:
        assert self.log_weights is not None
        number, nothing = len(self.log_weights), torch.zeros_like(self._vouched)
        if number < MIN_DRAWS_ALONE or self._vouched.all():
            return nothing
        return trusted_by_pilot(self.log_weights[: number // 2], number)


def mean_estimate(log_weights: Tensor, *, rounding: Tensor | None = None) -> Estimate:
    """The ELBO of log-weights `(S, N)`: their mean, a lower bound of log p(x) in expectation."""
    rounding = _rounding(log_weights, rounding)
    mcse = mcse_of_mean(log_weights).maximum(rounding)
    return Estimate(log_weights.double().mean(0), mcse, "lower bound", log_weights, rounding=rounding)


def log_mean_exp_estimate(
    log_weights: Tensor,
    *,
    acceptance: Tensor | None = None,
    vouched: Tensor | None = None,
    upper: Tensor | None = None,
    rounding: Tensor | None = None,
) -> Estimate:
    """Estimate of log p(x) from unbiased weights, `(S, N)` in logs: a lower bound in expectation, consistent in S.

    `rounding` is `rounding_error` of the terms that log-weights are differences of; by default it is that of the
    log-weights, which is too small where large terms cancel.
    """
    rounding = _rounding(that_count(log_weights), rounding)
    return Estimate(
        log_mean_exp(log_weights),
        mcse_of_log_mean_exp(log_weights).maximum(rounding),
        "lower bound",
        log_weights,
        effective_sample_size(log_weights),
        pareto_khat(log_weights),
        acceptance,
        vouched,
        upper,
        rounding,
    )


def _rounding(log_weights: Tensor, rounding: Tensor | None) -> Tensor:
    least = rounding_error(log_weights)
    return least if rounding is None else least.maximum(rounding.to(least))
