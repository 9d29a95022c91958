"""One block of datapoints up the ladder: pilots decide, fresh draws count."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyrogaps.ais import anchor
from pyrogaps.anneal import GaussianStart
from pyrogaps.capture import GradientEvaluator
from pyrogaps.density.draws import Posterior
from pyrogaps.escalation.annealing import Annealer
from pyrogaps.escalation.curvature import gaussian_by_curvature
from pyrogaps.escalation.importance import FromGaussian, FromGuide, Proposal, excess, trusted, weigh
from pyrogaps.escalation.plan import FIRST_AIS, GAUSSIAN, GUIDE, TIMES, Plan
from pyrogaps.escalation.settings import Escalation
from pyrogaps.escalation.slots import POINTS, Slots
from pyrogaps.streams import PARTICLE_BLOCK, Chunk

# On the scales of a Gaussian that has a guide's moments: a mean-field guide is narrower than the posterior.
WIDEN_MOMENTS = 1.2


@dataclass(frozen=True)
class Found:
    """What is known of a block at the end, an entry a datapoint: log-weights, each as many as it needed; the method
    they are of, as in `METHODS`; temperatures of the AIS run, 0 for importance sampling; evaluations spent, pilots
    included; acceptance rates, NaN for importance sampling.
    """

    log_weights: list[Tensor]
    method: Tensor
    num_temperatures: Tensor
    evaluations: Tensor
    acceptance: Tensor


def climb_chunk(
    evaluator: GradientEvaluator,
    posterior: Posterior,
    chunk: Chunk,
    settings: Escalation,
    seed: int,
    lowest: int = GUIDE,
) -> list[Found]:
    """Every block of a chunk up the ladder; `posterior` is its refined guide."""
    return [Climb(evaluator, posterior, block, settings, seed, lowest).found() for block in chunk.blocks()]


class Climb:
    """The ladder for a block of at most 64 datapoints, rung by rung; `found` goes all the way.

    `posterior` is the refined guide; rungs below `lowest` are not trusted.
    """

    def __init__(
        self,
        evaluator: GradientEvaluator,
        posterior: Posterior,
        block: Chunk,
        settings: Escalation,
        seed: int,
        lowest: int = GUIDE,
    ) -> None:
        self.evaluator, self.joint, self.posterior = evaluator, evaluator.joint, posterior
        self.block, self.settings, self.seed, self.lowest = block, settings, seed, lowest
        self.plan = Plan(len(block), settings, lowest)
        self.proposals: list[Proposal] = [FromGuide(self.joint, posterior, block, seed)]
        self.annealer: Annealer | None = None
        self.steps: dict[int, Tensor] = {}

    def found(self) -> Found:
        """Pilots up the ladder, then the draws that count."""
        self._sample(GUIDE, torch.arange(len(self.block)))
        if len(self.plan.open):
            self._fit_gaussian()
            self._scout()
        self.plan.close()
        return self._measure()

    def _sample(self, rung: int, members: Tensor) -> Tensor:
        """The pilot of an importance sampling rung: the relative variance of its weights, `(M,)`."""
        units = -(-self.settings.num_pilot_draws // PARTICLE_BLOCK)
        numbers = torch.full((len(members),), units * PARTICLE_BLOCK)
        columns = weigh(self.proposals[rung], self.block, members, numbers, f"escalation pilot {rung}")
        log_weights = torch.stack(columns, 1)
        self.plan.evaluations[members] += numbers
        varies = excess(log_weights).cpu()
        self.plan.note(rung, members, varies, trusted(log_weights, self.settings))
        return varies

    def _fit_gaussian(self) -> None:
        """A Gaussian for each open datapoint: its curvature, where that is a better proposal than the guide."""
        members, settings, plan = self.plan.open, self.settings, self.plan
        slots = Slots(self.evaluator, self.block)
        moments = anchor(self.joint, self.posterior, self.block, 1.0, self.seed)
        start = replace(moments, scale=WIDEN_MOMENTS * moments.scale)
        if self.joint.dim <= settings.max_curvature_dim:
            fitted, cost = gaussian_by_curvature(moments.at(members), slots, members)
            plan.evaluations[members] += cost
            fitted = replace(fitted, scale=settings.widen * fitted.scale)
            with_curvature = _put(start, members, fitted)
            self.proposals.append(FromGaussian(self.joint, with_curvature, self.block, self.seed))
            before = plan.excess[members]
            start = _put(start, members, fitted, self._sample(GAUSSIAN, members) < before)
        self.annealer = Annealer(slots, start, settings, self.seed)

    def _scout(self) -> None:
        """The pilots of the AIS rungs, until there is one for every datapoint that can be trusted."""
        assert self.annealer is not None
        plan, temperatures = self.plan, self.settings.temperatures
        wanted = torch.zeros(len(self.block), dtype=torch.float64)  # temperatures
        for rung, number in enumerate(temperatures, FIRST_AIS):
            last = rung + 1 == FIRST_AIS + len(temperatures)
            members = plan.open
            members = members[(wanted[members] <= number) | last]
            cost = self.annealer.scouting_cost(number)
            if rung < self.lowest or not len(members):
                continue
            if not plan.affords(cost * len(members)):
                break
            scouted = self.annealer.scout(members, number)
            plan.evaluations[members] += cost
            self.steps[rung] = torch.ones(number, len(self.block), dtype=torch.float64, device=self.joint.device)
            self.steps[rung][:, members] = scouted.steps
            variance = scouted.log_variance.cpu()
            plan.note_chains(rung, members, variance)
            # The variance of log w falls as 1 / T: a rung that would not do either is passed over.
            wanted[members] = number * variance / self.settings.max_log_variance / 2

    def _measure(self) -> Found:
        """The draws that count, at each datapoint's rung."""
        plan = self.plan
        lengths = self._lengths()
        costs = torch.full((len(self.block),), PARTICLE_BLOCK)
        if self.annealer is not None:
            costs = torch.where(lengths > 0, POINTS * self.annealer.cost(lengths), costs)
        units = plan.units(costs)
        log_weights: list[Tensor] = [torch.empty(0)] * len(self.block)
        acceptance = torch.full((len(self.block),), torch.nan, dtype=torch.float64)
        for rung in plan.rung.unique().tolist():
            members = (plan.rung == rung).nonzero()[:, 0]
            if rung < FIRST_AIS:
                numbers = units[members] * PARTICLE_BLOCK
                found = weigh(self.proposals[rung], self.block, members, numbers, f"escalation {rung}")
            else:
                assert self.annealer is not None
                steps = self.steps[rung][:, members].repeat_interleave(TIMES, 0)
                found, rates = self.annealer.run(members, units[members], steps)
                acceptance[members] = rates.cpu()
            for place, weights in zip(members.tolist(), found, strict=True):
                log_weights[place] = weights
        return Found(
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


def _put(start: GaussianStart, members: Tensor, fitted: GaussianStart, where: Tensor | None = None) -> GaussianStart:
    """`start` with the Gaussians `fitted` at places `members`, or only at those of them `where`."""
    loc, scale = start.loc.clone(), start.factor()
    chosen = slice(None) if where is None else where
    loc[members[chosen]], scale[members[chosen]] = fitted.loc[chosen], fitted.scale[chosen]
    return replace(start, loc=loc, scale=scale)
