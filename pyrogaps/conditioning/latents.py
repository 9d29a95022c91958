"""Draws of the latents given what is shown, p(z | C)."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyrogaps.capture import GradientEvaluator, Mode
from pyrogaps.density import JointDensity
from pyrogaps.evidence.ais import AIS, AISRun, run_path, run_pilot
from pyrogaps.evidence.paths import Path, anchored_path, prior_path
from pyrogaps.gaussians import gaussian_of
from pyrogaps.log_weights import effective_sample_size, log_mean_exp, mcse_of_log_mean_exp
from pyrogaps.refine import Refinement, Refiner
from pyrogaps.refine.families import Start
from pyrogaps.run import Run
from pyrogaps.streams import BLOCK, Chunk

# The share of the chains that have to count.
MIN_EFFECTIVE_SHARE = 1 / 8


@dataclass(frozen=True)
class LatentsGiven:
    """AIS with resampling, in the density of what is shown.

    Two runs are made, one from the prior and one anchored at a refined mean-field Normal. The second is far better
    where much is shown. Where little is shown, p(z | C) may have several modes: an anchor in one of them may never
    visit the others, and its estimate of log p(C) then misses their mass without a sign of it. So the run from the
    prior is taken for every datapoint, unless too few of its draws count or its estimate, a lower bound in expectation
    like the other's, is significantly lower. `AIS(initial="prior")` makes that run alone.
    """

    partial: JointDensity
    settings: AIS
    refinement: Refinement
    mode: Mode

    def draw(self, block: Chunk, start: Start, number: int, run: Run) -> tuple[Tensor, Tensor]:
        """`z` `(number, B, dim)`, and how many independent draws they amount to, `(B,)`; `start` is the anchor's."""
        settings = replace(self.settings, num_chains=number)
        runs = [self._from_prior(block, settings, run.derived("prior run"))]
        if settings.initial != "prior":
            runs.append(self._anchored(block, start, settings, run))
        best = _anchored_is_better(*runs) if len(runs) > 1 else torch.zeros(len(block), dtype=torch.long)
        best = best.to(runs[0].log_weights.device)
        columns = torch.arange(len(block), device=best.device)
        log_weights = torch.stack([ran.log_weights for ran in runs])[best, :, columns].T
        position = torch.stack([ran.position for ran in runs], 2)[:, columns, best]
        run.stream("resample").reseed(block.start // BLOCK)
        which = systematic(log_weights, number).to(position.device)
        return position[which, columns.to(position.device)], effective_sample_size(log_weights)

    def _anchored(self, block: Chunk, start: Start, settings: AIS, run: Run) -> AISRun:
        evaluator = self._evaluator
        refined, _ = Refiner(AutoNormal, self.refinement)(evaluator, block, run, "shown part", start)
        fitted = gaussian_of(self.partial, refined, block, run.stream("anchor"))
        return _ran(anchored_path(evaluator, fitted.widened(settings.widen), block), block, settings, run)

    def _from_prior(self, block: Chunk, settings: AIS, run: Run) -> AISRun:
        return _ran(prior_path(self._split_evaluator, block, run.stream("scale prior")), block, settings, run)

    @cached_property
    def _evaluator(self) -> GradientEvaluator:
        return GradientEvaluator(self.partial, self.mode)

    @cached_property
    def _split_evaluator(self) -> GradientEvaluator:
        return GradientEvaluator(self.partial, self.mode, split=True)


def _ran(path: Path, block: Chunk, settings: AIS, run: Run) -> AISRun:
    """All chains at once, because their final positions are needed."""
    tuning = run_pilot(path, block, settings, run)
    return run_path(path, tuning, block, settings, run, max_chains=settings.num_chains)


def _anchored_is_better(prior: AISRun, anchored: AISRun) -> Tensor:
    """1 where too few draws from the prior count or they miss what the anchored ones have, else 0: `(B,)`."""
    few = effective_sample_size(prior.log_weights) < MIN_EFFECTIVE_SHARE * len(prior.log_weights)
    gain = log_mean_exp(anchored.log_weights) - log_mean_exp(prior.log_weights)
    error = torch.hypot(mcse_of_log_mean_exp(anchored.log_weights), mcse_of_log_mean_exp(prior.log_weights))
    worse: Tensor = few | (gain > 2 * error)
    return worse.long()


def systematic(log_weights: Tensor, number: int) -> Tensor:
    """`number` particles of each column of `log_weights` `(S, B)`, systematic resampling in random order: `(K, B)`."""
    weights = (log_weights - log_weights.max(0).values).exp()
    cumulative = (weights / weights.sum(0)).cumsum(0)
    count = log_weights.shape[1]
    points = (torch.arange(number, dtype=torch.float64)[:, None] + torch.rand(1, count, dtype=torch.float64)) / number
    found = torch.searchsorted(cumulative.T.contiguous().cpu(), points.T.contiguous()).clamp(max=len(log_weights) - 1)
    order = torch.rand(count, number).argsort(1)
    return found.gather(1, order).T
