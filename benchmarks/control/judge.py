"""What the rows say: medians with intervals, shares of unstable loops, and whether the claim holds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

from benchmarks.control.learning import Row

LEVEL = 0.95


@dataclass(frozen=True)
class Summary:
    """Of the models of one setting and lookahead: all data sets, unstable loops with infinite regret."""

    number: int
    median: float
    low: float
    high: float
    unstable: int
    infinite_data: float | None
    model_loss: float
    gap: float
    gap_at_truth: float


@dataclass(frozen=True)
class Comparison:
    """In how many data sets a guide's model controls worse and better than the smoother's, and the sign test's p."""

    worse: int
    better: int
    p: float

    @property
    def verdict(self) -> str:
        """One of "worse", "better" and "undecided", at 5%."""
        if self.p >= 1 - LEVEL:
            return "undecided"
        return "worse" if self.worse > self.better else "better"


def of(found: Sequence[Row], setting: str, lookahead: float) -> tuple[list[Row], Row | None]:
    """The rows of the data sets, in their order, and that of infinite data where there is one."""
    chosen = [row for row in found if row.setting == setting and row.lookahead == lookahead]
    limits = [row for row in chosen if row.data_set == "infinite"]
    return [row for row in chosen if row.data_set != "infinite"], limits[0] if limits else None


def summary(found: Sequence[Row], setting: str, lookahead: float) -> Summary:
    sets, limit = of(found, setting, lookahead)
    regrets = np.array([row.regret for row in sets])
    low, high = interval(regrets)
    return Summary(
        len(sets),
        float(np.median(regrets)),
        low,
        high,
        int(np.isinf(regrets).sum()),
        None if limit is None else limit.regret,
        float(np.median([row.model_loss for row in sets])),
        float(np.median([row.gap for row in sets])),
        float(np.median([row.gap_at_truth for row in sets])),
    )


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Order statistics that hold the median with a probability of at least 95%; an end may be infinite.

    It is exact for any law. The percentile bootstrap's interval of a median of 20 values covers about 91%.
    """
    ordered = np.sort(values)
    outside = int(stats.binom.ppf((1 - LEVEL) / 2, len(values), 0.5))  # the rank of the lower end
    if not outside:
        return -np.inf, np.inf
    return float(ordered[outside - 1]), float(ordered[-outside])


def compared(found: Sequence[Row], setting: str, lookahead: float) -> Comparison:
    """Paired by data set with the smoother's; two unstable loops are a tie, which counts for neither."""
    (mine, _), (smoothed, _) = of(found, setting, lookahead), of(found, setting, math.inf)
    pairs = [(row.regret, other.regret) for row, other in zip(mine, smoothed, strict=True)]
    worse, better = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    p = float(stats.binomtest(worse, worse + better).pvalue) if worse + better else 1.0
    return Comparison(worse, better, p)
