"""The prior of a model trained by MAPA, recovered from its latents. Training does not constrain them."""

import warnings
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from scipy import interpolate, optimize, stats  # type: ignore[import-untyped]
from torch import Tensor, nn

from pyrogaps.errors import InputError
from pyrogaps.settings import Count, Seed, checked

Array = NDArray[np.float64]


class MonotoneTransport(nn.Module):
    """A non-decreasing cubic spline z = T(eps), linear beyond its ends; made by `recovered_transport`.

    `breaks` `(P + 1,)` ascend. `coefficients` `(P, 4)` are those of (eps - break)^3, ^2, ^1 and ^0 on each piece.
    """

    breaks: Tensor
    coefficients: Tensor
    slopes: Tensor

    def __init__(self, breaks: Tensor, coefficients: Tensor) -> None:
        super().__init__()
        a, b, c, _ = coefficients[-1]
        width = breaks[-1] - breaks[-2]
        self.register_buffer("breaks", breaks)
        self.register_buffer("coefficients", coefficients)
        self.register_buffer("slopes", torch.stack([coefficients[0, 2], (3 * a * width + 2 * b) * width + c]))

    def forward(self, eps: Tensor) -> Tensor:
        """T of `eps`, of any shape, elementwise."""
        first, last = self.breaks[0], self.breaks[-1]
        inside = torch.minimum(torch.maximum(eps, first), last)
        piece = torch.bucketize(inside.detach().contiguous(), self.breaks[1:-1], right=True)
        a, b, c, d = self.coefficients[piece].unbind(-1)
        step = inside - self.breaks[piece]
        value = ((a * step + b) * step + c) * step + d
        return value + self.slopes[0] * (eps - first).clamp(max=0) + self.slopes[1] * (eps - last).clamp(min=0)


@checked()
def recovered_transport(latents: Tensor, *, num_pieces: Count | None = None) -> MonotoneTransport:
    r"""The map T from standard Normal noise to one-dimensional latents: z = T(eps), eps ~ N(0, 1).

    The copula transform turns latents into Gaussian scores by their ranks (ties get their mean rank),

    $$\epsilon_n = \Phi^{-1}\big(\mathrm{rank}(z_n) / (N + 1)\big)$$

    and T is the non-decreasing cubic spline that minimises $\sum_n (T(\epsilon_n) - z_n)^2$. With a trained decoder f,
    `nn.Sequential(transport, f)` is the decoder of a model with prior N(0, 1). A decreasing T would give the same
    model, since N(0, 1) is symmetric.

    Args:
        latents: h(x_n), `(N,)` or `(N, 1)`.
        num_pieces: P, the number of pieces of T, each for an equal share of the latents; by default 2 N^(1/3), rounded.
            More pieces follow the latents more closely, noise included.

    Raises:
        InputError: for latents of another shape, NaN or infinite, or all equal, and for P below 1.

    Source: prior recovery by Y. Yacoby et al. (AABI 2024, arXiv:2403.08941); monotone splines by J. O. Ramsay
    (Statistical Science 3, 1988, doi:10.1214/ss/1177012761).
    """
    if latents.dim() == 2 and latents.shape[1] == 1:
        latents = latents[:, 0]
    if latents.dim() != 1:
        raise InputError(
            f"latents: a transport needs one-dimensional latents of shape (N,) or (N, 1), got {tuple(latents.shape)}"
        )
    z = _checked(latents[:, None])[:, 0]
    pieces = max(1, round(2 * len(z) ** (1 / 3))) if num_pieces is None else num_pieces
    center, scale = z.mean(), z.std()
    eps = stats.norm.ppf(stats.rankdata(z) / (len(z) + 1))
    ends = eps.min(), eps.max()
    inner = stats.norm.ppf(np.linspace(stats.norm.cdf(ends[0]), stats.norm.cdf(ends[1]), pieces + 1))[1:-1]
    spline = _monotone_spline(eps, (z - center) / scale, np.array([ends[0], *inner, ends[1]]))
    breaks, coefficients = spline.x[3:-3], spline.c[:, 3:-3].T * scale
    coefficients[:, 3] += center
    return MonotoneTransport(torch.from_numpy(breaks).to(latents), torch.from_numpy(coefficients).to(latents))


