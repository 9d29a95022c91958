"""`LadderEstimate`: log p(x) where every datapoint has as many draws as it needed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyrogaps.log_weights import Estimate, log_mean_exp_estimate

METHODS = ("importance sampling", "AIS")


def _none() -> Tensor:
    return torch.empty(0)


@dataclass(frozen=True, repr=False)
class LadderEstimate(Estimate):
    """As `Estimate`, with draws in different numbers: `draws` has the log-weights of each datapoint, and `log_weights`
    is None.

    Attributes:
        method: `(N,)`, the place in `METHODS` of how each datapoint was measured.
        num_draws: `(N,)`, draws or chains.
        num_temperatures: `(N,)`, of AIS; 0 for importance sampling.
        num_evaluations: `(N,)`, of log p(x, z) or its gradient, pilots included.
    """

    draws: tuple[Tensor, ...] = ()
    method: Tensor = field(default_factory=_none)
    num_draws: Tensor = field(default_factory=_none)
    num_temperatures: Tensor = field(default_factory=_none)
    num_evaluations: Tensor = field(default_factory=_none)

    def interval(self, probability: float = 0.95) -> tuple[Tensor, Tensor]:
        """A central confidence interval, `(N,)` each, by `hall_interval`; `reliable` says where to trust it."""
        low = self._collect(lambda estimate: estimate.interval(probability)[0])
        return low, self._collect(lambda estimate: estimate.interval(probability)[1])

    @property
    def reliable(self) -> Tensor:
        """As of `Estimate`, `(N,)`."""
        return self._collect(lambda estimate: estimate.reliable)

    def _collect(self, value: Callable[[Estimate], Tensor]) -> Tensor:
        groups = [(positions, value(estimate)) for positions, estimate in by_number(self.draws)]
        order = torch.cat([positions for positions, _ in groups]).argsort()
        return torch.cat([part for _, part in groups])[order]


def by_number(draws: Sequence[Tensor]) -> Iterator[tuple[Tensor, Estimate]]:
    """Positions of the datapoints with the same number of draws, and the estimate of their log-weights."""
    numbers = torch.tensor([len(column) for column in draws])
    for number in numbers.unique().tolist():
        positions = (numbers == number).nonzero()[:, 0]
        yield positions, log_mean_exp_estimate(torch.stack([draws[n] for n in positions.tolist()], 1))
