"""Natural gradients of the ELBO for Gaussians, with the curvature of log p(x, z) as control variate."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyrogaps.gaussians import Gaussian, longest_step
from pyrogaps.refine.gaussian_form import GaussianForm
from pyrogaps.refine.unseen import Draws
from pyrogaps.scales import apply_scale, apply_transpose

# The rate of a step: fast at first, then 1/t, so that the end is a mean over the steps.
FASTEST, NUM_FAST = 0.5, 4
NUM_POWER = 5


def rate(age: Tensor) -> Tensor:
    """The rates after `age` `(M,)` steps: `FASTEST` for the first few, then 1/2, 1/3, ..."""
    return 1 / (age - NUM_FAST + 1 / FASTEST).clamp(min=1 / FASTEST)


def fitted_to(form: GaussianForm, own: Gaussian, anchor: Gaussian) -> Gaussian:
    """The family's Gaussians of highest ELBO where log p(x, z) is the Gaussian `anchor`; `own` in what is not free.

    Their precision is that of the anchor, with 0 between coordinates that the family holds independent.
    """
    precision = _precision(anchor)
    loc = torch.where(form.free_loc, anchor.loc, own.loc)
    if form.blocks is None:
        scale = precision.diagonal(dim1=-2, dim2=-1).rsqrt().to(own.matrix.dtype)
        return replace(own, loc=loc, scale=torch.where(form.free_scale, scale, own.matrix))
    factor = _factor(precision * form.blocks).to(own.matrix.dtype)
    return replace(own, loc=loc, scale=torch.where(form.free_scale[:, None], factor, own.matrix))


class Stepped(NamedTuple):
    r"""M Gaussians after a step.

    Attributes:
        gaussian: the Gaussians.
        shortfall: `(M,)`, nats, of the ELBO before it, if m and P are off by as much as the draws of the step say:
            $\tfrac12 \bar u^T R^{-1} \bar u + \tfrac14 \|W\|^2$.
        far: `(M,)`, whether the mean was so far off that its step was cut short.
        direction: `(M, dim)`, the step of the mean at rate 1, in standard deviations before it.
    """

    gaussian: Gaussian
    shortfall: Tensor
    far: Tensor
    direction: Tensor


@dataclass(frozen=True)
class NaturalGradient:
    r"""Natural-gradient ascent of the ELBO of Gaussians N(m, L L^T), with precision P, for M datapoints.

    In coordinates whitened by L, let $u_\pm$ be the gradients of log p(x, z) at $m \pm L\epsilon$,
    $s = \tfrac12 (u_- - u_+)$ the secant and R the anchor's precision, scaled to unit diagonal (blocks). Then

    $$W = \overline{\operatorname{sym}(s - R\epsilon) \epsilon^T}, \qquad \mathbb E[W] = L^T H L - I,$$

    with H the mean of $-\nabla^2 \log p(x, z)$ under q (Stein's identity) and $\mathbb E[R \epsilon \epsilon^T]$ the
    identity in all that the family frees: R, which is set before any draw, is a control variate with a known mean. A
    step of rate r is

    $$P \leftarrow L^{-T} (I + r W + \tfrac12 r^2 W^2) L^{-1}, \qquad m \leftarrow m + r L R^{-1} \bar u .$$

    The factor in brackets is $\tfrac12 (I + (I + rW)^2)$: it halves a precision at most, so precisions
    stay positive (Lin, Schmidt and Khan, 2020, arXiv:2002.10060). The step of m is a Newton step.

    Attributes:
        correlation: R, `(M, dim, dim)`, in double precision.
        inverse: of R among the means that are free, 0 elsewhere, `(M, dim, dim)`.
        mask: what of W is free: `(M, dim)` of its diagonal for independent coordinates, else `(M, dim, dim)`.
    """

    correlation: Tensor
    inverse: Tensor
    mask: Tensor

    @classmethod
    def about(cls, form: GaussianForm, start: Gaussian, anchor: Gaussian) -> "NaturalGradient":
        """For the family of `form` with fixed parts as in `start`, by the curvature of `anchor`."""
        precision = _precision(anchor)
        own = start.matrix.double()
        free = form.free_scale if form.blocks is None else form.free_scale[:, None]
        if form.blocks is None:
            own = torch.where(free, precision.diagonal(dim1=-2, dim2=-1).rsqrt(), own)
            correlation = own[:, :, None] * precision * own[:, None, :]
        else:
            own = torch.where(free, _factor(precision * form.blocks), own)
            correlation = own.mT @ precision @ own
        active = torch.ones_like(start.loc, dtype=torch.bool) if start.active is None else start.active
        moved = (form.free_loc & active).double()
        both = moved[:, :, None] * moved[:, None, :]
        among = correlation * both + torch.diag_embed(1 - moved)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(among)) * both
        spread = (form.free_scale & active).double()
        mask = spread if form.blocks is None else form.blocks * spread[:, :, None] * spread[:, None, :]
        return cls(correlation, inverse, mask)

    def at(self, positions: Tensor) -> "NaturalGradient":
        """That of the datapoints at `positions`."""
        return NaturalGradient(self.correlation[positions], self.inverse[positions], self.mask[positions])

    def step(self, q: Gaussian, draws: Draws, gradients: Callable[[Tensor], Tensor], rates: Tensor) -> "Stepped":
        r"""One step from `q` at `rates` `(M,)`, with gradients at the mirrored points of the draws' noise.

        Along steep axes the step of m is divided by the curvature that these draws show, where that is larger.

        A datapoint with a gradient that is not finite stays where it is.
        """
        noise, weights = draws.noise, draws.weights.double()[..., None]
        slopes = gradients(torch.cat([q.draw(noise), q.draw(-noise)])).double()
        finite = torch.isfinite(slopes).all(-1).all(0)
        slopes = torch.where(finite[:, None], slopes, torch.zeros_like(slopes))
        noise, scale, rates = noise.double(), q.matrix.double(), rates * finite.double()
        upper, lower = (apply_transpose(scale, part) for part in slopes.chunk(2))
        residual = 0.5 * (lower - upper) - torch.einsum("bij,sbj->sbi", self.correlation, noise)
        residual, slope = residual * weights, 0.5 * ((upper + lower) * weights).mean(0)
        step = torch.einsum("bij,bj->bi", self.inverse, slope)
        if draws.steep.any():
            further = (residual * noise).mean(0).clamp(min=0.0)
            step = torch.where(draws.steep, step / (1 + further), step)
        square = (slope * step).sum(-1).clamp(min=0.0)
        shrink = (longest_step(step.shape[-1]) / (rates * square.sqrt()).clamp(min=1e-300)).clamp(max=1.0)
        loc = q.loc + apply_scale(scale, (step * (rates * shrink)[:, None])[None])[0].to(q.loc.dtype)
        if scale.dim() == 2:
            change = (residual * noise).mean(0) * self.mask
            excess = change.square().sum(-1)
            change = (change * rates[:, None]).clamp(-1.0, 1.0)
            scale = scale * (1 + change + 0.5 * change.square()).rsqrt()
        else:
            change = torch.einsum("sbi,sbj->bij", residual, noise) / len(noise)
            change = 0.5 * (change + change.mT) * self.mask
            excess = change.square().sum((-1, -2))
            change = change * rates[:, None, None]
            change = change / _norm(change, noise[0]).clamp(min=1.0)[:, None, None]
            unit = torch.eye(change.shape[-1], dtype=change.dtype, device=change.device)
            scale = scale @ _factor(unit + change + 0.5 * change @ change)
        q = replace(q, loc=loc, scale=scale.to(q.matrix.dtype))
        return Stepped(q, 0.5 * square + 0.25 * excess, shrink < 1, step * shrink[:, None])


def _precision(gaussian: Gaussian) -> Tensor:
    return torch.cholesky_inverse(gaussian.factor().double())


def _factor(precision: Tensor) -> Tensor:
    """The lower factor of the inverse."""
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(precision)))
    return factor


def _norm(matrices: Tensor, start: Tensor) -> Tensor:
    """The largest absolute eigenvalues of symmetric `matrices` `(M, dim, dim)`, nearly, by the power method: `(M,)`."""
    vector = start[..., None]
    for _ in range(NUM_POWER):
        vector = matrices @ vector
        vector = vector / vector.norm(dim=1, keepdim=True).clamp(min=1e-300)
    norm: Tensor = (matrices @ vector).norm(dim=1)[:, 0]
    return norm
