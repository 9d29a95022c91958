"""Which rung each datapoint of a block stops at, and how many draws it takes there."""

import math

import torch
from torch import Tensor

from pyrogaps.escalation.settings import Escalation
from pyrogaps.escalation.slots import POINTS
from pyrogaps.streams import PARTICLE_BLOCK

GUIDE, GAUSSIAN, FIRST_AIS = 0, 1, 2
# Draws are bought in these units, and this many times as many as the pilot asks for: its variance is itself uncertain.
MARGIN = 1.4
# The share of the budget that pilots may spend.
PILOTS = 0.5
WIDEST = 1e4
# A run that counts is this many times as long as its pilot: at equal cost fewer and longer chains are as exact, and
# their weights have lighter tails. The variance of log w falls a little slower than 1 / T.
TIMES, DECAY = 4, 0.85


class Plan:
    """Of the B datapoints of a block: the rung each stops at, -1 while it is open; the relative variance
    Var(w) / E[w]^2 of one draw there, as its pilot lets expect; and what has been spent, evaluations `(B,)`.

    Nobody stops at a rung below `lowest`, unless the budget reaches no further.
    """

    def __init__(self, number: int, settings: Escalation, lowest: int = GUIDE) -> None:
        self.settings, self.lowest = settings, lowest
        self.rung = torch.full((number,), -1)
        self.excess = torch.full((number,), math.inf, dtype=torch.float64)
        self.evaluations = torch.zeros(number, dtype=torch.long)
        # The rung of the least variance so far, for those that none can be trusted with.
        self._best = torch.zeros(number, dtype=torch.long)

    @property
    def open(self) -> Tensor:
        """Places of the datapoints that have not stopped."""
        return (self.rung < 0).nonzero()[:, 0]

    @property
    def budget(self) -> int:
        """What the block may cost."""
        return len(self.rung) * self.settings.max_evaluations

    def note(self, rung: int, members: Tensor, excess: Tensor, trusted: Tensor) -> None:
        """A pilot's verdict on `members`: those `trusted` stop here."""
        excess = torch.nan_to_num(excess.double().cpu(), nan=math.inf)
        trusted = trusted.cpu() & (rung >= self.lowest)
        first = (self._best[members] < self.lowest) & (rung >= self.lowest)
        better = (excess < self.excess[members]) | trusted | first
        chosen = members[better]
        self.excess[chosen], self._best[chosen] = excess[better], rung
        self.rung[members[trusted]] = rung

    def note_chains(self, rung: int, members: Tensor, log_variance: Tensor) -> None:
        """As `note`, of an AIS pilot's Var[log w] over chains, `(M,)`."""
        variance = log_variance.double().cpu()
        believed = variance <= self.settings.max_log_variance
        self.note(rung, members, torch.expm1((variance * TIMES**-DECAY).clamp(max=20.0)), believed)

    def affords(self, evaluations: int) -> bool:
        """Whether pilots may cost so many more."""
        return int(self.evaluations.sum()) + evaluations <= PILOTS * self.budget

    def close(self) -> None:
        """Those still open stop where their weights varied least."""
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
