"""Statistics of ranks: coverage, shift and spread with their errors, and adjusted p-values."""

from dataclasses import dataclass

import numpy as np
from scipy import special  # type: ignore[import-untyped]

from pyrogaps.calibration.uniformity import MIN_PROBABILITY, uniformity_test


def proportion(hits: np.ndarray, trials: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""The share $\sum_n h_n / \sum_n m_n$ of `hits` `(N, *)` in `trials` `(N, *)` and its standard error, each `(*)`.

    The N datapoints are independent, but the trials of one datapoint need not be: the error is that of a ratio of means
    over datapoints, the binomial one where each has one trial. For the error
    only, one datapoint of hits and one of misses are added, so that it is not zero where all trials hit. NaN where
    there are no trials.
    """
    taking_part = trials > 0
    number, total = taking_part.sum(0), trials.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        share, size = hits.sum(0) / total, total / number
        centre = (hits.sum(0) + size) / (total + 2 * size)
        squares = np.square(hits - centre * trials).sum(0) + size**2 * (centre**2 + (1 - centre) ** 2)
        error = np.sqrt(squares / (number + 2) / number) / size
    return share, error


def covered(pit: np.ndarray, probability: float) -> np.ndarray:
    """Whether the central interval of `probability` holds the truth, of the same shape as `pit`; False at NaN."""
    return np.abs(pit - 0.5) <= probability / 2


@dataclass(frozen=True)
class Marginal:
    r"""Statistics of the ranks of one latent dimension.

    With $u_n$ the normalised ranks, uniform under calibration, the normal scores $\Phi^{-1}(u_n)$ are N(0, 1). `shift`
    is their mean: how far the truth lies above the posterior, in posterior standard deviations. `spread` is their
    standard deviation: that of the truth around the posterior, relative to the posterior's own. The three p-values are
    exact under calibration, whatever the posterior: of `uniformity_test`, of the mean of the scores (Student's t, so
    that a spread is not taken for a shift) and of their variance (chi-squared).
    """

    count: int
    mean_rank: float = np.nan
    mean_rank_error: float = np.nan
    shift: float = np.nan
    shift_error: float = np.nan
    spread: float = np.nan
    spread_error: float = np.nan
    p_uniform: float = np.nan
    p_shift: float = np.nan
    p_spread: float = np.nan


def marginal(pit: np.ndarray) -> Marginal:
    """Statistics of normalised ranks `(N,)`, without those that are NaN; all NaN for fewer than two."""
    u = pit[np.isfinite(pit)]
    number = len(u)
    if number < 2:
        return Marginal(number)
    scores = special.ndtri(np.clip(u, MIN_PROBABILITY, 1 - MIN_PROBABILITY))
    deviations = scores - scores.mean()
    variance = float(np.square(deviations).mean())
    spread = np.sqrt(variance * number / (number - 1))
    sum_of_squares = variance * number
    fourth = float((deviations**4).mean())
    tails = special.chdtr(number - 1, sum_of_squares), special.chdtrc(number - 1, sum_of_squares)
    return Marginal(
        number,
        float(u.mean()),
        float(u.std(ddof=1) / np.sqrt(number)),
        float(scores.mean()),
        float(spread / np.sqrt(number)),
        float(spread),
        float(np.sqrt(max(fourth - variance**2, 0.0) / number) / (2 * spread)),
        uniformity_test(number).p_value(u),
        max(2 * float(special.stdtr(number - 1, -abs(scores.mean()) / spread * np.sqrt(number))), MIN_PROBABILITY),
        float(np.clip(2 * min(tails), MIN_PROBABILITY, 1)),
    )


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values: the family-wise error rate of rejecting all below a level is at most that level.

    The tests may be dependent. NaN stays NaN and does not count as a test.
    """
    flat = p_values.ravel()
    order = np.argsort(flat)[: int(np.isfinite(flat).sum())]
    factors = np.arange(len(order), 0, -1)
    adjusted = np.full(flat.shape, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(flat[order] * factors), 1)
    return adjusted.reshape(p_values.shape)
