"""The Gaussian at every datapoint from which log p(x) is measured."""

import torch

from pyrogaps.capture.slots import Slots
from pyrogaps.gaussians.curvature import Curvature, gaussian_by_curvature
from pyrogaps.gaussians.gaussian import Gaussian
from pyrogaps.gaussians.moments import gaussian_by_moments, gaussian_of
from pyrogaps.problem import Problem
from pyrogaps.run import Run
from pyrogaps.streams import BLOCK, Chunk, Stream

# On the scales of the guide, because a mean-field guide is narrower than the posterior.
WIDEN_GUIDE = 1.2
NUM_PRIOR_DRAWS = 256
# Above this many latents a full covariance takes more gradients (6 dim) and memory than it saves.
MAX_DIM = 256


def anchor_of(problem: Problem, chunk: Chunk, run: Run) -> Curvature:
    """The Gaussian with the curvature of log p(x, z) about each datapoint of a chunk.

    It starts from the guide, or from the prior where there is none. Above `MAX_DIM` latents it is the guide's own, and
    marked as cut. Whoever asks again for the same chunk gets the same Gaussians.
    """
    key = problem.joint, problem.posterior, chunk, run.seed
    return run.remembered(
        "anchor", key, lambda: Curvature.joined([_fit(problem, block, run) for block in chunk.blocks()])
    )


def _fit(problem: Problem, block: Chunk, run: Run) -> Curvature:
    start = _start(problem, block, run)
    if problem.dim > MAX_DIM:
        unknown = torch.ones(len(block), dtype=torch.bool, device=start.loc.device)
        return Curvature(start, unknown, ~unknown, 0)
    slots, everyone = Slots(problem.evaluator, block), torch.arange(len(block))
    return gaussian_by_curvature(start, lambda points: slots.gradients(everyone, points))


def _start(problem: Problem, block: Chunk, run: Run) -> Gaussian:
    stream = run.stream("anchor")
    if problem.posterior is not None:
        return gaussian_of(problem.joint, problem.posterior, block, stream).widened(WIDEN_GUIDE)
    return prior_gaussian(problem, block, stream)


def prior_gaussian(problem: Problem, block: Chunk, stream: Stream) -> Gaussian:
    """The factorised Gaussian with the moments of draws from the prior, at every datapoint of a block."""
    stream.reseed(block.start // BLOCK)
    draws = problem.joint.sample_prior(NUM_PRIOR_DRAWS, block.indices)
    return gaussian_by_moments([draws], diagonal=True, active=problem.joint.active(block.indices))
