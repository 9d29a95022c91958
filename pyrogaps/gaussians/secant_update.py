r"""The precision estimated by a pass of probes: a diagonal, corrected to reproduce every measured secant.

With NS measured and $T = S^T N S$, the block form of the BFGS update of a diagonal $\Delta$ is

$$\Delta - \Delta S (S^T \Delta S)^{-1} S^T \Delta + N S\, T^{-1} (N S)^T$$

It is positive where $\Delta$ and T are, and has every secant that was measured, what couples S to the rest included.
It is exact where N differs from $\Delta$ along a few directions only, and $\Delta^{-1}$ times these lie within S.
Scaled by $\Delta^{-1/2}$ it is of the form $I + Z E Z^T$; the axes with the largest |log eigenvalue| are kept.

$\Delta$ estimates the diagonal of N off S by the mean of $g_i (N g)_i$ over signs g, shrunk towards the mean over
coordinates according to its noise.

Block BFGS: Schnabel (1983), University of Colorado, CU-CS-247-83.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.gaussians.curvature import FLATTEST, STEEPEST
from pyrogaps.gaussians.low_rank import LowRank
from pyrogaps.gaussians.probes import Probed, orthonormal, whitened

# Axes whose |log eigenvalue| is smaller are left out.
NEGLIGIBLE = 1e-7
# The noise of a coordinate's curvature is at least this share of the mean over coordinates.
LEAST_NOISE = 0.25


@dataclass(frozen=True)
class Updated:
    """The factor after a pass; the step of the mean, in standard deviations before it `(B, dim)`, and the length that a
    Newton step would have had, `(B,)`.
    """

    scale: LowRank
    step: Tensor
    length: Tensor


def updated(scale: LowRank, probed: Probed, rank: int, active: Tensor, longest: float) -> Updated:
    """The factor with the curvature that was `probed` with `scale`, of `rank` axes, and a step of at most `longest`.

    No curvature changes by more than the factors `FLATTEST` and `STEEPEST`, nor becomes so much larger that the mean is
    left more than a step away: steps are in units of standard deviations. `active` `(B, dim)`: the coordinates that
    count.
    """
    steps, lengths = probed.steps, probed.lengths
    values, axes = torch.linalg.eigh(whitened(steps, probed.images, lengths))
    rest = _diagonal(probed, active)
    step = _newton(scale, probed, axes, values, rest)
    length = step.norm(dim=-1, keepdim=True)
    step = step * (longest / length.clamp(min=1e-300)).clamp(max=1.0)
    left = (length - longest).clamp(min=1e-300)
    steepest = (longest / left).square().clamp(1.0, STEEPEST)
    kept, diagonal = values.clamp(min=FLATTEST).minimum(steepest), rest.clamp(min=FLATTEST).minimum(steepest)
    along = steps @ (lengths[:, :, None] * axes)  # standard deviations along which the curvature is diagonal
    inside = steps @ (axes / lengths[:, :, None])
    across = probed.images @ (lengths[:, :, None] * axes) - inside * values[:, None, :]
    # Where a curvature is clamped, what couples it to the outside is not known.
    images = inside * kept[:, None, :] + across * (kept == values)[:, None, :]
    root = diagonal.sqrt()[..., None]
    added, removed = images / root * kept.rsqrt()[:, None, :], orthonormal(along * root)
    basis = torch.linalg.qr(torch.cat([added, removed], -1))[0]  # whatever fills it up is left out below
    added, removed = basis.mT @ added, basis.mT @ removed
    excess, turned = torch.linalg.eigh(added @ added.mT - removed @ removed.mT)
    least, most = _limits(scale.factors, steepest)
    log_precision = (1 + excess).maximum(least).minimum(most).log()
    log_precision = torch.where(log_precision.abs() < NEGLIGIBLE, 0.0, log_precision)
    top = log_precision.abs().argsort(-1, descending=True)[:, :rank]
    factors = (-0.5 * log_precision.gather(1, top)).exp()
    new_axes = basis @ turned.gather(2, top[:, None, :].expand(-1, turned.shape[1], -1))
    new_axes = new_axes * (factors != 1)[:, None, :]
    new = LowRank(scale.diagonal / diagonal.sqrt(), new_axes, factors)
    return Updated(new, step, length[:, 0])


def _diagonal(probed: Probed, active: Tensor) -> Tensor:
    """The diagonal of N off the steps, `(B, dim)`; 1 where not active. It may be negative."""
    axes = probed.steps.shape[-1] - probed.signs.shape[-1]
    basis, images = probed.steps[..., axes:], probed.images[..., axes:]
    inside = basis.mT @ probed.signs
    signs, seen = probed.signs - basis @ inside, probed.their_images - images @ inside
    squares, products = signs.square(), signs * seen
    weight, number = squares.sum(-1), max(signs.shape[-1] - 1, 1)
    total = weight.sum(-1, keepdim=True)
    mean = torch.where(total > 0, products.sum((1, 2))[:, None] / total.clamp(min=1e-300), 1.0)
    own = products.sum(-1) / weight.clamp(min=1e-300)
    # What is left of a coordinate, if the steps hold nearly all of it, is mostly rounding.
    known = active & (weight > 0.01 * signs.shape[-1])
    own = torch.where(known, own.maximum(FLATTEST * mean.abs()).minimum(STEEPEST * mean.abs()), mean)
    noise = (products - own[..., None] * squares).square().sum(-1) / number / weight.clamp(min=1e-300)
    count = known.sum(-1, keepdim=True).clamp(min=2)
    usual = (noise * known).sum(-1, keepdim=True) / count
    spread = (own - mean).square().sum(-1, keepdim=True) / (count - 1)
    true_spread = (spread - usual).clamp(min=0.0)
    share = true_spread / (true_spread + noise.maximum(LEAST_NOISE * usual)).clamp(min=1e-300)
    return torch.where(active, mean + share * (own - mean), 1.0)


def _limits(factors: Tensor, steepest: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest precision along an axis, `(B, 1)` each, given what they are before."""
    before = torch.cat([factors.square().reciprocal(), factors.new_ones(len(factors), 1)], -1)
    return FLATTEST * before.amin(-1, keepdim=True), steepest * before.amax(-1, keepdim=True)


def _newton(scale: LowRank, probed: Probed, axes: Tensor, values: Tensor, rest: Tensor) -> Tensor:
    """The step to where the mean gradient vanishes: along the steps by their curvature, elsewhere by the diagonal."""
    unit = LowRank(torch.ones_like(scale.diagonal), scale.axes, scale.factors)
    gradient = unit.apply_transpose(probed.gradient[None])[0][..., None]
    inside = probed.steps.mT @ gradient
    along = axes @ ((axes.mT @ inside) / values.abs().clamp(min=FLATTEST**2)[..., None])
    outside = (gradient - probed.steps @ inside) / rest.abs().clamp(min=FLATTEST**2)[..., None]
    return (outside + probed.steps @ along)[..., 0]
