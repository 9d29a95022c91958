"""Draws from p(z | C), the posterior given the shown data."""

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

# The least effective sample size of the run from the prior, as a share of its chains.
MIN_EFFECTIVE_SHARE = 1 / 8


@dataclass(frozen=True)
class LatentsGiven:
    """AIS with resampling, for the density of the shown data.

    There are two runs, one from the prior and one anchored at a refined mean-field Normal. The anchored run is far
    better where much is shown. Where little is shown, p(z | C) may have several modes: chains anchored in one of them
    may never visit the others, and the estimate of log p(C) then misses their mass without any sign of it. A datapoint
    therefore uses the run from the prior, unless its effective sample size is too small or its estimate significantly
    lower than the anchored one (both are lower bounds in expectation). `AIS(initial="prior")` omits the anchored run.
    """

    partial: JointDensity
    settings: AIS
    refinement: Refinement
    mode: Mode

    def draw(self, block: Chunk, start: Start, number: int, run: Run) -> tuple[Tensor, Tensor]:
        """Draws `z` `(number, B, dim)` and their effective sample size `(B,)`; the anchor is refined from `start`.

        That is Kish's, with the number of copies of each chain as its weight: copies are not independent, and
        resampling copies some chains even where all weights are nearly alike.
        """
        settings = replace(self.settings, num_chains=number)
        runs = [self._from_prior(block, settings, run.derived("prior run"))]
        if settings.initial != "prior":
            runs.append(self._anchored(block, start, settings, run))
        best = _anchored_is_better(*runs) if len(runs) > 1 else torch.zeros(len(block), dtype=torch.long)
        best = best.to(runs[0].log_weights.device)
        columns = torch.arange(len(block), device=best.device)
        log_weights = torch.stack([result.log_weights for result in runs])[best, :, columns].T
        position = torch.stack([result.position for result in runs], 2)[:, columns, best]
        run.stream("resample").reseed(block.start // BLOCK)
        which = systematic(log_weights, number).to(position.device)
        return position[which, columns.to(position.device)], number_of_distinct(which).to(log_weights.device)

    def _anchored(self, block: Chunk, start: Start, settings: AIS, run: Run) -> AISRun:
        evaluator = self._evaluator
        refined, _ = Refiner(AutoNormal, self.refinement)(evaluator, block, run, "shown part", start)
        fitted = gaussian_of(self.partial, refined, block, run.stream("anchor"))
        return _run_ais(anchored_path(evaluator, fitted.widened(settings.widen), block), block, settings, run)

    def _from_prior(self, block: Chunk, settings: AIS, run: Run) -> AISRun:
        return _run_ais(prior_path(self._split_evaluator, block, run.stream("scale prior")), block, settings, run)

    @cached_property
    def _evaluator(self) -> GradientEvaluator:
        return GradientEvaluator(self.partial, self.mode)

    @cached_property
    def _split_evaluator(self) -> GradientEvaluator:
        return GradientEvaluator(self.partial, self.mode, split=True)


def _run_ais(path: Path, block: Chunk, settings: AIS, run: Run) -> AISRun:
    """Run all chains at once, because their final positions are needed."""
    tuning = run_pilot(path, block, settings, run)
    return run_path(path, tuning, block, settings, run, max_chains=settings.num_chains)


def _anchored_is_better(prior: AISRun, anchored: AISRun) -> Tensor:
    """1 where the prior's effective sample size is too small or its estimate too low, else 0: `(B,)`."""
    too_few = effective_sample_size(prior.log_weights) < MIN_EFFECTIVE_SHARE * len(prior.log_weights)
    gain = log_mean_exp(anchored.log_weights) - log_mean_exp(prior.log_weights)
    error = torch.hypot(mcse_of_log_mean_exp(anchored.log_weights), mcse_of_log_mean_exp(prior.log_weights))
    worse: Tensor = too_few | (gain > 2 * error)
    return worse.long()


def number_of_distinct(which: Tensor) -> Tensor:
    r"""Effective number of different indices in each column of `which` `(K, B)`, $K^2 / \sum_i n_i^2$: `(B,)`."""
    copies = torch.zeros(int(which.max()) + 1, which.shape[1], dtype=torch.float64, device=which.device)
    copies.scatter_add_(0, which, torch.ones_like(which, dtype=torch.float64))
    return len(which) ** 2 / copies.square().sum(0)


def systematic(log_weights: Tensor, number: int) -> Tensor:
    """`number` particles of each column of `log_weights` `(S, B)`, systematic resampling in random order: `(K, B)`."""
    weights = (log_weights - log_weights.max(0).values).exp()
    cumulative = (weights / weights.sum(0)).cumsum(0)
    count = log_weights.shape[1]
    points = (torch.arange(number, dtype=torch.float64)[:, None] + torch.rand(1, count, dtype=torch.float64)) / number
    indices = torch.searchsorted(cumulative.T.contiguous().cpu(), points.T.contiguous()).clamp(max=len(log_weights) - 1)
    order = torch.rand(count, number).argsort(1)
    return indices.gather(1, order).T
