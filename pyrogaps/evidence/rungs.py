"""The rungs of AIS: pilots and runs for datapoints that need different numbers of chains."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pyrogaps.bounds import refuse_nan
from pyrogaps.evidence.annealing import WARM_UP, AdaptedStepSizes, StepSizes, anneal, pilot, schedule
from pyrogaps.evidence.ladder_settings import LadderSettings
from pyrogaps.evidence.rotations import Rotation
from pyrogaps.evidence.slots import POINTS, Slots
from pyrogaps.gaussians import Gaussian
from pyrogaps.run import Run
from pyrogaps.streams import Chunk, Noise

Count = TypeVar("Count", int, Tensor)


@dataclass(frozen=True)
class Piloted:
    """What a rung's pilot says of M datapoints: Var[log w] over its chains `(M,)` and step lengths `(T, M)`."""

    log_variance: Tensor
    steps: Tensor


class Annealer:
    """AIS for the datapoints of a block from the Gaussians `start`, by rotations."""

    def __init__(self, slots: Slots, start: Gaussian, settings: LadderSettings, run: Run) -> None:
        self.slots, self.start, self.settings, self._run = slots, start, settings, run

    def pilot(self, positions: Tensor, num_temperatures: int) -> Piloted:
        """A pilot of `POINTS` chains for each of the datapoints at `positions` of the block."""
        betas, variances, lengths = schedule("linear", num_temperatures), [], []
        for number, (batch, kept) in enumerate(self.slots.batches(positions)):
            noise, move = self._noise(f"scout {num_temperatures} {number}", len(batch)), self._move(batch)
            state = move.start_at(noise.normal(POINTS, self.slots.dim))
            steps = AdaptedStepSizes(move.adaptation, self.settings.target_acceptance, state.position)
            path = [(steps.current, reached.log_weights) for reached in pilot(move, state, betas, steps, noise)]
            variances.append(path[-1][1].var(0)[:kept])
            lengths.append(torch.stack([length for length, _ in path])[:, :kept])
        # A chain that left the support, or a value that is not finite, is as bad as can be.
        return Piloted(torch.nan_to_num(torch.cat(variances), nan=torch.inf), torch.cat(lengths, 1))

    def run(self, positions: Tensor, num_slots: Tensor, steps: Tensor) -> tuple[list[Tensor], Tensor]:
        """Log-weights of `num_slots` `(M,)` slots of chains for each datapoint, and acceptance rates `(M,)`.

        `steps` `(T, M)` are a pilot's.
        """
        betas, log_weights, acceptances = schedule("linear", len(steps)), [], []
        owners = torch.arange(len(positions)).repeat_interleave(num_slots)
        for number, (owner, kept) in enumerate(self.slots.batches(owners)):
            noise, move = self._noise(f"run {len(steps)} {number}", len(owner)), self._move(positions[owner])
            state = move.start_at(noise.normal(POINTS, self.slots.dim))
            rates = []
            for reached in anneal(move, state, betas, StepSizes(steps[:, owner]), noise):
                rates.append(reached.acceptance.double().mean(0))
            indices = self.slots.block.start + positions[owner[:kept]]
            log_weights.append(refuse_nan(reached.log_weights[:, :kept], indices))
            acceptances.append(torch.stack(rates).mean(0)[:kept])
        weights = [part.flatten() for part in torch.cat(log_weights, 1).T.split(num_slots.tolist())]
        by_datapoint = [part.mean() for part in torch.cat(acceptances).split(num_slots.tolist())]
        return weights, torch.stack(by_datapoint)

    def cost(self, num_temperatures: Count) -> Count:
        """Gradients of one chain."""
        return 1 + num_temperatures * self.settings.num_leapfrog

    def pilot_cost(self, num_temperatures: int) -> int:
        """Gradients of a datapoint's pilot."""
        return POINTS * self.cost(num_temperatures + WARM_UP)

    def _move(self, positions: Tensor) -> Rotation:
        return Rotation(self.start.at(positions), self.slots.at(positions), self.settings.num_leapfrog)

    def _noise(self, purpose: str, width: int) -> Noise:
        joint, first = self.slots.evaluator.joint, self.slots.block.start
        columns = Chunk(first, first + width)
        return self._run.stream(f"escalation {purpose}").noise(columns, dtype=joint.dtype, device=joint.device)
