"""Which rung each datapoint of a block stops at, and how many draws it takes there."""

import math

import torch
from torch import Tensor

from pyrogaps.evidence.ladder_settings import LadderSettings
from pyrogaps.evidence.slots import POINTS
from pyrogaps.streams import PARTICLE_BLOCK

GUIDE, GAUSSIAN, FIRST_AIS = 0, 1, 2
# As many more draws as the pilot asks for, because its variance is itself uncertain.
MARGIN = 1.4
# The share of the budget that pilots may spend.
PILOTS = 0.5
WIDEST = 1e4
# The run that counts has this many times as many temperatures as its pilot: at equal cost, fewer and longer chains are
# as exact, and their weights have lighter tails. The variance of log w falls a little slower than 1 / T.
TIMES, DECAY = 4, 0.85


class Plan:
    """Rungs and costs of the B datapoints of a block.

    Attributes:
        rung: where each datapoint stops, -1 while that is open. It is not below `lowest`, unless the budget reaches no
            further.
        excess: the relative variance Var(w) / E[w]^2 of one draw there, estimated from its pilot run.
        evaluations: how many each has cost so far.
    """

    def __init__(self, number: int, settings: LadderSettings, lowest: int = GUIDE) -> None:
        self.settings, self.lowest = settings, lowest
        self.rung = torch.full((number,), -1)
        self.excess = torch.full((number,), math.inf, dtype=torch.float64)
        self.evaluations = torch.zeros(number, dtype=torch.long)
        # The rung of the least variance so far, for datapoints for which no rung can be trusted.
        self._best = torch.zeros(number, dtype=torch.long)

    @property
    def open(self) -> Tensor:
        """Positions of the datapoints that have not stopped."""
        return (self.rung < 0).nonzero()[:, 0]

    @property
    def budget(self) -> int:
        """What the block may cost."""
        return len(self.rung) * self.settings.max_evaluations

    def note(self, rung: int, positions: Tensor, excess: Tensor, trusted: Tensor) -> None:
        """Note a pilot's result for the datapoints at `positions`: those `trusted` stop at this rung."""
        excess = torch.nan_to_num(excess.double().cpu(), nan=math.inf)
        trusted = trusted.cpu() & (rung >= self.lowest)
        first = (self._best[positions] < self.lowest) & (rung >= self.lowest)
        better = (excess < self.excess[positions]) | trusted | first
        chosen = positions[better]
        self.excess[chosen], self._best[chosen] = excess[better], rung
        self.rung[positions[trusted]] = rung

    def note_chains(self, rung: int, positions: Tensor, log_variance: Tensor) -> None:
        """As `note`, of an AIS pilot's Var[log w] over chains, `(M,)`."""
        variance = log_variance.double().cpu()
        trusted = variance <= self.settings.max_log_variance
        self.note(rung, positions, torch.expm1((variance * TIMES**-DECAY).clamp(max=20.0)), trusted)

    def affords(self, evaluations: int) -> bool:
        """Whether pilots may cost so many more."""
        return int(self.evaluations.sum()) + evaluations <= PILOTS * self.budget

    def close(self) -> None:
        """Let the datapoints that are still open stop where their weights varied least."""
        self.rung = torch.where(self.rung < 0, self._best, self.rung)

    def units(self, costs: Tensor) -> Tensor:
        """How many units of draws to buy for each datapoint `(B,)`, where one unit costs `costs` `(B,)`.

        As many as the tolerance takes; where the budget has not enough left, as many as a wider one takes.
        """
        left = self.budget - int(self.evaluations.sum())
        narrow, wide = self.settings.tolerance, WIDEST
        if int((self._units(narrow) * costs).sum()) <= left:
            return self._units(narrow)
        for _ in range(50):
            middle = math.sqrt(narrow * wide)
            if int((self._units(middle) * costs).sum()) <= left:
                wide = middle
            else:
                narrow = middle
        return self._units(wide)

    def _units(self, tolerance: float) -> Tensor:
        """Units that bring the standard error of log p(x) to the tolerance."""
        draws = MARGIN * self.excess.clamp(max=1e6) / tolerance**2
        size = torch.where(self.rung < FIRST_AIS, PARTICLE_BLOCK, POINTS)
        return (draws / size).ceil().clamp(min=1).long()
