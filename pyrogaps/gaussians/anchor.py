"""The Gaussian at every datapoint from which log p(x) is measured."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor, arange

from pyrogaps.capture.slots import Slots
from pyrogaps.gaussians.curvature import STEEPEST, Curvature, gaussian_by_curvature
from pyrogaps.gaussians.gaussian import Gaussian
from pyrogaps.gaussians.low_rank_curvature import gaussian_by_low_rank_curvature
from pyrogaps.gaussians.moments import gaussian_by_moments, gaussian_of
from pyrogaps.problem import Problem
from pyrogaps.run import Run
from pyrogaps.streams import BLOCK, Chunk, Noise, Stream

# On the scales of the guide, because a mean-field guide is narrower than the posterior.
WIDEN_GUIDE = 1.2
NUM_PRIOR_DRAWS = 256
# Up to this many latents a full covariance, which holds any correlations, is fitted at once, by 6 dim gradients. One of
# low rank takes 960. The ladder's evaluations, full against low rank, for Gaussians with 8 strong directions: 1,640
# against 2,096 in 64 dimensions, 1,960 against 2,096 in 128, 2,792 against 2,491 in 256.
MAX_DIM = 256
# Three more passes follow so many times at most: with the first, they reach a precision 1e15 times that of the start.
MAX_FURTHER = 4
# Up to this many, it is fitted where low rank fails; that takes 0.3 s of linear algebra per datapoint. FEW
# datapoints at a time, for memory.
MAX_DIM_AGAIN, FEW = 512, 16


def anchor_of(problem: Problem, chunk: Chunk, run: Run) -> Curvature:
    """The Gaussian with the curvature of log p(x, z) about each datapoint of a chunk.

    It starts from the guide, or from the prior where there is none. Repeated calls for a chunk return the same
    Gaussians.
    """
    key = problem.joint, problem.posterior, chunk, run.seed
    return run.remembered(
        "anchor", key, lambda: Curvature.joined([_fit(problem, block, run) for block in chunk.blocks()])
    )


def _fit(problem: Problem, block: Chunk, run: Run) -> Curvature:
    start = _start(problem, block, run)
    slots, everyone = Slots(problem.evaluator, block), arange(len(block))
    noise = slots.noise(run.stream("anchor probes"), len(block), start.loc.dtype)
    return fitted(start, lambda positions, points: slots.gradients(everyone[positions], points), noise)


def fitted(start: Gaussian, gradients: Callable[[Tensor, Tensor], Tensor], noise: Noise) -> Curvature:
    """Gaussians by curvature of B datapoints, with full covariances up to `MAX_DIM` latents.

    Where the last two passes do not agree, because the start was far off, there are three more, again and again while
    these make way; they are kept if they settle. Above `MAX_DIM`, covariances are of low rank plus diagonal. Where such
    a fit is cut, a full covariance is fitted up to `MAX_DIM_AGAIN` latents, and kept unless it is cut as well; above, a
    full one of `start` is kept. All factors are then full.

    Args:
        start: where the fits begin.
        gradients: of log p(x, z) for the datapoints at positions `(M,)`, at points `(S, M, dim)`.
        noise: of the datapoints, for fits of low rank.
    """
    dim, everyone = start.loc.shape[-1], arange(len(start.loc))
    if dim <= MAX_DIM:
        return settled_by_curvature(start, gradients)
    fits = gaussian_by_low_rank_curvature(start, partial(gradients, everyone), noise)
    again = fits.cut.cpu().nonzero()[:, 0]
    correlated = isinstance(start.scale, Tensor) and start.scale.dim() == 3
    if not len(again) or (dim > MAX_DIM_AGAIN and not correlated):
        return fits
    gaussian, cut, agrees = fits.gaussian.triangular(), fits.cut.clone(), fits.agrees.clone()
    if dim > MAX_DIM_AGAIN:
        return replace(fits, gaussian=gaussian.with_replaced(again, start.at(again)))
    for positions in again.split(FEW):
        fit = gaussian_by_curvature(gaussian.at(positions), partial(gradients, positions))
        better = (~fit.cut).nonzero()[:, 0]
        places = positions.to(better.device)[better]
        gaussian = gaussian.with_replaced(places, fit.gaussian.at(better))
        cut[places], agrees[places] = False, fit.agrees[better]
    number = fits.num_gradients.clone()
    number[again] += fit.num_gradients[0]
    return Curvature(gaussian, cut, agrees, number)


def settled_by_curvature(start: Gaussian, gradients: Callable[[Tensor, Tensor], Tensor]) -> Curvature:
    """Gaussians with full covariances, as `fitted` has them for few latents; these arguments are its own."""
    fit = gaussian_by_curvature(start, partial(gradients, arange(len(start.loc))))
    left = (~fit.agrees).nonzero()[:, 0].cpu()
    before = fit.gaussian.at(left)
    for _ in range(MAX_FURTHER):
        if not len(left):
            break
        further = gaussian_by_curvature(before, partial(gradients, left), far=True)
        fit = fit.settled_by(left, further)
        # What was not cut at last, or is still narrowing as fast as a pass may, has only come a long way.
        late = ~further.agrees & (~further.cut | _narrowing(before, further.gaussian))
        places = late.nonzero()[:, 0].cpu()
        left, before = left[places], further.gaussian.at(places)
    return fit


def _narrowing(before: Gaussian, after: Gaussian) -> Tensor:
    """Whether the passes in between narrowed the Gaussians by as much as one may, `(M,)`."""
    first, last = (each.factor().diagonal(dim1=-2, dim2=-1).log().sum(-1) for each in (before, after))
    return first - last > 0.5 * math.log(STEEPEST)


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
