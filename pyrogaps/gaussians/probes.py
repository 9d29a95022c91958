r"""Curvature along random probes, where one per latent would cost too much.

With $N = D H D$, H the mean secant curvature of -log p(x, z) and $L = D\,(I + U\,\mathrm{diag}(f - 1)\,U^T)$ the factor
of the Gaussian at hand, a pass measures N along

- the axes U, over a standard deviation either way;
- K random signs, made orthogonal to U: each is a typical draw of the remainder;
- Q, an orthonormal basis of what (N - c) makes of the signs, c the median of their curvatures. It is one step of a
  block Krylov method: directions whose curvature differs from that of most, larger or smaller, stand out there.

The signs are drawn afresh for every pass, and so they also bound what the pass has not measured. With
$B = P N P - I$ on the remainder, P the projection off U, the mean of $\|B^2 g\|^2$ over signs g estimates
$\mathrm{tr} B^4$, the sum of $(\lambda - 1)^4$ over all curvatures $\lambda$ of the remainder, and $\mathrm{tr} B^4$ is
larger than any of its terms. So all lie within $1 \pm (\mathrm{tr} B^4)^{1/4}$.

Halko, Martinsson and Tropp (2011), arXiv:0909.4061; Hutchinson (1990), doi:10.1080/03610919008812866.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.gaussians.low_rank import LowRank

NUM_PROBES = 16
# One direction adds chi-squared / K to a mean of K squares: less than this with probability 0.001 for K = 16.
# Several directions are underestimated by less.
UNLUCKY = 3.94 / NUM_PROBES
# Columns shorter than this, relative to the longest, are rounding errors.
ROUNDING = 1e-7
# The diagonal entry of T for a column of zeros: any curvature that does not count as cut.
UNUSED = 2.0


@dataclass(frozen=True)
class Probed:
    """What a pass has measured of B datapoints, R axes and K signs; all in coordinates D^-1 (z - loc).

    Attributes:
        steps, images: orthonormal columns S = [U, Q] `(B, dim, R + K)` and NS. Columns may be 0.
        lengths: `(B, R + K)`, of one standard deviation along each.
        signs, their_images: `(B, dim, K)`, orthogonal to U.
        gradient: D times the mean gradient of log p(x, z) over the signs, `(B, dim)`.
        flattest, steepest: `(B,)`, bounds on the eigenvalues of L^T H L, which are 1 where L is right.
    """

    steps: Tensor
    images: Tensor
    lengths: Tensor
    signs: Tensor
    their_images: Tensor
    gradient: Tensor
    flattest: Tensor
    steepest: Tensor


def probe(loc: Tensor, scale: LowRank, signs: Tensor, gradients: Callable[[Tensor], Tensor]) -> Probed:
    """Measure curvature about `loc` `(B, dim)` with the factor `scale`.

    Args:
        loc, scale: of the Gaussian at hand, in double precision.
        signs: random, `(K, B, dim)`; 0 in coordinates that are not active.
        gradients: of log p(x, z) at points `(S, B, dim)`, of the same shape.
    """
    axes, factors, number = scale.axes, scale.factors, len(signs)

    def along(steps: Tensor) -> tuple[Tensor, Tensor]:
        """N times steps `(B, dim, M)`, and the mean of the gradients at both ends of each, `(M, B, dim)`."""
        moved = scale.diagonal * steps.permute(2, 0, 1)
        above, below = gradients(torch.cat([loc + moved, loc - moved])).chunk(2)
        return (scale.diagonal * 0.5 * (below - above)).permute(1, 2, 0), 0.5 * (above + below)

    signs = _off(axes, signs.permute(1, 2, 0))
    measured, means = along(torch.cat([signs, axes * factors[:, None, :]], -1))
    sign_images, axis_images = measured[..., :number], measured[..., number:] / factors[:, None, :]
    inside, squares = _off(axes, sign_images), signs.square().sum((1, 2), keepdim=True).clamp(min=1e-300)
    curvatures = torch.linalg.eigvalsh(_symmetric(signs.mT @ inside) * number / squares)
    usual = curvatures.median(-1).values[:, None, None]
    image = inside - usual * signs
    basis = orthonormal(torch.where(_lengths(image) > ROUNDING * _lengths(signs), image, 0.0))
    basis_images = along(basis)[0]
    # B g, and B B g: what lies in the image is known from the basis.
    once = image + (usual - 1) * signs
    twice = _off(axes, basis_images) @ (basis.mT @ image) - image + (usual - 1) * once
    spread = (twice.square().sum(1).mean(-1) / UNLUCKY) ** 0.25
    flattest, steepest = _bounds(axes, axis_images, factors, spread)
    return Probed(
        torch.cat([axes, basis], -1),
        torch.cat([axis_images, basis_images], -1),
        torch.cat([factors, torch.ones_like(basis[:, 0])], -1),
        signs,
        sign_images,
        scale.diagonal * means[:number].mean(0),
        flattest,
        steepest,
    )


def _bounds(axes: Tensor, images: Tensor, factors: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest eigenvalue of L^T H L at most: those along the axes, and those of the remainder,
    apart by no more than what couples the two.
    """
    flattest, steepest = 1 - spread, 1 + spread
    if axes.shape[-1]:
        values = torch.linalg.eigvalsh(whitened(axes, images, factors))
        coupling = (_off(axes, images) * factors[:, None, :]).square().sum((1, 2)).sqrt()
        flattest = flattest.minimum(values[:, 0]) - coupling
        steepest = steepest.maximum(values[:, -1]) + coupling
    return flattest, steepest


def whitened(steps: Tensor, images: Tensor, lengths: Tensor) -> Tensor:
    """The curvature in units of standard deviations along orthonormal `steps`, or columns of zeros: `(B, M, M)`."""
    curvature = _symmetric(steps.mT @ images) * lengths[:, :, None] * lengths[:, None, :]
    return curvature + torch.diag_embed(UNUSED * (~steps.any(1)).to(curvature.dtype))


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of `columns` `(B, dim, M)`, of the same shape; columns of zeros where they depend."""
    for _ in range(2):  # the second time for the rounding errors of the first
        columns = columns / _lengths(columns).clamp(min=1e-300)
        values, axes = torch.linalg.eigh(columns.mT @ columns)
        kept = values > ROUNDING**2 * values[:, -1:].clamp(min=ROUNDING)
        inverse = torch.where(kept, values, 1.0).rsqrt() * kept
        columns = (columns @ axes) * inverse[:, None, :]
    return columns


def _off(axes: Tensor, columns: Tensor) -> Tensor:
    """`columns` without their part along `axes`."""
    return columns - axes @ (axes.mT @ columns)


def _lengths(columns: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(columns, dim=1, keepdim=True)
    return lengths


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)
