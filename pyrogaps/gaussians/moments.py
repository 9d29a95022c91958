"""Gaussians with the moments of draws, or of a guide."""

from collections.abc import Iterable

import torch
from torch import Tensor

from pyrogaps.density import JointDensity
from pyrogaps.density.draws import BlockedGuide, Posterior
from pyrogaps.gaussians.gaussian import Gaussian
from pyrogaps.streams import Chunk, Stream

NUM_DRAWS = 1024
DRAWS_AT_ONCE = 16  # in double precision


def gaussian_of(joint: JointDensity, posterior: Posterior, chunk: Chunk, stream: Stream) -> Gaussian:
    """The Gaussian with a guide's moments: exact ones where the guide knows them, else those of draws from `stream`.

    Of a guide in another space, such as one with discrete or auxiliary variables, those of the latents of `joint`.
    """
    guide, active = BlockedGuide(posterior, chunk), joint.active(chunk.indices)
    own = posterior.joint
    other = None if [*own.sites] == [*joint.sites] else own
    if other is None and active is None and (known := guide.exact_moments()) is not None:
        return Gaussian(*known)
    blocks = (z for z, _ in guide.in_blocks(NUM_DRAWS, stream))
    drawn = blocks if other is None else (other.columns_of(z, joint) for z in blocks)
    # A full covariance takes ten draws to a dimension.
    diagonal = guide.mean_field or 10 * joint.dim > NUM_DRAWS
    return gaussian_by_moments(drawn, diagonal=diagonal, active=active)


def gaussian_by_moments(blocks: Iterable[Tensor], *, diagonal: bool, active: Tensor | None) -> Gaussian:
    """The Gaussian with the mean and covariance of draws, which come in `blocks` `(S, B, dim)`.

    `diagonal` leaves covariances out. Coordinates that are not `active` get unit scales.
    """
    number, shift, total, products = 0, torch.empty(0), torch.empty(0), torch.empty(0)
    for draws in blocks:
        if not number:
            shift, dim = draws.mean(0), draws.shape[-1]
            total = torch.zeros_like(shift, dtype=torch.float64)
            products = torch.zeros_like(total) if diagonal else total[..., None].repeat(1, 1, dim)
        number += len(draws)
        for part in (draws - shift).split(DRAWS_AT_ONCE):
            centred = part.double()
            total += centred.sum(0)
            products += centred.square().sum(0) if diagonal else torch.einsum("sbi,sbj->bij", centred, centred)
    mean = total / number
    products -= number * (mean.square() if diagonal else mean[..., :, None] * mean[..., None, :])
    covariance = products / (number - 1)
    variance = covariance if diagonal else covariance.diagonal(dim1=-2, dim2=-1)
    loc, scale = shift + mean.to(shift.dtype), variance.clamp(min=0.0).sqrt().to(shift.dtype)
    scale = scale.clamp(min=torch.finfo(scale.dtype).tiny ** 0.5)
    if active is not None:
        scale = torch.where(active, scale, torch.ones_like(scale))
    if diagonal:
        return Gaussian(loc, scale, active)
    correlation = covariance / (scale[..., :, None] * scale[..., None, :]).double()
    identity = torch.eye(scale.shape[-1], dtype=torch.float64, device=scale.device)
    variances = correlation.diagonal(dim1=-2, dim2=-1).clamp(min=0.5)
    correlation = correlation * (1 - identity) + identity * variances[..., None]
    factor = torch.linalg.cholesky(correlation + 1e-4 * identity).to(scale.dtype)
    return Gaussian(loc, scale[..., None] * factor, active)
