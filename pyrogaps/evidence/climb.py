"""One block of datapoints on the ladder: pilots decide, fresh draws are used in the estimate."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.capture import GradientEvaluator
from pyrogaps.capture.slots import Slots
from pyrogaps.evidence.importance import Sampler, pilot_sampling
from pyrogaps.evidence.ladder_settings import LadderSettings
from pyrogaps.evidence.rungs import Annealer
from pyrogaps.gaussians import Curvature
from pyrogaps.run import Run
from pyrogaps.streams import PARTICLE_BLOCK, Chunk

SAMPLING, ANNEALING = 0, 1
# As many more draws as the pilot asks for, because its variance is itself uncertain.
MARGIN = 1.4
# The run that counts has up to this many times as many temperatures as its pilot. The variance of log w falls a little
# slower than 1 / T.
MOST_TIMES, DECAY = 8, 0.85
# Fewer draws than this say too little of their own tail.
MIN_SAMPLES = 512


@dataclass(frozen=True)
class Climbed:
    """What was measured of the datapoints of a block.

    Attributes:
        log_weights: as many for each as it needed.
        method: how they were drawn, as in `METHODS`.
        num_temperatures: of the AIS run, 0 for importance sampling.
        evaluations: of log p(x, z) and its gradient, pilots and the anchor included.
        acceptance: of AIS, NaN for importance sampling.
    """

    log_weights: list[Tensor]
    method: Tensor
    num_temperatures: Tensor
    evaluations: Tensor
    acceptance: Tensor


class Climb:
    """The ladder for a block of at most 64 datapoints, rung by rung; `climbed` goes all the way."""

    def __init__(
        self, evaluator: GradientEvaluator, anchor: Curvature, block: Chunk, settings: LadderSettings, run: Run
    ) -> None:
        number, slots, start = len(block), Slots(evaluator, block), anchor.gaussian.widened(settings.widen)
        self.settings, self.anchor = settings, anchor
        self.sampler, self.annealer = Sampler(slots, start, run), Annealer(slots, start, settings, run)
        self.evaluations = torch.full((number,), anchor.num_gradients)
        # Decisions: draws of importance sampling, 0 where there is none; temperatures of AIS, and their pilot's number.
        self.draws = torch.zeros(number, dtype=torch.long)
        self.temperatures = torch.zeros(number, dtype=torch.long)
        self.pilots = torch.zeros(number, dtype=torch.long)
        self.steps: dict[int, Tensor] = {}

    def climbed(self) -> Climbed:
        """Pilots decide on the rungs; then fresh draws are made for the estimate."""
        self._pilot_sampling()
        self._pilot_annealing()
        return self._measured()

    def _pilot_sampling(self) -> None:
        candidates = (~self.anchor.cut).nonzero()[:, 0].cpu()
        if not len(candidates):
            return
        settings = self.settings
        sampled, varies, cost = pilot_sampling(self.sampler, candidates, settings)
        self.evaluations[candidates] += cost
        needed = MARGIN * varies / settings.tolerance**2
        units = (needed.clamp(min=MIN_SAMPLES, max=settings.max_evaluations) / PARTICLE_BLOCK).ceil().long()
        self.draws[sampled] = units * PARTICLE_BLOCK

    def _pilot_annealing(self) -> None:
        """The pilots of AIS, longer and longer, until a run of `MOST_TIMES` as many temperatures will do."""
        settings, open_ = self.settings, (self.draws == 0).nonzero()[:, 0]
        target = math.log1p(settings.num_chains * settings.tolerance**2 / MARGIN)
        for rung, number in enumerate(settings.temperatures):
            if not len(open_):
                break
            piloted = self.annealer.pilot(open_, number)
            self.evaluations[open_] += self.annealer.pilot_cost(number)
            steps = torch.ones(number, len(self.draws), dtype=torch.float64, device=piloted.steps.device)
            steps[:, open_] = piloted.steps
            self.steps[rung], self.pilots[open_] = steps, rung
            # Whole powers of two, so that many datapoints run together.
            times = (piloted.log_variance / target).pow(1 / DECAY).clamp(min=1.0, max=1e6).log2().ceil().exp2()
            self.temperatures[open_] = number * times.clamp(max=MOST_TIMES).long()
            last = rung + 1 == len(settings.temperatures)
            further = times > MOST_TIMES
            if not last:
                longer = settings.temperatures[rung + 1]
                least = self.annealer.pilot_cost(longer) + settings.num_chains * self.annealer.cost(longer)
                further = further & (self.evaluations[open_] + least <= settings.max_evaluations)
            open_ = open_[further] if not last else open_[:0]
        self._within_budget()

    def _within_budget(self) -> None:
        """Halve the temperatures of datapoints that would cost more than they may, down to their pilot's."""
        least = torch.tensor(self.settings.temperatures)[self.pilots]
        for _ in range(int(math.log2(MOST_TIMES))):
            cost = self.settings.num_chains * self.annealer.cost(1) * self.temperatures
            dear = (self.evaluations + cost > self.settings.max_evaluations) & (self.temperatures >= 2 * least)
            self.temperatures[dear] //= 2

    def _measured(self) -> Climbed:
        number = len(self.draws)
        log_weights: list[Tensor] = [torch.empty(0)] * number
        acceptance = torch.full((number,), torch.nan, dtype=torch.float64)
        for positions, weights, rates in (*self._sampled(), *self._annealed()):
            acceptance[positions] = rates
            for position, column in zip(positions.tolist(), weights.T, strict=True):
                log_weights[position] = column
        method = torch.where(self.draws > 0, SAMPLING, ANNEALING)
        return Climbed(log_weights, method, self.temperatures, self.evaluations, acceptance)

    def _sampled(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for draws in self.draws[self.draws > 0].unique().tolist():
            positions = (self.draws == draws).nonzero()[:, 0]
            self.evaluations[positions] += draws
            unknown = torch.full((len(positions),), torch.nan, dtype=torch.float64)
            yield positions, self.sampler.log_weights(positions, draws, f"sample {draws}"), unknown

    def _annealed(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for rung, length in sorted(
            {pair for pair in zip(self.pilots.tolist(), self.temperatures.tolist(), strict=True) if pair[1]}
        ):
            positions = ((self.pilots == rung) & (self.temperatures == length)).nonzero()[:, 0]
            times = length // self.settings.temperatures[rung]
            steps = self.steps[rung][:, positions].repeat_interleave(times, 0)
            ran = self.annealer.anneal(positions, self.settings.num_chains, steps)
            self.evaluations[positions] += len(ran.log_weights) * self.annealer.cost(length)
            yield positions, ran.log_weights, ran.acceptance
