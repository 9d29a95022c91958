"""`EscalatedEstimate`: log p(x) where every datapoint has as many draws as it needed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyrogaps.escalation.climb import Found
from pyrogaps.log_weights import Estimate, log_mean_exp_estimate

if TYPE_CHECKING:
    from pyrogaps.escalation.check import LadderCheck

METHODS = ("importance sampling from the refined guide", "importance sampling from its curvature", "AIS")


def _none() -> Tensor:
    return torch.empty(0)


@dataclass(frozen=True)
class EscalatedEstimate(Estimate):
    """As `Estimate`, with draws in different numbers: `draws` has the log-weights of each datapoint, and `log_weights`
    is None.

    Attributes:
        method: `(N,)`, the place in `METHODS` of how each datapoint was measured.
        num_draws: `(N,)`, draws or chains.
        num_temperatures: `(N,)`, of AIS; 0 for importance sampling.
        num_evaluations: `(N,)`, of log p(x, z) or its gradient, pilots included.
        check: how the ladder did on simulated data; None where it was not asked for, or the model cannot be simulated.
    """

    draws: tuple[Tensor, ...] = ()
    method: Tensor = field(default_factory=_none)
    num_draws: Tensor = field(default_factory=_none)
    num_temperatures: Tensor = field(default_factory=_none)
    num_evaluations: Tensor = field(default_factory=_none)
    check: "LadderCheck | None" = None

    def interval(self, probability: float = 0.95) -> tuple[Tensor, Tensor]:
        """A central confidence interval, `(N,)` each, by `hall_interval`; see `reliable` for when to believe it."""
        low = self._collect(lambda estimate: estimate.interval(probability)[0])
        return low, self._collect(lambda estimate: estimate.interval(probability)[1])

    @property
    def reliable(self) -> Tensor:
        """As of `Estimate`, `(N,)`."""
        return self._collect(lambda estimate: estimate.reliable)

    def _collect(self, value: Callable[[Estimate], Tensor]) -> Tensor:
        found: Tensor | None = None
        for members, estimate in _by_number(self.draws):
            part = value(estimate)
            found = torch.empty(len(self.draws), dtype=part.dtype, device=part.device) if found is None else found
            found[members] = part
        assert found is not None
        return found


def escalated(found: list[Found]) -> EscalatedEstimate:
    """The estimate of several blocks."""
    draws = tuple(column for block in found for column in block.log_weights)
    blank = torch.empty(len(draws), dtype=torch.float64)
    value, mcse, ess, khat = blank, blank.clone(), blank.clone(), blank.clone()
    for members, estimate in _by_number(draws):
        assert estimate.ess is not None
        assert estimate.khat is not None
        value[members], mcse[members] = estimate.value.cpu(), estimate.mcse.cpu()
        ess[members], khat[members] = estimate.ess.cpu(), estimate.khat.cpu()
    return EscalatedEstimate(
        value,
        mcse,
        "lower bound",
        ess=ess,
        khat=khat,
        acceptance=torch.cat([block.acceptance for block in found]),
        draws=draws,
        method=torch.cat([block.method for block in found]),
        num_draws=torch.tensor([len(column) for column in draws]),
        num_temperatures=torch.cat([block.num_temperatures for block in found]),
        num_evaluations=torch.cat([block.evaluations for block in found]),
    )


def _by_number(draws: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Estimate]]:
    """Datapoints with the same number of draws, and the estimate of their log-weights."""
    numbers = torch.tensor([len(column) for column in draws])
    for number in numbers.unique().tolist():
        members = (numbers == number).nonzero()[:, 0]
        yield members, log_mean_exp_estimate(torch.stack([draws[n] for n in members.tolist()], 1))
