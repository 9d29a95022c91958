"""A Gaussian with the curvature of log p(x, z) over the breadth of a posterior."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyrogaps.gaussians.gaussian import Gaussian
from pyrogaps.streams import Chunk

NUM_PASSES = 3
# A pass changes no curvature by more than these factors: further away it has not been measured.
FLATTEST, STEEPEST = 0.1, 10.0
# The mean moves by no more than this in a pass, in units of sqrt(dim) standard deviations, and of one: further away
# the quadratic is not known to hold.
LONGEST, LONGEST_FEW = 0.5, 1.5
# Two passes agree where no curvature has changed by more than this factor, and the mean by a quarter of the limit.
AGREES, SETTLED = 3.0, 0.25


def longest_step(dim: int) -> float:
    """The limit on a step of the mean, in standard deviations."""
    return max(LONGEST * math.sqrt(dim), LONGEST_FEW)


@dataclass(frozen=True)
class Curvature:
    """Gaussians fitted by curvature to B datapoints.

    Attributes:
        gaussian: one for each datapoint, with a factor L.
        cut: `(B,)`, where the last pass met a curvature that is not positive, or beyond what a pass may change. Weights
            of draws from such a Gaussian are not to be trusted.
        agrees: `(B,)`, where the last two passes agree in every direction: the covariance is that of the curvature.
        num_gradients: `(B,)`, that each datapoint took.
    """

    gaussian: Gaussian
    cut: Tensor
    agrees: Tensor
    num_gradients: Tensor

    def within(self, chunk: Chunk, block: Chunk) -> "Curvature":
        """That of a block of the chunk that this is of."""
        return self.at(torch.arange(block.start - chunk.start, block.stop - chunk.start))

    def at(self, positions: Tensor) -> "Curvature":
        """That of the datapoints at `positions`."""
        gaussian = self.gaussian.at(positions)
        cut, agrees, number = self.cut[positions], self.agrees[positions], self.num_gradients[positions.cpu()]
        return Curvature(gaussian, cut, agrees, number)

    def settled_by(self, positions: Tensor, other: "Curvature") -> "Curvature":
        """With `other`, further passes of the datapoints at `positions`, where these settled."""
        kept = other.agrees.nonzero()[:, 0]
        places, number = positions.to(kept.device)[kept], self.num_gradients.clone()
        number[positions.cpu()] += other.num_gradients
        cut, agrees = self.cut.clone(), self.agrees.clone()
        cut[places], agrees[places] = False, True
        gaussian = self.gaussian.with_replaced(places, other.gaussian.at(kept)) if len(kept) else self.gaussian
        return Curvature(gaussian, cut, agrees, number)

    @classmethod
    def joined(cls, parts: Sequence["Curvature"]) -> "Curvature":
        """That of the datapoints of all parts, one after the other."""
        gaussian = Gaussian.joined([part.gaussian for part in parts])
        cut, agrees = torch.cat([part.cut for part in parts]), torch.cat([part.agrees for part in parts])
        return cls(gaussian, cut, agrees, torch.cat([part.num_gradients for part in parts]))


def gaussian_by_curvature(start: Gaussian, gradients: Callable[[Tensor], Tensor], *, far: bool = False) -> Curvature:
    r"""The Gaussian whose precision is the mean curvature of log p(x, z) over its own breadth.

    With L the factor of a Gaussian, the columns of L give secants
    $H L_i \approx \tfrac12 (\nabla \log p(x, \mu - L_i) - \nabla \log p(x, \mu + L_i))$, a difference over one standard
    deviation either way: the mean curvature over the breadth of the posterior, not that of a point. The new precision
    is $L^{-T} \tfrac12 (L^T H L + (L^T H L)^T) L^{-1}$, the new mean one Newton step along the mean gradient. There are
    `NUM_PASSES` such passes, whatever they find, so that all datapoints take their gradients together. A pass changes
    curvatures by factors from `FLATTEST` to `STEEPEST`. Where a gradient is not finite, `start` is returned, as cut.

    Args:
        start: the first Gaussian of each of B datapoints.
        gradients: of log p(x, z) at points `(S, B, dim)`, of the same shape.
        far: whether the mean may be far off: then its steps are not limited where a pass has confirmed the curvature.
    """
    loc, factor = start.loc, start.factor()
    agrees = broken = torch.zeros(len(loc), dtype=torch.bool, device=loc.device)
    cut, dim = broken, loc.shape[-1]
    for _ in range(NUM_PASSES):
        steps = factor.permute(2, 0, 1)  # column i of every datapoint's factor
        at_points = gradients(torch.cat([loc + steps, loc - steps]))
        broken = broken | ~torch.isfinite(at_points).all(-1).all(0)
        finite = torch.nan_to_num(at_points, nan=0.0, posinf=0.0, neginf=0.0)
        found = _refitted(factor, finite, start.active, far=far)
        factor, loc = found.factor, loc + found.shift
        broken = broken | found.broken
        cut, agrees = found.cut | broken, found.agrees & ~broken
    loc = torch.where(broken[:, None], start.loc, loc)
    factor = torch.where(broken[:, None, None], start.factor(), factor)
    number = torch.full((len(loc),), 2 * dim * NUM_PASSES)
    return Curvature(replace(start, loc=loc, scale=factor), cut, agrees, number)


@dataclass(frozen=True)
class _Refitted:
    """After a pass: factors `(B, dim, dim)`, steps of the mean `(B, dim)`, `cut`, `agrees` and `broken` `(B,)`.

    Where a pass is broken, because numbers became too large or too small for their dtype, the factor is the one before.
    """

    factor: Tensor
    shift: Tensor
    cut: Tensor
    agrees: Tensor
    broken: Tensor


def _refitted(factor: Tensor, gradients: Tensor, active: Tensor | None, *, far: bool) -> _Refitted:
    dim, gradients = factor.shape[-1], gradients.double()
    secants = 0.5 * (gradients[dim:] - gradients[:dim])
    curvature = torch.einsum("bji,kbj->bik", factor.double(), secants)
    broken = ~torch.isfinite(curvature).all(-1).all(-1)
    curvature = torch.where(broken[:, None, None], torch.eye(dim).to(curvature), curvature)
    if active is not None:
        both = (active[:, :, None] & active[:, None, :]).to(curvature.dtype)
        curvature = curvature * both + torch.diag_embed((~active).to(curvature.dtype))
    values, axes = torch.linalg.eigh(0.5 * (curvature + curvature.mT))
    whitened = factor.double() @ axes
    half = whitened * values.clamp(FLATTEST, STEEPEST).rsqrt()[:, None, :]
    new, failed = torch.linalg.cholesky_ex(half @ half.mT)
    new = new.to(factor.dtype)
    broken = broken | (failed != 0) | ~torch.isfinite(new).all(-1).all(-1) | ~(new.diagonal(0, -2, -1) > 0).all(-1)
    new = torch.where(broken[:, None, None], factor, new)
    along = torch.einsum("bji,bj->bi", whitened, gradients.mean(0))
    step = along / values.abs().clamp(min=FLATTEST**2)
    longest = longest_step(dim)
    length = step.norm(dim=-1, keepdim=True)
    steady = ((values > 1 / AGREES) & (values < AGREES)).all(-1)
    limited = step * (longest / length.clamp(min=1e-300)).clamp(max=1.0)
    step = torch.where((steady & far)[:, None], step, limited)
    shift = torch.einsum("bij,bj->bi", whitened, step)
    if active is not None:
        shift = shift * active
    cut = ((values < FLATTEST) | (values > STEEPEST)).any(-1)
    agrees = steady & (length[:, 0] < SETTLED * longest)
    shift = torch.where(broken[:, None], 0.0, shift)
    return _Refitted(new, shift.to(factor.dtype), cut, agrees, broken)
