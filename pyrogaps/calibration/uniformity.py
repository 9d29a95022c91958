"""An exact test of uniformity on [0, 1] by the ECDF, and its simultaneous band."""

from functools import lru_cache
from typing import Any

import numpy as np
from scipy import special  # type: ignore[import-untyped]

POINTS = np.arange(1, 100) / 100  # where the ECDF is evaluated
MIN_PROBABILITY = 1e-12  # a smaller probability, computed as 1 - (1 - p), is rounding error


class UniformityTest:
    r"""Whether `number` independent values are uniform on [0, 1], tested by the number below each of `POINTS`.

    With $c_i$ of n values below $x_i$, the statistic is the least likely of all these counts,

    $$t = \min_i \min \{P(C_i \le c_i), P(C_i \ge c_i)\}, \quad C_i \sim \mathrm{Binomial}(n, x_i)$$

    and the band holds the counts whose tails are both above a common t. This is the simultaneous band of Säilynoja,
    Bürkner and Vehtari (2022), arXiv:2103.10522, but the probability of an ECDF inside it is computed, not simulated
    (as ArviZ does to draw it): p-values that are adjusted for many latent dimensions are too small to simulate. Given
    n, the counts are those of a Poisson process, whose steps are convolutions (Moscovich and Nadler 2017,
    arXiv:1503.04363).
    """

    def __init__(self, number: int) -> None:
        self.number = number
        counts = np.arange(number + 1)
        self.at_most = special.bdtr(counts, number, POINTS[:, None])
        self.at_least = special.bdtrc(counts - 1, number, POINTS[:, None])

    def p_value(self, values: np.ndarray) -> float:
        """The probability of an ECDF at least as unlikely as that of `values` `(n,)`; no smaller than 1e-12."""
        counts = np.searchsorted(np.sort(values), POINTS, side="right")
        rows = np.arange(len(POINTS))
        tail = min(self.at_most[rows, counts].min(), self.at_least[rows, counts].min())
        return float(np.clip(1 - self.inside(tail), MIN_PROBABILITY, 1))

    def band(self, probability: float) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends at `POINTS` of the band that holds all of an ECDF with at least `probability`."""
        from scipy import optimize

        def excess(log_tail: float) -> float:
            return self.inside(np.exp(log_tail)) - probability

        # Union bound: an ECDF leaves the band at most as often as the sum of the tails over the points.
        narrow, wide = np.log(0.5), np.log((1 - probability) / (4 * len(POINTS)))
        tail = np.exp(optimize.bisect(excess, wide, narrow, xtol=1e-6) - 1e-5)
        low, high = self._limits(tail)
        return low / self.number, high / self.number

    def inside(self, tail: float) -> float:
        """The probability that every count has tails above `tail`."""
        low, high = self._limits(tail)
        if bool((low > high).any()):
            return 0.0
        step = _poisson(np.arange(self.number + 1), self.number / (len(POINTS) + 1))
        reached, first = np.ones(1), 0  # probabilities of the counts first, first + 1, ...
        for bottom, top in zip([*low, self.number], [*high, self.number], strict=True):
            width = top - first + 1
            reached = np.convolve(reached, step[:width])[bottom - first : width]
            first = bottom
        return float(reached[0] / _poisson(self.number, self.number))

    def _limits(self, tail: float) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and the largest count at each point with tails above `tail`."""
        beyond = tail * (1 + 1e-9)
        return (self.at_most <= beyond).sum(1), (self.at_least > beyond).sum(1) - 1


def _poisson(counts: Any, rate: float) -> Any:
    return np.exp(special.xlogy(counts, rate) - special.gammaln(counts + 1) - rate)


@lru_cache(maxsize=8)
def uniformity_test(number: int) -> UniformityTest:
    """The test for `number` values, cached with its tables."""
    return UniformityTest(number)
