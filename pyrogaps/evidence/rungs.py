"""The further rungs of the ladder: AIS from the anchor by rotations, its pilots and the run that counts."""

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pyrogaps.annealing.loop import WARM_UP, AdaptedStepSizes, StepSizes, anneal, pilot, schedule
from pyrogaps.annealing.rotations import Rotation
from pyrogaps.bounds import refuse_nan
from pyrogaps.capture.slots import POINTS, Slots, of_datapoints
from pyrogaps.evidence.ladder_settings import LadderSettings
from pyrogaps.gaussians import Gaussian
from pyrogaps.run import Run
from pyrogaps.streams import Noise

Count = TypeVar("Count", int, Tensor)


class Piloted(NamedTuple):
    """What a pilot says of M datapoints: Var[log w] over its chains `(M,)` and step lengths `(T, M)`."""

    log_variance: Tensor
    steps: Tensor


class Annealed(NamedTuple):
    """A run for M datapoints: log-weights `(S, M)`, where its chains ended `(S, M, dim)`, acceptance rates `(M,)`."""

    log_weights: Tensor
    ends: Tensor
    acceptance: Tensor


@dataclass(frozen=True)
class Annealer:
    """AIS for the datapoints of a block from the Gaussians `start`, by rotations."""

    slots: Slots
    start: Gaussian
    settings: LadderSettings
    run: Run

    def pilot(self, positions: Tensor, num_temperatures: int) -> Piloted:
        """A pilot of `POINTS` chains for each of the datapoints at `positions` of the block."""
        betas, variances, lengths = schedule("linear", num_temperatures), [], []
        for number, (batch, kept) in enumerate(self.slots.batches(positions)):
            noise, move = self._noise(f"pilot {num_temperatures} {number}", len(batch)), self._move(batch)
            state = move.start_at(noise.normal(POINTS, self.slots.dim))
            steps = AdaptedStepSizes(move.adaptation, self.settings.target_acceptance, state.position)
            path = [(steps.current, reached.log_weights) for reached in pilot(move, state, betas, steps, noise)]
            variances.append(path[-1][1].var(0)[:kept])
            lengths.append(torch.stack([length for length, _ in path])[:, :kept])
        # A chain that left the support, or a value that is not finite, is as bad as can be.
        return Piloted(torch.nan_to_num(torch.cat(variances), nan=torch.inf).cpu(), torch.cat(lengths, 1))

    def anneal(self, positions: Tensor, num_chains: int, steps: Tensor, purpose: str) -> Annealed:
        """A run that counts, for the datapoints at `positions`, by step lengths `steps` `(T, M)` of a pilot.

        The number of chains is rounded up to whole slots.
        """
        betas, each = schedule("linear", len(steps)), -(-num_chains // POINTS)
        owners, parts = torch.arange(len(positions)).repeat_interleave(each), []
        for number, (owner, kept) in enumerate(self.slots.batches(owners)):
            noise, move = self._noise(f"{purpose} {len(steps)} {number}", len(owner)), self._move(positions[owner])
            state = move.start_at(noise.normal(POINTS, self.slots.dim))
            rates = []
            for reached in anneal(move, state, betas, StepSizes(steps[:, owner]), noise):
                rates.append(reached.acceptance.double().mean(0))
            indices = self.slots.block.indices[positions[owner[:kept]]]
            weights = refuse_nan(reached.log_weights[:, :kept], indices)
            parts.append((weights, move.points(reached.state)[:, :kept], torch.stack(rates).mean(0)[:kept]))
        weights, ends, acceptance = (
            torch.cat(columns, -1 if k != 1 else 1) for k, columns in enumerate(zip(*parts, strict=True))
        )
        return Annealed(
            of_datapoints(weights, each),
            of_datapoints(ends, each),
            acceptance.unflatten(0, (-1, each)).mean(1).cpu(),
        )

    def cost(self, num_temperatures: Count) -> Count:
        """Gradients of one chain."""
        return 1 + num_temperatures * self.settings.num_leapfrog

    def pilot_cost(self, num_temperatures: int) -> int:
        """Gradients of a datapoint's pilot."""
        return POINTS * self.cost(num_temperatures + WARM_UP)

    def _move(self, positions: Tensor) -> Rotation:
        return Rotation(self.start.at(positions), self.slots.at(positions), self.settings.num_leapfrog)

    def _noise(self, purpose: str, width: int) -> Noise:
        return self.slots.noise(self.run.stream(f"ladder {purpose}"), width, self.start.loc.dtype)
