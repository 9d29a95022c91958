"""A Gaussian with the curvature of log p(x, z), of low rank plus diagonal, for many latents."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pyrogaps.gaussians.curvature import AGREES, FLATTEST, SETTLED, STEEPEST, Curvature, longest_step
from pyrogaps.gaussians.gaussian import Gaussian
from pyrogaps.gaussians.low_rank import LowRank
from pyrogaps.gaussians.probes import NUM_PROBES, probe
from pyrogaps.gaussians.secant_update import updated
from pyrogaps.streams import Noise

# A pass gains a factor of ten along known axes, and finds up to NUM_PROBES new ones; each takes 2 (RANK + 2 NUM_PROBES)
# gradients, the first one fewer: 960 in all.
RANK, NUM_LOW_RANK_PASSES = 32, 8


def gaussian_by_low_rank_curvature(start: Gaussian, gradients: Callable[[Tensor], Tensor], noise: Noise) -> Curvature:
    """As `gaussian_by_curvature`, with covariances of low rank plus diagonal, by passes of probes.

    `agrees` is also claimed for directions that were not measured: the last pass, whose probes no earlier pass has
    seen, bounds their curvature. So is `cut`. Each bound is wrong by chance for about one datapoint in a thousand. A
    posterior with more than `RANK` strong directions, or with correlations that no few directions hold, such as those
    of a long chain, is cut. Where the passes led away from the posterior, or a gradient is not finite, `start` is
    returned, as cut.

    Args:
        start: the first Gaussian of each of B datapoints, diagonal or of low rank. Other factors lose correlations.
        gradients: of log p(x, z) at points `(S, B, dim)`, of the same shape.
        noise: of the B datapoints, for the probes.
    """
    dim, dtype = start.loc.shape[-1], start.loc.dtype
    active = torch.ones_like(start.loc, dtype=torch.bool) if start.active is None else start.active
    probes = min(NUM_PROBES, max(1, dim // 2))
    rank = min(RANK, dim - probes)
    broken, number = torch.zeros(len(active), dtype=torch.bool, device=active.device), 0

    def measured(points: Tensor) -> Tensor:
        nonlocal broken, number
        at_points = gradients(points.to(dtype))
        number += len(points)
        broken = broken | ~torch.isfinite(at_points).all(-1).all(0)
        return torch.nan_to_num(at_points, nan=0.0, posinf=0.0, neginf=0.0).double() * active

    first, loc, misfits = _low_rank(start), start.loc.double(), []
    scale, longest = first.to(torch.float64), longest_step(dim)
    for _ in range(NUM_LOW_RANK_PASSES):
        signs = (noise.uniform(probes, dim) < 0.5).double() * 2 - 1
        probed = probe(loc, scale, signs * active, measured)
        update = updated(scale, probed, rank, active, longest)
        loc, scale = loc + scale.apply(update.step[None])[0] * active, update.scale
        misfits.append((1 - probed.flattest).maximum(probed.steepest - 1))
    away = broken | (misfits[-1] > misfits[0].clamp(min=STEEPEST)) | ~torch.isfinite(loc).all(-1)
    cut = away | (probed.flattest < FLATTEST) | (probed.steepest > STEEPEST)
    agrees = ~cut & (probed.flattest > 1 / AGREES) & (probed.steepest < AGREES) & (update.length < SETTLED * longest)
    kept = first.padded(rank).where(away, scale.to(dtype).padded(rank))
    loc = torch.where(away[:, None], start.loc, loc.to(dtype))
    return Curvature(replace(start, loc=loc, scale=kept), cut, agrees, torch.full((len(loc),), number))


def _low_rank(gaussian: Gaussian) -> LowRank:
    """The scales of a Gaussian in this form; of full factors, the standard deviations of each latent."""
    scale = gaussian.scale
    if isinstance(scale, LowRank):
        return scale
    diagonal = scale if scale.dim() == 2 else torch.linalg.vector_norm(scale, dim=-1)
    return LowRank(diagonal, diagonal.new_zeros(*diagonal.shape, 0), diagonal[:, :0])
