"""Differences of two ledgers of the same datapoints, with their errors and where they cannot be known."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pyrogaps.evidence.reliability import RELIABLE, enough_trusted, is_exact
from pyrogaps.gaps.facts import same_model
from pyrogaps.gaps.finite import is_finite
from pyrogaps.gaps.ledger import GapLedger
from pyrogaps.gaps.selection import checks_behind, checks_of, column_of, taken_from_evidence
from pyrogaps.gaps.table import labels_of
from pyrogaps.gaps.terms import CERTAIN, Mean, Values, combined_error, ids, values_of

EVIDENCE, UPPER = "log_evidence", "log_evidence_upper"
APART = 4.0  # errors of two values of log p(x) of one datapoint at which they cannot be the same, of thousands
LARGER, SMALLER, SAME, OPEN, UNTRUSTED = "larger", "smaller", "within its error", "between its bounds", "not trusted"


@dataclass(frozen=True)
class Difference:
    """A quantity of one ledger less that of another: per datapoint, and as means over datapoints, in nats.

    Attributes:
        quantity: its row in `summary()`; `label`, what tables call it.
        first, second: the means that are compared.
        value: the difference per datapoint `(N,)`, with Monte Carlo errors.
        low, high: its ends per datapoint, where log p(x) is known between two bounds; else the value.
        trusted: where both ledgers can be trusted, `(N,)`.
    """

    quantity: str
    label: str
    first: float
    second: float
    value: Values
    low: Values
    high: Values
    trusted: NDArray[np.bool_]

    @cached_property
    def mean(self) -> Mean:
        """Over all datapoints."""
        return self.value.mean

    @cached_property
    def ends(self) -> tuple[Mean, Mean]:
        """Means of both ends over the datapoints that can be trusted."""
        low, high = (Values(end.value[self.trusted], end.mcse[self.trusted]).mean for end in (self.low, self.high))
        return low, high

    @property
    def is_interval(self) -> bool:
        """Whether the difference is known between two ends only."""
        return not np.array_equal(self.low.value, self.high.value)

    @property
    def verdict(self) -> str:
        """Whether the first is larger or smaller on average, beyond two errors; or why that is not known."""
        if not enough_trusted(int(self.trusted.sum()), len(self.trusted)):
            return UNTRUSTED
        low, high = self.ends
        if low.mean > CERTAIN * error_of(low):
            return LARGER
        if high.mean < -CERTAIN * error_of(high):
            return SMALLER
        # An interval that is wider than its error can be narrowed.
        return OPEN if high.mean - low.mean > error_of(low) else SAME


def error_of(mean: Mean) -> float:
    """Standard error of a mean over datapoints and draws."""
    return combined_error(mean.standard_error, mean.mcse)


@dataclass(frozen=True)
class Pair:
    """Two ledgers of the same datapoints, in the same order.

    Monte Carlo errors of the two are independent where they were measured with different seeds. With one seed they may
    be correlated, to an extent that is not known: the error of a difference is then the sum of both, which no
    correlation exceeds.
    """

    first: GapLedger
    second: GapLedger

    @cached_property
    def one_model(self) -> bool:
        """Whether both are of one model, so that log p(x) is one number."""
        return same_model(self.first.provenance, self.second.provenance)

    @property
    def one_seed(self) -> bool:
        """Whether both were measured with one seed."""
        return bool(self.first.provenance["seed"] == self.second.provenance["seed"])

    @cached_property
    def columns(self) -> tuple[xr.Dataset, xr.Dataset]:
        """Those of both, where all bounds of both are finite."""
        pair = self.first.per_datapoint, self.second.per_datapoint
        finite = is_finite(pair[0]) & is_finite(pair[1])
        return pair[0].isel(datapoint=finite), pair[1].isel(datapoint=finite)

    @cached_property
    def reliable(self) -> NDArray[np.bool_]:
        """Where log p(x) of both is reliable, and bounded from both sides."""
        normalised = not any(ledger.provenance["unnormalised_likelihood"] for ledger in (self.first, self.second))
        first, second = (_is_bounded(data, *bounds) for data, bounds in zip(self.columns, self._bounds, strict=True))
        return np.asarray(first & second & normalised)

    @cached_property
    def evidence(self) -> NDArray[np.float64]:
        """log p(x) of one model, from both ledgers, `(N,)`.

        It is the value of the ledger that is reliable, where only one is. Else it is the mean of both, weighted by
        their precision, 1 / MCSE^2 on average over datapoints; or, where they differ by more than their errors, the
        higher one, because what misses a part of the posterior is too low. Weights from each datapoint's own MCSE would
        lean towards low values: draws that miss the largest weights have small errors too.
        """
        one, two = (values_of(data, EVIDENCE) for data in self.columns)
        first, second = (float((values.mcse**2).mean()) for values in (one, two))
        weight = np.full(len(one.value), second / (first + second) if first + second else 0.5)
        difference = self._less(one, two)
        apart = np.abs(difference.value) > APART * difference.mcse
        weight = np.where(apart, difference.value > 0, weight)
        nowhere = np.zeros(len(weight), dtype=bool)
        trusted, other = (checks_of(data).get("reliable", nowhere) for data in self.columns)
        weight = np.where(trusted != other, trusted, weight)
        return np.asarray(weight * one.value + (1 - weight) * two.value)

    @cached_property
    def _bounds(self) -> tuple[tuple[Values, Values], tuple[Values, Values]]:
        """log p(x) from below and from above, of both."""
        first, second = (
            _bounds_of(data, ledger.provenance["quantities"][EVIDENCE]["direction"])
            for data, ledger in zip(self.columns, (self.first, self.second), strict=True)
        )
        return first, second

    def differences(self) -> Iterator[Difference]:
        """Of every quantity that both have per datapoint: bounds, the tree of gaps, and further families."""
        labels = labels_of(self.first.summary(), self.first.gaps, self.first.provenance)
        labels |= {name: str(self.first.gaps["label"].sel(gap=name).item()) for name in ids(self.first.gaps)}
        for name in self._names():
            yield self._difference(name, labels[name])

    def _names(self) -> Iterator[str]:
        families = [family for family in self.first.families[1:] if family in self.second.families]
        yield from (EVIDENCE, "elbo_refined[own]", *(f"elbo_refined[{family}]" for family in families))
        further = ("elbo_shared", "elbo", *ids(self.first.gaps))
        yield from (name for name in further if all(name in data for data in self.columns))
        yield from (f"approximation_gap[{family}]" for family in families)

    def _difference(self, name: str, label: str) -> Difference:
        one, two = (column_of(data, name) for data in self.columns)
        value = self._less(one, two)
        low, high, trusted = value, value, np.ones(len(one.value), dtype=bool)
        first, second = one.mean.mean, two.mean.mean
        if (lower := taken_from_evidence(name)) is not None:
            if not self.one_model:
                low, high, trusted = *self._ends(lower), self.reliable
            elif lower:  # log p(x) is one number, and cancels
                one, two = (column_of(data, lower) for data in self.columns)
                value = low = high = self._less(two, one)
                first, second = (float((self.evidence - bound.value).mean()) for bound in (one, two))
        for data in self.columns:
            trusted = trusted & checks_behind(data, name).get("converged", True)
        return Difference(name, label, first, second, value, low, high, trusted)

    def _ends(self, bound: str) -> tuple[Values, Values]:
        """Ends of the difference of log p(x), or of a gap that is log p(x) less the `bound` of that name."""
        (lower, upper), (other_lower, other_upper) = self._bounds
        if bound:
            one, two = (column_of(data, bound) for data in self.columns)
            lower, upper = lower.minus(one), upper.minus(one)
            other_lower, other_upper = other_lower.minus(two), other_upper.minus(two)
        return self._less(lower, other_upper), self._less(upper, other_lower)

    def _less(self, one: Values, two: Values) -> Values:
        """The difference of two estimates, one of each ledger."""
        mcse = one.mcse + two.mcse if self.one_seed else np.hypot(one.mcse, two.mcse)
        return Values(one.value - two.value, mcse)


def _bounds_of(data: xr.Dataset, direction: str) -> tuple[Values, Values]:
    """log p(x) from below and from above; infinity where it is not bounded from there."""
    lower, nowhere = values_of(data, EVIDENCE), np.full(data.sizes["datapoint"], np.inf)
    if is_exact(direction):
        return lower, lower
    if not direction.startswith("lower bound"):
        return Values(-nowhere, nowhere), Values(nowhere, nowhere)
    upper = values_of(data, UPPER) if UPPER in data else Values(nowhere, nowhere)
    # The mean of an upper bound is not below that of the lower one; a single pair may cross.
    return lower, Values(np.maximum(upper.value, lower.value), upper.mcse)


def _is_bounded(data: xr.Dataset, lower: Values, upper: Values) -> NDArray[np.bool_]:
    known = np.isfinite([*lower, *upper]).all(0)
    return np.asarray(known & (data[RELIABLE].values if RELIABLE in data else True), dtype=bool)
