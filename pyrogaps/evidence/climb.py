"""One block of datapoints on the ladder: pilots decide, fresh draws are used in the estimate."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
from torch import Tensor

from pyrogaps.capture.slots import Slots
from pyrogaps.evidence.importance import Sampler, pilot_sampling
from pyrogaps.evidence.ladder_settings import LadderSettings
from pyrogaps.evidence.rungs import Annealer
from pyrogaps.evidence.tails import vouched
from pyrogaps.gaussians import Curvature
from pyrogaps.log_weights import rounding_error, that_count
from pyrogaps.run import Run
from pyrogaps.streams import PARTICLE_BLOCK
from pyrogaps.two_sided import MAX_FRESH, TwoSided, two_sided

SAMPLING, ANNEALING = 0, 1
# Of what was measured of each datapoint: the method as in `METHODS`; temperatures of AIS, 0 for importance sampling;
# evaluations of log p(x, z) and its gradient, pilots and the anchor included; the acceptance rate of AIS; the upper
# bound and its error; what `Estimate` calls `vouched` and `rounding`.
COLUMNS = ("method", "temperatures", "evaluations", "acceptance", "upper", "upper_mcse", "vouched", "rounding")
# As many more draws as the pilot asks for, because its variance is itself uncertain.
MARGIN = 1.5
# How many times as many temperatures as its pilot the run that counts may have: few numbers, so that many datapoints
# run together. The variance of log w falls a little slower than 1 / T.
TIMES, DECAY = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0), 0.85
# Fewer draws than this say too little of their own tail.
MIN_SAMPLES = 512

# Posteriors have heavier tails than Gaussians: draws from one that is wider by this factor have weights of a finite
# third moment where tails are exponential. In many dimensions that costs too much; there it is about so many nats of
# variance in log w.
WIDEST, NATS = 1.4, 0.6


def widening(dim: int) -> float:
    """The factor on the scales of the anchor."""
    return min(WIDEST, 1 + math.sqrt(NATS / dim))


@dataclass(frozen=True)
class Climbed:
    """What was measured of the datapoints of a block.

    Attributes:
        log_weights: as many for each as it needed.
        columns: `(B,)` each, see `COLUMNS`.
    """

    log_weights: list[Tensor]
    columns: dict[str, Tensor]


@dataclass(frozen=True)
class Drawn:
    """Log-weights `(S, M)` for the datapoints at `positions` `(M,)` of a block, with what is known about them.

    Attributes:
        more: fresh log-weights `(number, K)` for some places `(K,)` among the M, under a name of the call's own.
        cost: evaluations of one draw.
        acceptance: `(M,)`, of AIS; NaN for importance sampling.
        name: of their streams.
    """

    positions: Tensor
    log_weights: Tensor
    more: Callable[[Tensor, int, str], Tensor]
    cost: int
    acceptance: Tensor
    name: str


class Climb:
    """The ladder for a block of at most 64 datapoints, rung by rung; `climbed` goes all the way."""

    def __init__(self, slots: Slots, anchor: Curvature, settings: LadderSettings, run: Run) -> None:
        number = len(slots.block)
        start = anchor.gaussian.widened(widening(slots.dim))
        self.settings, self.anchor = settings, anchor
        self.sampler, self.annealer = Sampler(slots, start, run), Annealer(slots, start, settings, run)
        self.evaluations = anchor.num_gradients.clone()
        # Decisions: draws of importance sampling, 0 where there is none; temperatures of AIS, and their pilot's number.
        self.draws = torch.zeros(number, dtype=torch.long)
        self.temperatures = torch.zeros(number, dtype=torch.long)
        self.pilots = torch.zeros(number, dtype=torch.long)
        self.steps: dict[int, Tensor] = {}
        self.vouched, cost = vouched(slots, anchor)
        self.evaluations += cost

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
        needed = (MARGIN * varies / settings.tolerance**2).clamp(min=MIN_SAMPLES)
        needed = needed.minimum(settings.max_evaluations - self.evaluations[sampled]).clamp(min=PARTICLE_BLOCK)
        self.draws[sampled] = (needed / PARTICLE_BLOCK).floor().long() * PARTICLE_BLOCK

    def _pilot_annealing(self) -> None:
        """The pilots of AIS, longer and longer, until a run of a few times as many temperatures will do."""
        settings, open_ = self.settings, (self.draws == 0).nonzero()[:, 0]
        for rung, number in enumerate(settings.temperatures):
            if not len(open_):
                break
            piloted = self.annealer.pilot(open_, number)
            self.evaluations[open_] += self.annealer.pilot_cost(number)
            steps = torch.ones(number, len(self.draws), dtype=torch.float64, device=piloted.steps.device)
            steps[:, open_] = piloted.steps
            self.steps[rung], self.pilots[open_] = steps, rung
            wanted = number * (piloted.log_variance / self._target).pow(1 / DECAY)
            lengths = torch.tensor([round(number * times) for times in TIMES])
            left = settings.max_evaluations - self.evaluations[open_]
            affordable = (self._cost(lengths) <= left[:, None]).sum(1) - 1
            chosen = torch.searchsorted(lengths[:-1].double(), wanted).minimum(affordable).clamp(min=0)
            self.temperatures[open_] = lengths[chosen]
            if rung + 1 < len(settings.temperatures):
                longer = settings.temperatures[rung + 1]
                least = self.annealer.pilot_cost(longer) + self._cost(torch.tensor(longer))
                open_ = open_[(wanted > lengths[-1]) & (least <= left)]

    @property
    def _target(self) -> float:
        """The variance of log w at which the chains reach the tolerance, if it is normal."""
        return math.log1p(self.settings.num_chains * self.settings.tolerance**2 / MARGIN)

    def _cost(self, num_temperatures: Tensor) -> Tensor:
        """Gradients of the run that counts, of a datapoint."""
        return self.settings.num_chains * self.annealer.cost(num_temperatures)

    def _measured(self) -> Climbed:
        number = len(self.draws)
        log_weights: list[Tensor] = [torch.empty(0)] * number
        columns = {name: torch.zeros(number, dtype=torch.float64) for name in COLUMNS}
        for drawn in (*self._sampled(), *self._annealed()):
            positions = drawn.positions
            bounds = self._bounds(drawn)
            self.evaluations[positions] += drawn.cost * (len(drawn.log_weights) + bounds.num_fresh.cpu())
            columns["upper"][positions], columns["upper_mcse"][positions] = bounds.upper.cpu(), bounds.upper_mcse.cpu()
            columns["rounding"][positions] = self._rounding(drawn)
            columns["acceptance"][positions] = drawn.acceptance
            for position, column in zip(positions.tolist(), drawn.log_weights.T, strict=True):
                log_weights[position] = column
        columns["method"] = torch.where(self.draws > 0, SAMPLING, ANNEALING)
        columns["temperatures"], columns["evaluations"] = self.temperatures, self.evaluations
        columns["vouched"] = self.vouched
        return Climbed(log_weights, columns)

    def _bounds(self, drawn: Drawn) -> TwoSided:
        """Bounds from these weights, and from fresh ones of the same run where they do not suffice."""
        calls, stream = count(), self.sampler.run.stream(f"ladder bounds {drawn.name}")
        noise = self.sampler.slots.noise(stream, len(drawn.positions), torch.float64)

        def more(places: Tensor, number: int) -> Tensor:
            return drawn.more(places.cpu(), number, f"fresh {next(calls)} {drawn.name}")

        most = min(MAX_FRESH * len(drawn.log_weights), self.settings.max_evaluations // drawn.cost)
        return two_sided(drawn.log_weights, noise.uniform, more, max_fresh=most)

    def _rounding(self, drawn: Drawn) -> Tensor:
        """The rounding error of log p(x, z) - log q(z), in the precision that they are computed in."""
        start = self.sampler.start
        weights = that_count(drawn.log_weights).to(start.loc.dtype)
        return rounding_error(weights, start.peak[drawn.positions][None]).cpu()

    def _sampled(self) -> Iterator[Drawn]:
        for number in self.draws[self.draws > 0].unique().tolist():
            positions, name = (self.draws == number).nonzero()[:, 0], f"sample {number}"
            weights = self.sampler.log_weights(positions, number, name)
            unknown = torch.full((len(positions),), torch.nan, dtype=torch.float64)
            yield Drawn(positions, weights, partial(self._more_samples, positions), 1, unknown, name)

    def _more_samples(self, positions: Tensor, places: Tensor, number: int, purpose: str) -> Tensor:
        return self.sampler.log_weights(positions[places], number, purpose)

    def _annealed(self) -> Iterator[Drawn]:
        for rung, length in sorted(
            {pair for pair in zip(self.pilots.tolist(), self.temperatures.tolist(), strict=True) if pair[1]}
        ):
            positions = ((self.pilots == rung) & (self.temperatures == length)).nonzero()[:, 0]
            name, number = f"run {rung} {length}", self.settings.num_chains
            # Along the same path, the step lengths of the pilot's nearest temperature.
            nearest = torch.arange(length) * self.settings.temperatures[rung] // length
            steps = self.steps[rung][:, positions][nearest]
            ran = self.annealer.anneal(positions, number, steps, name)
            more, cost = partial(self._more_chains, positions, steps), self.annealer.cost(length)
            yield Drawn(positions, ran.log_weights, more, cost, ran.acceptance, name)

    def _more_chains(self, positions: Tensor, steps: Tensor, places: Tensor, number: int, purpose: str) -> Tensor:
        return self.annealer.anneal(positions[places], number, steps[:, places], purpose).log_weights[:number]
