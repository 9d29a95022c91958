r"""The global gap, between two bounds.

$$KL(q(\theta) \| p(\theta|x)) = \log p(x) - A, \quad
  A = E_{q(\theta)}\Bigl[\log \frac{p(\theta)}{q(\theta)} + \sum_n \log p(x_n|\theta)\Bigr]$$

A is a mean over draws of theta, with lower and upper estimates of log p(x_n | theta) (`Marginals`). log p(x) of the
data set comes from the ladder on the space of theta and all local latents, where that is small; else from the weights
$W_m = p(\theta_m) / q(\theta_m) \prod_n \hat p_n(\theta_m)$ of the same draws, whose mean is unbiased for p(x): their
log-mean-exp from below, coupled chains from above. A noisy log-phat never stands in for an upper estimate: it is below
log p(x_n | theta) in expectation, so that it would make up a gap where there is none.
"""

import math
from dataclasses import dataclass, replace

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
        log_evidence, log_evidence_upper: log p(x) of the data set from below and above.
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

    @property
    def value(self) -> float:
        """The middle of the bounds, or the lower one where the gap is not bounded from above."""
        return 0.5 * (self.lower + self.upper) if self.bounded else self.lower

    @property
    def mcse(self) -> float:
        """The standard error of `value`, half of the distance of the bounds included."""
        if not self.bounded:
            return self.lower_mcse
        return math.hypot(max(self.lower_mcse, self.upper_mcse), 0.5 * max(self.upper - self.lower, 0.0))


@dataclass(frozen=True)
class _Sums:
    """log p(theta) - log q(theta) + log p(x | theta) from below and above, `(D,)` each, of all draws so far."""

    low: Tensor
    high: Tensor

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
    most = max(FIRST_DRAWS, min(settings.max_draws, settings.max_evaluations // marginals.cost))
    sums, target, block = None, min(FIRST_DRAWS, settings.max_draws), 0
    while True:
        while sums is None or len(sums.low) < target:
            number = min(DRAWS_AT_ONCE, target - (0 if sums is None else len(sums.low)))
            drawn = hierarchy.draw(number, run.stream("shared latents further"), block)
            low, high = marginals(drawn.values, block)
            fresh = _Sums(drawn.log_ratio.cpu() + low, drawn.log_ratio.cpu() + high)
            sums, block = fresh if sums is None else sums.joined(fresh), block + 1
        gap = _gap(sums, whole, settings, run)
        if target >= most or gap.bounded:
            return gap
        target = min(2 * target, most)


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
    return GlobalGap(lower, lower_mcse, upper, upper_mcse, True, len(sums.low), LADDER, whole.lower, whole.upper)


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
    values = float(estimate.value), above
    return GlobalGap(lower, lower_mcse, upper, upper_mcse, bounded, number, WEIGHTS, *values)


def _lower(sums: _Sums) -> float:
    return float(log_mean_exp(sums.low) - sums.high.mean())
