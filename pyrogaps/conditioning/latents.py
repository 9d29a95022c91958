"""Draws of the latents given what is shown, p(z | C)."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyrogaps.ais import AIS, ais_chunk, anchor, anchored_path, prior_path
from pyrogaps.anneal import AnnealResult
from pyrogaps.capture import GradientEvaluator
from pyrogaps.density import JointDensity
from pyrogaps.log_weights import effective_sample_size, log_mean_exp, mcse_of_log_mean_exp
from pyrogaps.refine import Refinement, refine_chunk
from pyrogaps.refine.families import Start
from pyrogaps.streams import BLOCK, Chunk, derive_seed, reseed

# Of the chains.
FEW = 1 / 8


@dataclass(frozen=True)
class LatentsGiven:
    """AIS with resampling, in the density of what is shown.

    Two runs are made, one from the prior and one anchored at a refined mean-field Normal. The second is far the better
    where much is shown; where little is, p(z | C) may have modes of which an anchor in one of them never hears, and its
    estimate of log p(C) then misses their mass without knowing. So for every datapoint the run from the prior is taken,
    unless too few of its draws count or its estimate, a lower bound in expectation as the other's, is significantly
    lower. `AIS(initial="prior")` makes that run alone.
    """

    partial: JointDensity
    settings: AIS
    refinement: Refinement

    def draw(self, block: Chunk, start: Start, number: int, seed: int) -> tuple[Tensor, Tensor]:
        """`z` `(number, B, dim)`, and how many independent draws they amount to, `(B,)`; `start` is the anchor's."""
        settings = replace(self.settings, num_chains=number)
        runs = [self._from_prior(block, settings, derive_seed(seed, "prior run"))]
        if settings.initial != "prior":
            runs.append(self._anchored(block, start, settings, seed))
        best = _anchored_is_better(*runs) if len(runs) > 1 else torch.zeros(len(block), dtype=torch.long)
        best = best.to(runs[0].log_weights.device)
        columns = torch.arange(len(block), device=best.device)
        log_weights = torch.stack([run.log_weights for run in runs])[best, :, columns].T
        position = torch.stack([run.position for run in runs], 2)[:, columns, best]
        reseed(seed, "resample", block.start // BLOCK)
        which = systematic(log_weights, number).to(position.device)
        return position[which, columns.to(position.device)], effective_sample_size(log_weights)

    def _anchored(self, block: Chunk, start: Start, settings: AIS, seed: int) -> AnnealResult:
        evaluator = self._evaluator
        refined, _ = refine_chunk(AutoNormal, evaluator, block, self.refinement, seed, "shown part", start)
        fitted = anchor(self.partial, refined, block, settings.widen, seed)
        path = anchored_path(evaluator, fitted, block, seed)
        return ais_chunk(path, evaluator, block, settings, seed, together=True)

    def _from_prior(self, block: Chunk, settings: AIS, seed: int) -> AnnealResult:
        path = prior_path(self._split_evaluator, block, seed)
        return ais_chunk(path, self._split_evaluator, block, settings, seed, together=True)

    @cached_property
    def _evaluator(self) -> GradientEvaluator:
        return GradientEvaluator(self.partial, self.settings.mode)

    @cached_property
    def _split_evaluator(self) -> GradientEvaluator:
        return GradientEvaluator(self.partial, self.settings.mode, split=True)


def _anchored_is_better(prior: AnnealResult, anchored: AnnealResult) -> Tensor:
    """1 where the draws from the prior are too few or miss what the anchored ones have, else 0: `(B,)`."""
    few = effective_sample_size(prior.log_weights) < FEW * len(prior.log_weights)
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
