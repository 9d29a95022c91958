"""A Gaussian with the curvature of log p(x, z) over the breadth of a posterior."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pyrogaps.gaussians.gaussian import Gaussian

# Curvatures relative to the Gaussian before are used within these limits. Beyond them the axis is measured again on a
# new scale, a few times.
FLATTEST, STEEPEST = 0.1, 10.0
MAX_PASSES = 4


def gaussian_by_curvature(start: Gaussian, gradients: Callable[[Tensor, Tensor], Tensor]) -> tuple[Gaussian, Tensor]:
    r"""The Gaussian whose precision is the mean curvature of log p(x, z) over the breadth of `start`.

    With L the factor of a first Gaussian, the columns of L give secants
    $H L_i \approx \tfrac12 (\nabla \log p(x, \mu - L_i) - \nabla \log p(x, \mu + L_i))$, a difference over one standard
    deviation either way: the mean curvature over the breadth of the posterior, not that of a point. The new precision
    is $L^{-T} \tfrac12 (L^T H L + (L^T H L)^T) L^{-1}$, the new mean one Newton step along the mean gradient. Where a
    curvature, relative to the first Gaussian's, is not between `FLATTEST` and `STEEPEST` it is cut off there, and
    measured again from the result.

    Args:
        start: the first Gaussian of each of M datapoints.
        gradients: of log p(x, z): positions `(K,)` among the M, which may be a part of them, and points `(S, K, dim)`.

    Returns the Gaussians, with a factor L, and the number of gradients that each took, `(M,)`.
    """
    loc, factor = start.loc, start.factor()
    pending = torch.arange(len(loc))
    cost = torch.zeros(len(loc), dtype=torch.long)
    for _ in range(MAX_PASSES):
        now = factor[pending]
        steps = now.permute(2, 0, 1)  # column i of every datapoint's factor
        points = torch.cat([loc[pending] + steps, loc[pending] - steps])
        at_points = torch.nan_to_num(gradients(pending, points))
        cost[pending] += len(points)
        active = None if start.active is None else start.active[pending]
        factor[pending], shift, cut = _refitted(now, at_points, active)
        loc = loc.index_copy(0, pending, loc[pending] + shift)
        pending = pending[cut]
        if len(pending) == 0:
            break
    return replace(start, loc=loc, scale=factor), cost


def _refitted(factor: Tensor, gradients: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The new factor `(M, dim, dim)`, the step of the mean `(M, dim)`, and where a curvature was cut off `(M,)`."""
    dim = factor.shape[-1]
    secants = 0.5 * (gradients[dim:] - gradients[:dim])
    curvature = torch.einsum("bji,kbj->bik", factor, secants).double()
    if active is not None:
        both = (active[:, :, None] & active[:, None, :]).to(curvature.dtype)
        curvature = curvature * both + torch.diag_embed((~active).to(curvature.dtype))
    values, axes = torch.linalg.eigh(0.5 * (curvature + curvature.mT))
    cut = ((values < FLATTEST) | (values > STEEPEST)).any(-1)
    half = factor.double() @ (axes * values.clamp(FLATTEST, STEEPEST).rsqrt()[:, None, :])
    new = torch.linalg.cholesky(half @ half.mT)
    # A step by a curvature that was cut off would overshoot where it is steeper.
    along = torch.einsum("bji,bj->bi", factor.double() @ axes, gradients.mean(0).double())
    step = along / values.abs().clamp(min=FLATTEST)
    # And one that leaves the Gaussian trusts the quadratic too far.
    length = step.norm(dim=-1, keepdim=True)
    step = step * (0.5 * dim**0.5 / length.clamp(min=1e-300)).clamp(max=1.0)
    shift = torch.einsum("bij,bj->bi", factor.double() @ axes, step)
    if active is not None:
        shift = shift * active
    return new.to(factor.dtype), shift.to(factor.dtype), cut
