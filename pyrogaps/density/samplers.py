"""Draws that follow their density, for distributions of torch and Pyro whose own samplers do not."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrogaps.density.layout import leaf
from pyrogaps.errors import InputError

NUM_ANGLES = 4097
NUM_TERMS = 256


# Latents of these cannot be drawn.
WITHOUT_DRAWS = {
    "ImproperUniform": "it has no normalised density, so log p(x) is not defined. Use a proper prior, such as a wide "
    "Normal",
}


class ExactDraws(Messenger):
    """Gives every site that is drawn inside a sampler that follows its density; refuses sites that have none."""

    def _pyro_sample(self, message: Any) -> None:
        reason = WITHOUT_DRAWS.get(kind := type(leaf(message["fn"])).__name__)
        if reason is not None and not message["is_observed"]:
            raise InputError(f"site '{message['name']}': {kind} as a latent: {reason}")
        message["fn"] = exact(message["fn"])


def exact(fn: Any) -> Any:
    """`fn`, or a copy of it that draws from its density where its own sampler does not."""
    if (draw := SAMPLERS.get(type(fn).__name__)) is not None:
        return with_method(fn, "sample", partial(draw, fn))
    for name in ("base_dist", "_component_distribution"):
        inner = getattr(fn, "__dict__", {}).get(name)
        if inner is not None and (better := exact(inner)) is not inner:
            return with_method(fn, name, better)
    return fn


def with_method(fn: Any, name: str, value: Any) -> Any:
    """A copy of `fn` with another method or part of this name."""
    other = copy.copy(fn)
    other.__dict__[name] = value
    return other


def _lkj_cholesky(fn: Any, sample_shape: Any = ()) -> Tensor:
    """Row i is uniform on a sphere of squared radius Beta(i / 2, eta + (dim - 1 - i) / 2), i from 0.

    The onion method of Lewandowski, Kurowicka and Joe (2009). torch 2.14 takes i - 1/2 for the first parameter, which
    is right in two dimensions alone.
    """
    row = torch.arange(1, fn.dim, dtype=fn.concentration.dtype, device=fn.concentration.device)
    rest = fn.concentration[..., None] + (fn.dim - 1 - row) / 2
    square = torch.distributions.Beta((row / 2).expand_as(rest), rest).sample(torch.Size(sample_shape))
    square = torch.nn.functional.pad(square, (1, 0))
    normal = torch.randn(*square.shape, fn.dim, dtype=square.dtype, device=square.device).tril(-1)
    length = normal.norm(dim=-1, keepdim=True)
    below = square.sqrt()[..., None] * normal / torch.where(length > 0, length, torch.ones_like(length))
    smallest = torch.finfo(square.dtype).tiny
    return below + torch.diag_embed((1 - square).clamp(min=smallest).sqrt())


def _sine_bivariate_von_mises(fn: Any, sample_shape: Any = ()) -> Tensor:
    r"""phi from its marginal, proportional to $e^{\kappa_1 \cos\phi} I_0(r)$ with $r^2 = \kappa_2^2 + \rho^2
    \sin^2\phi$, by inversion on a grid; then psi given phi from a von Mises distribution of concentration r.
    """
    angle = torch.linspace(-math.pi, math.pi, NUM_ANGLES, dtype=torch.float64, device=fn.phi_loc.device)
    first, second, rho = (
        part.double()[..., None] for part in (fn.phi_concentration, fn.psi_concentration, fn.correlation)
    )
    radius = torch.hypot(second, rho * angle.sin())
    log_density = first * angle.cos() + radius + torch.special.i0e(radius).log()
    density = (log_density - log_density.amax(-1, keepdim=True)).exp()
    cells = torch.nn.functional.pad(torch.cumulative_trapezoid(density, angle), (1, 0))
    shape = torch.Size(sample_shape) + fn.batch_shape
    level = torch.rand(shape, dtype=torch.float64, device=angle.device) * cells[..., -1]
    cells = cells.expand(*shape, NUM_ANGLES)
    right = torch.searchsorted(cells.contiguous(), level[..., None].contiguous()).clamp(1, NUM_ANGLES - 1)
    low, high = cells.gather(-1, right - 1)[..., 0], cells.gather(-1, right)[..., 0]
    right = right[..., 0]
    share = (level - low) / (high - low).clamp(min=torch.finfo(torch.float64).tiny)
    phi = angle[right - 1] + share * (angle[right] - angle[right - 1])
    slope = fn.correlation.double() * phi.sin()
    concentration = fn.psi_concentration.double().expand(shape)
    psi = torch.distributions.VonMises(torch.atan2(slope, concentration), torch.hypot(concentration, slope)).sample()
    both = torch.stack([phi + fn.phi_loc, psi + fn.psi_loc], -1)
    turned: Tensor = (both + math.pi) % (2 * math.pi) - math.pi
    return turned.to(fn.phi_loc.dtype)


def _truncated_polya_gamma(fn: Any, sample_shape: Any = ()) -> Tensor:
    """The series of exponential variables, with the mean of what is left out; Pyro's has 8 terms."""
    shape = torch.Size(sample_shape) + fn.batch_shape
    terms = torch.empty(*shape, NUM_TERMS, dtype=fn.prototype.dtype, device=fn.prototype.device).exponential_()
    denominators = (torch.arange(NUM_TERMS, dtype=terms.dtype, device=terms.device) + 0.5).square()
    total = (terms / denominators).sum(-1) + 1 / NUM_TERMS
    return (total / (2 * math.pi**2)).clamp(max=fn.truncation_point)


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "LKJCholesky": _lkj_cholesky,
    "LKJCorrCholesky": _lkj_cholesky,
    "SineBivariateVonMises": _sine_bivariate_von_mises,
    "TruncatedPolyaGamma": _truncated_polya_gamma,
}