def _monotone_spline(x: Array, y: Array, breaks: Array) -> Any:
    """The least-squares cubic spline with non-decreasing B-spline coefficients, which make it non-decreasing."""
    knots = np.concatenate([[breaks[0]] * 3, breaks, [breaks[-1]] * 3])
    number = len(knots) - 4
    basis = interpolate.BSpline.design_matrix(x, knots, 3).toarray()
    basis_of_increments = basis @ np.tri(number)
    lower = np.array([-np.inf, *[0.0] * (number - 1)])
    increments = optimize.lsq_linear(basis_of_increments, y, (lower, np.inf), method="bvls").x
    return interpolate.PPoly.from_spline(interpolate.BSpline(knots, np.cumsum(increments), 3))


@checked()
def recovered_prior(
    latents: Tensor, *, num_components: Count | None = None, max_components: Count = 16, seed: Seed = 0
) -> Any:
    """A mixture of Gaussians fitted to latents of any dimension: a Pyro distribution of event shape `(D,)`.

    It replaces the prior: `pyro.sample("z", recovered_prior(latents))`. In one dimension, `recovered_transport` follows
    the latents more closely.

    Args:
        latents: h(x_n), `(N, D)`.
        num_components: the number of components, each with its own covariance. By default BIC chooses among the powers
            of 2 up to `max_components` that leave at least two latents for each parameter.
        max_components: the largest number to choose from.
        seed: the seed of the fit.

    Raises:
        InputError: for latents of another shape, NaN or infinite, or all equal in some dimension, and for a number of
            components below 1 or above N.
    """
    if latents.dim() != 2:
        raise InputError(f"latents: expected a matrix (N, D), got shape {tuple(latents.shape)}")
    z = _checked(latents)
    if num_components is not None and num_components > len(z):
        raise InputError(f"num_components: must be from 1 to N = {len(z)}, got {num_components}")
    center, scale = z.mean(0), z.std(0)
    choices = [num_components] if num_components is not None else _choices(len(z), z.shape[1], max_components)
    mixture = _fitted((z - center) / scale, choices, seed)
    covariance = scale[:, None] * mixture.covariances_ * scale
    weights, means, tril = (
        torch.from_numpy(part).to(latents)
        for part in (mixture.weights_, center + scale * mixture.means_, np.linalg.cholesky(covariance))
    )
    return dist.MixtureSameFamily(dist.Categorical(weights), dist.MultivariateNormal(means, scale_tril=tril))


def _choices(num_latents: int, dim: int, max_components: int) -> list[int]:
    """Numbers of components that leave at least two latents for each parameter, and always 1."""
    num_parameters = 1 + dim + dim * (dim + 1) // 2
    powers = [2**exponent for exponent in range(1, max_components.bit_length())]
    return [1, *(components for components in powers if 2 * components * num_parameters <= num_latents)]


def _fitted(z: Array, choices: list[int], seed: int) -> Any:
    """The fit of least BIC among the numbers of components `choices`."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture  # imported here, because it takes half a second

    with warnings.catch_warnings():
        # A fit that has not converged in a hundred iterations is still a density, and BIC judges it as one.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fits = [GaussianMixture(number, random_state=seed % 2**32).fit(z) for number in choices]
    return min(fits, key=lambda fit: fit.bic(z))


def _checked(latents: Tensor) -> Array:
    """The latents `(N, D)` in double precision. Raises `InputError` where no distribution can be fitted to them."""
    z: Array = latents.detach().cpu().double().numpy()
    if not np.isfinite(z).all():
        raise InputError(
            "latents: they contain NaN or infinite values, so training has probably diverged. Lower the learning rate"
        )
    if len(z) < 2 or (z.max(0) == z.min(0)).any():
        raise InputError(
            "latents: all are equal in some dimension, so no distribution can be fitted. The encoder has probably "
            "collapsed; train it again"
        )
    return z
