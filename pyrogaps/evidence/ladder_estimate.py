"""`LadderEstimate`: log p(x) where every datapoint has as many draws as it needed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrogaps.log_weights import Estimate, log_mean_exp_estimate

METHODS = ("importance sampling", "AIS")
Alike = Sequence[tuple[Tensor, Estimate]]


def _none() -> Tensor:
    return torch.empty(0)


@dataclass(frozen=True, repr=False)
class LadderEstimate(Estimate):
    """As `Estimate`, with draws in different numbers: `draws` has the log-weights of each datapoint, and `log_weights`
    is None.

    Attributes:
        upper_mcse: `(N,)`, the standard error of `upper`, an estimate of an upper bound; see `two_sided`.
        method: `(N,)`, the place in `METHODS` of how each datapoint was measured.
        num_draws: `(N,)`, draws or chains.
        num_temperatures: `(N,)`, of AIS; 0 for importance sampling.
        num_evaluations: `(N,)`, of log p(x, z) or its gradient, pilots included.
    """

    draws: tuple[Tensor, ...] = ()
    upper_mcse: Tensor = field(default_factory=_none)
    method: Tensor = field(default_factory=_none)
    num_draws: Tensor = field(default_factory=_none)
    num_temperatures: Tensor = field(default_factory=_none)
    num_evaluations: Tensor = field(default_factory=_none)
    _alike: Alike | None = None  # as `_by_number` returns it, if it is known already

    def interval(self, probability: float = 0.95) -> tuple[Tensor, Tensor]:
        """A central confidence interval, `(N,)` each, as of `Estimate`; `reliable` says where to trust it."""
        low, high = _collected(self._estimates, lambda estimate: torch.stack(estimate.interval(probability)))
        return low, high

    @property
    def examined(self) -> bool:
        """True: every datapoint is judged."""
        return True

    @property
    def reliable(self) -> Tensor:
        """As of `Estimate`, `(N,)`."""
        reliable = _collected(self._estimates, lambda estimate: estimate.reliable)
        return reliable if self.doubted is None else reliable & ~self.doubted

    @property
    def _estimates(self) -> Alike:
        known = {"vouched": self.vouched, "upper": self.upper, "rounding": self.rounding}
        given = {name: column for name, column in known.items() if column is not None}
        return _by_number(self.draws, given) if self._alike is None else self._alike


def ladder_estimate(draws: tuple[Tensor, ...], columns: Mapping[str, Tensor]) -> LadderEstimate:
    """The estimate from the log-weights of each datapoint and the columns of a climb."""
    known = {name: columns[name] for name in ("vouched", "upper", "rounding")}
    alike = _by_number(draws, known)

    def summary(estimate: Estimate) -> Tensor:
        assert estimate.ess is not None
        assert estimate.khat is not None
        return torch.stack([estimate.value, estimate.mcse, estimate.ess, estimate.khat])

    value, mcse, ess, khat = _collected(alike, summary)
    return LadderEstimate(
        value,
        mcse,
        "lower bound",
        ess=ess,
        khat=khat,
        acceptance=columns["acceptance"],
        **known,
        draws=draws,
        upper_mcse=columns["upper_mcse"],
        method=columns["method"],
        num_draws=torch.tensor([len(column) for column in draws]),
        num_temperatures=columns["temperatures"],
        num_evaluations=columns["evaluations"],
        _alike=alike,
    )


def _by_number(draws: Sequence[Tensor], known: Mapping[str, Tensor]) -> Alike:
    """Positions of the datapoints with the same number of draws, and the estimate from their log-weights."""
    numbers, alike = torch.tensor([len(column) for column in draws]), []
    for number in numbers.unique().tolist():
        positions = (numbers == number).nonzero()[:, 0]
        weights = torch.stack([draws[n].cpu() for n in positions.tolist()], 1)
        of_these = {name: column[positions] for name, column in known.items()}
        alike.append((positions, log_mean_exp_estimate(weights, **of_these)))
    return alike


def _collected(alike: Alike, value: Callable[[Estimate], Tensor]) -> Tensor:
    """A value of the estimates of all datapoints, `(*, N)`."""
    order = torch.cat([positions for positions, _ in alike]).argsort()
    return torch.cat([value(estimate) for _, estimate in alike], -1)[..., order]
