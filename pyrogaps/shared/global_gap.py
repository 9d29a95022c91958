r"""The global gap, between two bounds.

$$KL(q(\theta) \| p(\theta|x)) = \log p(x) - A, \quad
  A = E_{q(\theta)}\Bigl[\log \frac{p(\theta)}{q(\theta)} + \sum_n \log p(x_n|\theta)\Bigr]$$

A is a mean over draws of theta, with lower and upper estimates of log p(x_n | theta) (`Marginals`). log p(x) of the
data set comes from the ladder on the space of theta and all local latents, where that is small; else from the weights
$W_m = p(\theta_m) / q(\theta_m) \prod_n \hat p_n(\theta_m)$ of the same draws, whose mean is unbiased for p(x): their
log-mean-exp from below, coupled chains from above. Draws that have missed the tail of the weights look best. So bounds
by weights that pass are measured again, by as many fresh draws, and these must pass too. A noisy log-phat never stands
in for an upper estimate: it is below log p(x_n | theta) in expectation, so that it would make up a gap where there is
none.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from pyrogaps.density.hierarchy import Hierarchy
from pyrogaps.gaussians import MAX_DIM
from pyrogaps.log_weights import log_mean_exp, log_mean_exp_estimate, mcse_of_mean
from pyrogaps.problem import Problem
from pyrogaps.run import Run
from pyrogaps.shared.marginals import Marginals, Values
from pyrogaps.shared.settings import Shared
from pyrogaps.shared.whole import WholeEvidence
from pyrogaps.two_sided import two_sided

FIRST_DRAWS, DRAWS_AT_ONCE, PILOT_DRAWS = 128, 64, 8
# Shares of the tolerance: of the variance that a finite number of local weights adds, and of the standard errors.
NOISE_SHARE, ERROR_SHARE = 0.05, 0.4
NUM_DELETED = 16  # groups of a jackknife
LADDER, WEIGHTS = "ladder on all latents", "importance weights of the guide's draws"


@dataclass(frozen=True)
class GlobalGap:
    """KL(q(theta) || p(theta | x)) of a data set, nats.

    Attributes:
        lower, upper: estimates of a lower and an upper bound, with standard errors `lower_mcse`, `upper_mcse`.
        bounded: whether the upper bound can be relied on, and the two lie within the tolerance. Else the gap is "at
            least `lower`".
        num_draws: of theta.
        method: how log p(x) of the data set was measured.
        log_evidence, log_evidence_upper, log_evidence_mcse: log p(x) of the data set from below and above, and the
            larger of their standard errors.
        marginal_elbo: A, from below, with standard error `marginal_elbo_mcse`; the ELBO of the data set is less by the
            local gaps.
    """

    lower: float
    lower_mcse: float
    upper: float
    upper_mcse: float
    bounded: bool
    num_draws: int
    method: str
    log_evidence: float
    log_evidence_upper: float
    log_evidence_mcse: float
    marginal_elbo: float
    marginal_elbo_mcse: float

    @property
    def value(self) -> float:
        """The middle of the bounds, or the lower one where the gap is not bounded from above; 0 where there is none."""
        if self.bounded:
            return 0.5 * (self.lower + self.upper)
        return self.lower if math.isfinite(self.lower) else 0.0

    @property
    def mcse(self) -> float:
        """The standard error of `value`, half of the distance of the bounds included."""
        if not self.bounded:
            return self.lower_mcse if math.isfinite(self.lower) else 0.0
        return math.hypot(max(self.lower_mcse, self.upper_mcse), 0.5 * max(self.upper - self.lower, 0.0))


@dataclass(frozen=True)
class _Sums:
    """log p(theta) - log q(theta) + log p(x | theta) from below and above, `(D,)` each, of all draws so far."""

    low: Tensor
    high: Tensor

    @property
    def mean(self) -> tuple[float, float]:
        """A from below, and its standard error."""
        return float(self.low.mean()), float(mcse_of_mean(self.low))

    def joined(self, other: "_Sums") -> "_Sums":
        return _Sums(torch.cat([self.low, other.low]), torch.cat([self.high, other.high]))

    def without(self, group: int) -> "_Sums":
        """Without one of `NUM_DELETED` groups of draws."""
        kept = torch.arange(len(self.low)) % NUM_DELETED != group
        return _Sums(self.low[kept], self.high[kept])


def global_gap(
    hierarchy: Hierarchy, local: Problem, values: list[Values], whole: WholeEvidence | None, settings: Shared, run: Run
) -> GlobalGap | None:
    """The global gap of a hierarchy.

    `local` is the problem of the datapoints given the first of `values`, at which a pilot sets the number of weights.
    Returns None where the local latents are too many for Gaussians at every draw.
    """
    if local.dim > MAX_DIM:
        return None
    marginals = Marginals.of(hierarchy, local, values[0], run).piloted(values, NOISE_SHARE * settings.tolerance)
    most = min(settings.max_draws, max(FIRST_DRAWS, settings.max_evaluations // marginals.cost))
    return _between(_Draws(hierarchy, marginals, run), most, whole, settings, run)


def _between(
    draws: Callable[[int], _Sums], most: int, whole: WholeEvidence | None, settings: Shared, run: Run
) -> GlobalGap:
    """The gap from as many draws as its bounds need, `most` at most."""
    sums = draws(min(FIRST_DRAWS, most))
    while True:
        gap, further = _gap(sums, whole, settings, run), min(len(sums.low), most - len(sums.low))
        if gap.bounded and gap.method == LADDER:
            return gap
        if further <= 0:
            return replace(gap, bounded=False)
        fresh = draws(further)
        if gap.bounded and further == len(sums.low):
            # Weights pass when their draws have missed the tail. So these only decide: fresh ones must pass, and count.
            confirmed = _gap(fresh, whole, settings, run)
            if confirmed.bounded:
                return confirmed
        sums = sums.joined(fresh)


class _Draws:
    """Sums of further and further draws of theta."""

    def __init__(self, hierarchy: Hierarchy, marginals: Marginals, run: Run) -> None:
        self.hierarchy, self.marginals, self.run, self.block = hierarchy, marginals, run, 0

    def __call__(self, number: int) -> _Sums:
        parts = []
        for first in range(0, number, DRAWS_AT_ONCE):
            size = min(DRAWS_AT_ONCE, number - first)
            drawn = self.hierarchy.draw(size, self.run.stream("shared latents further"), self.block)
            low, high = self.marginals(drawn.values, self.block)
            parts.append(_Sums(drawn.log_ratio.cpu() + low, drawn.log_ratio.cpu() + high))
            self.block += 1
        return reduce(_Sums.joined, parts)


def _gap(sums: _Sums, whole: WholeEvidence | None, settings: Shared, run: Run) -> GlobalGap:
    """The gap from the draws so far."""
    by_ladder = whole is not None and whole.reliable
    gap = _by_ladder(sums, whole) if whole is not None and by_ladder else _by_weights(sums, run)
    errors = max(gap.lower_mcse, gap.upper_mcse)
    close = gap.upper - gap.lower <= settings.tolerance and errors <= ERROR_SHARE * settings.tolerance
    return replace(gap, bounded=bool(gap.bounded and close))


def _by_ladder(sums: _Sums, whole: WholeEvidence) -> GlobalGap:
    lower, upper = whole.lower - float(sums.high.mean()), whole.upper - float(sums.low.mean())
    lower_mcse = math.hypot(whole.lower_mcse, float(mcse_of_mean(sums.high)))
    upper_mcse = math.hypot(whole.upper_mcse, float(mcse_of_mean(sums.low)))
    values = whole.lower, whole.upper, max(whole.lower_mcse, whole.upper_mcse), *sums.mean
    return GlobalGap(lower, lower_mcse, upper, upper_mcse, True, len(sums.low), LADDER, *values)


def _by_weights(sums: _Sums, run: Run) -> GlobalGap:
    estimate = log_mean_exp_estimate(sums.low[:, None])
    number = len(sums.low)
    with run.stream("shared chains").seeded(number):
        bounds = two_sided(sums.low[:, None], lambda rows: torch.rand(rows, 1, dtype=torch.float64))
    above, error = float(bounds.upper), float(bounds.upper_mcse)
    lower, upper = _lower(sums), above - float(sums.low.mean())
    deleted = torch.tensor([_lower(sums.without(group)) for group in range(NUM_DELETED)])
    lower_mcse = float(deleted.std(correction=0)) * math.sqrt(NUM_DELETED - 1)
    upper_mcse = math.hypot(error, float(mcse_of_mean(sums.low)))
    bounded = bool(estimate.reliable.all()) and math.isfinite(upper)
    values = float(estimate.value), above, max(float(estimate.mcse), error), *sums.mean
    return GlobalGap(lower, lower_mcse, upper, upper_mcse, bounded, number, WEIGHTS, *values)


def _lower(sums: _Sums) -> float:
    return float(log_mean_exp(sums.low) - sums.high.mean())
