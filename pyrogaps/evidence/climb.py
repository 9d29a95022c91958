"""One block of datapoints on the ladder: pilots decide, fresh draws are used in the estimate."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.capture import GradientEvaluator
from pyrogaps.density.draws import Posterior
from pyrogaps.evidence.importance import FromGaussian, FromGuide, Proposal, excess, trusted, weigh
from pyrogaps.evidence.ladder_settings import LadderSettings
from pyrogaps.evidence.plan import FIRST_AIS, GAUSSIAN, GUIDE, TIMES, Plan
from pyrogaps.evidence.rungs import Annealer
from pyrogaps.evidence.slots import POINTS, Slots
from pyrogaps.gaussians import gaussian_by_curvature, gaussian_of
from pyrogaps.run import Run
from pyrogaps.streams import PARTICLE_BLOCK, Chunk

# On the scales of a Gaussian that has a guide's moments, because a mean-field guide is narrower than the posterior.
WIDEN_MOMENTS = 1.2


@dataclass(frozen=True)
class Climbed:
    """What was measured of the datapoints of a block.

    Attributes:
        log_weights: as many for each as it needed.
        method: how they were drawn, as in `METHODS`.
        num_temperatures: of the AIS run, 0 for importance sampling.
        evaluations: of log p(x, z) and its gradient, pilots included.
        acceptance: of AIS, NaN for importance sampling.
    """

    log_weights: list[Tensor]
    method: Tensor
    num_temperatures: Tensor
    evaluations: Tensor
    acceptance: Tensor


def climb(
    evaluator: GradientEvaluator,
    posterior: Posterior,
    chunk: Chunk,
    settings: LadderSettings,
    run: Run,
    lowest: int = GUIDE,
) -> list[Climbed]:
    """Measure every block of a chunk; `posterior` is its refined guide. Rungs below `lowest` are not trusted."""
    return [Climb(evaluator, posterior, block, settings, run, lowest).climbed() for block in chunk.blocks()]


class Climb:
    """The ladder for a block of at most 64 datapoints, rung by rung; `climbed` goes all the way.

    `posterior` is the refined guide. Rungs below `lowest` are not trusted.
    """

    def __init__(
        self,
        evaluator: GradientEvaluator,
        posterior: Posterior,
        block: Chunk,
        settings: LadderSettings,
        run: Run,
        lowest: int = GUIDE,
    ) -> None:
        self.evaluator, self.joint, self.posterior = evaluator, evaluator.joint, posterior
        self.block, self.settings, self.run, self.lowest = block, settings, run, lowest
        self.plan = Plan(len(block), settings, lowest)
        self.proposals: list[Proposal] = [FromGuide(self.joint, posterior, block, run)]
        self.annealer: Annealer | None = None
        self.steps: dict[int, Tensor] = {}

    def climbed(self) -> Climbed:
        """Pilots choose the rungs; then fresh draws are made for the estimate."""
        self._sample(GUIDE, torch.arange(len(self.block)))
        if len(self.plan.open):
            self._fit_gaussian()
            self._pilot_ais()
        self.plan.close()
        return self._measure()

    def _sample(self, rung: int, positions: Tensor) -> Tensor:
        """The pilot of an importance sampling rung: the relative variance of its weights, `(M,)`."""
        units = -(-self.settings.num_pilot_draws // PARTICLE_BLOCK)
        numbers = torch.full((len(positions),), units * PARTICLE_BLOCK)
        columns = weigh(self.proposals[rung], self.block, positions, numbers, f"escalation pilot {rung}")
        log_weights = torch.stack(columns, 1)
        self.plan.evaluations[positions] += numbers
        varies = excess(log_weights).cpu()
        self.plan.note(rung, positions, varies, trusted(log_weights, self.settings))
        return varies

    def _fit_gaussian(self) -> None:
        """Fit a Gaussian to each open datapoint: by curvature where that proposes better than the guide's moments."""
        positions, settings, plan = self.plan.open, self.settings, self.plan
        slots = Slots(self.evaluator, self.block)
        moments = gaussian_of(self.joint, self.posterior, self.block, self.run.stream("anchor"))
        start = moments.widened(WIDEN_MOMENTS)
        if self.joint.dim <= settings.max_curvature_dim:

            def gradients(subset: Tensor, points: Tensor) -> Tensor:
                return slots.gradients(positions[subset], points)

            fitted, cost = gaussian_by_curvature(moments.at(positions), gradients)
            plan.evaluations[positions] += cost
            fitted = fitted.widened(settings.widen)
            with_curvature = start.with_replaced(positions, fitted)
            self.proposals.append(FromGaussian(self.joint, with_curvature, self.block, self.run))
            before = plan.excess[positions]
            better = (self._sample(GAUSSIAN, positions) < before).nonzero()[:, 0]
            start = start.with_replaced(positions[better], fitted.at(better))
        self.annealer = Annealer(slots, start, settings, self.run)

    def _pilot_ais(self) -> None:
        """The pilots of the AIS rungs, until every datapoint has one that can be trusted."""
        assert self.annealer is not None
        plan, temperatures = self.plan, self.settings.temperatures
        needed = torch.zeros(len(self.block), dtype=torch.float64)  # temperatures
        for rung, number in enumerate(temperatures, FIRST_AIS):
            last = rung + 1 == FIRST_AIS + len(temperatures)
            positions = plan.open
            positions = positions[(needed[positions] <= number) | last]
            cost = self.annealer.pilot_cost(number)
            if rung < self.lowest or not len(positions):
                continue
            if not plan.affords(cost * len(positions)):
                break
            piloted = self.annealer.pilot(positions, number)
            plan.evaluations[positions] += cost
            self.steps[rung] = torch.ones(number, len(self.block), dtype=torch.float64, device=self.joint.device)
            self.steps[rung][:, positions] = piloted.steps
            variance = piloted.log_variance.cpu()
            plan.note_chains(rung, positions, variance)
            # The variance of log w falls as 1 / T: rungs that would not reach it are skipped.
            needed[positions] = number * variance / self.settings.max_log_variance / 2

    def _measure(self) -> Climbed:
        """The draws of the estimate, at the rung of each datapoint."""
        plan = self.plan
        lengths = self._lengths()
        costs = torch.full((len(self.block),), PARTICLE_BLOCK)
        if self.annealer is not None:
            costs = torch.where(lengths > 0, POINTS * self.annealer.cost(lengths), costs)
        units = plan.units(costs)
        log_weights: list[Tensor] = [torch.empty(0)] * len(self.block)
        acceptance = torch.full((len(self.block),), torch.nan, dtype=torch.float64)
        for rung in plan.rung.unique().tolist():
            positions = (plan.rung == rung).nonzero()[:, 0]
            if rung < FIRST_AIS:
                numbers = units[positions] * PARTICLE_BLOCK
                weights = weigh(self.proposals[rung], self.block, positions, numbers, f"escalation {rung}")
            else:
                assert self.annealer is not None
                steps = self.steps[rung][:, positions].repeat_interleave(TIMES, 0)
                weights, rates = self.annealer.run(positions, units[positions], steps)
                acceptance[positions] = rates.cpu()
            for position, column in zip(positions.tolist(), weights, strict=True):
                log_weights[position] = column
        return Climbed(
            log_weights,
            torch.minimum(plan.rung, torch.tensor(FIRST_AIS)),
            lengths,
            plan.evaluations + units * costs,
            acceptance,
        )

    def _lengths(self) -> Tensor:
        """Temperatures of each datapoint's run, 0 for importance sampling."""
        of_rung = torch.tensor([0, 0, *self.settings.temperatures])
        return TIMES * of_rung[self.plan.rung]
