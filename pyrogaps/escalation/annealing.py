"""The rungs of AIS: pilots and runs for datapoints that want different numbers of chains."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pyrogaps.anneal import GaussianStart
from pyrogaps.bounds import refuse_nan
from pyrogaps.escalation.rotations import WARM_UP, Rotations
from pyrogaps.escalation.settings import Escalation
from pyrogaps.escalation.slots import POINTS, Slots
from pyrogaps.streams import Chunk, Noise

Count = TypeVar("Count", int, Tensor)


@dataclass(frozen=True)
class Scouted:
    """What a rung's pilot found of some datapoints: Var[log w] over its chains `(M,)` and step lengths `(T, M)`."""

    log_variance: Tensor
    steps: Tensor


class Annealer:
    """AIS for the datapoints of a block from the Gaussians `start`."""

    def __init__(self, slots: Slots, start: GaussianStart, settings: Escalation, seed: int) -> None:
        self.slots, self.start, self.settings, self.seed = slots, start, settings, seed

    def scout(self, members: Tensor, num_temperatures: int) -> Scouted:
        """A pilot of `POINTS` chains for each of `members`."""
        variances, steps = [], []
        for number, (batch, kept) in enumerate(self.slots.batches(members)):
            noise = self._noise(f"scout {num_temperatures} {number}", len(batch))
            ran = self._path(batch).pilot(num_temperatures, self.settings.target_acceptance, noise)
            variances.append(ran.log_weights.var(0)[:kept])
            steps.append(ran.steps[:, :kept])
        # A chain that left the support, or a value that is not finite, is as bad as can be.
        return Scouted(torch.nan_to_num(torch.cat(variances), nan=torch.inf), torch.cat(steps, 1))

    def run(self, members: Tensor, each: Tensor, steps: Tensor) -> tuple[list[Tensor], Tensor]:
        """Log-weights of `each` `(M,)` slots of chains for each of `members`, and their acceptance rates `(M,)`.

        `steps` `(T, M)` are a pilot's.
        """
        found, acceptances = [], []
        owners = torch.arange(len(members)).repeat_interleave(each)
        for number, (owner, kept) in enumerate(self.slots.batches(owners)):
            noise = self._noise(f"run {len(steps)} {number}", len(owner))
            ran = self._path(members[owner]).run(steps[:, owner], noise)
            found.append(refuse_nan(ran.log_weights[:, :kept], self.slots.block.start + members[owner[:kept]]))
            acceptances.append(ran.acceptance[:kept])
        weights = [part.flatten() for part in torch.cat(found, 1).T.split(each.tolist())]
        rates = [part.mean() for part in torch.cat(acceptances).split(each.tolist())]
        return weights, torch.stack(rates)

    def cost(self, num_temperatures: Count) -> Count:
        """Gradients of one chain."""
        return 1 + num_temperatures * self.settings.num_leapfrog

    def scouting_cost(self, num_temperatures: int) -> int:
        """Gradients of a datapoint's pilot."""
        return POINTS * self.cost(num_temperatures + WARM_UP)

    def _path(self, members: Tensor) -> Rotations:
        return Rotations(self.start.at(members), self.slots.at(members), POINTS, self.settings.num_leapfrog)

    def _noise(self, purpose: str, width: int) -> Noise:
        joint, first = self.slots.evaluator.joint, self.slots.block.start
        columns = Chunk(first, first + width)
        return Noise(self.seed, f"escalation {purpose}", columns, dtype=joint.dtype, device=joint.device)
