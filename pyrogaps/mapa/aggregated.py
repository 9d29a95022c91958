"""The prior of a model with one latent dimension, recovered as its aggregated posterior."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import interpolate, stats  # type: ignore[import-untyped]
from torch import Tensor

from pyrogaps.errors import InputError
from pyrogaps.mapa.prior import MonotoneTransport
from pyrogaps.settings import Count, checked

# The share of the mass that is spread evenly, without which T would not be a function where the prior has a hole.
FLOOR = 1e-4


@checked()
def aggregated_transport(log_likelihood: Tensor, z: Tensor, *, num_steps: Count = 1) -> MonotoneTransport:
    r"""The map T from standard Normal noise to the aggregated posterior: z = T(eps), eps ~ N(0, 1).

    On the points z_1 < .. < z_G of a grid, from equal masses,

    $$p_{k+1}(z_g) = \frac1N \sum_n p_k(z_g | x_n)
      = p_k(z_g) \, \frac1N \sum_n \frac{p(x_n | z_g)}{\sum_h p_k(z_h) \, p(x_n | z_h)}$$

    Each step is one of EM: the mean of log p(x_n) [nats] under the prior p_k never falls. The first step smooths by the
    noise. After many, the prior follows the sample.

    `recovered_transport` knows the latents alone. It leaves mass between groups of latents, where the decoder crosses
    over from one to the next, and believes an encoder that misplaces datapoints. This one does neither.

    Args:
        log_likelihood: log p(x_n | z_g) of the trained model, `(N, G)`, nats.
        z: the grid, ascending, `(G,)`; some 200 points, best at equal distances along the decoder's curve f(z). Every
            point stands for the values up to the middle of its neighbours.
        num_steps: of EM.

    Raises:
        InputError: for a grid of fewer than two points, or one that does not ascend; for a log-likelihood of another
            shape, NaN or +infinity, or -infinity at all points for a datapoint.
    """
    if z.dim() != 1 or len(z) < 2 or not bool((z.diff() > 0).all()):
        raise InputError("z: the grid must have shape (G,), G of at least 2, and ascend. Sort it, without repetitions")
    if log_likelihood.dim() != 2 or log_likelihood.shape[1] != len(z) or len(log_likelihood) == 0:
        raise InputError(
            f"log_likelihood: expected shape (N, {len(z)}), a column for each point of the grid, got "
            f"{tuple(log_likelihood.shape)}"
        )
    masses = aggregated_masses(log_likelihood, num_steps).numpy()
    points = z.detach().cpu().double().numpy()
    edges = np.concatenate([points[:1], (points[1:] + points[:-1]) / 2, points[-1:]])
    spline = interpolate.PchipInterpolator(_noise(masses), edges)
    return MonotoneTransport(torch.from_numpy(spline.x).to(z), torch.from_numpy(spline.c.T.copy()).to(z))


def aggregated_masses(log_likelihood: Tensor, num_steps: int) -> Tensor:
    """p_k of the grid's points after k = `num_steps`, `(G,)`, double precision."""
    scaled = log_likelihood.detach().cpu().double()
    scaled = scaled - scaled.amax(1, keepdim=True)  # a constant of the datapoint cancels
    if not bool(torch.isfinite(scaled.amax(1)).all()):
        raise InputError(
            "log_likelihood: it is NaN, infinite, or -infinity everywhere for a datapoint. Check the decoder's values"
        )
    likelihood = scaled.exp()
    masses = torch.full((likelihood.shape[1],), 1 / likelihood.shape[1], dtype=torch.float64)
    for _ in range(num_steps):
        masses = masses * (likelihood / (likelihood @ masses)[:, None]).mean(0)
    return masses


def _noise(masses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard Normal quantiles of the edges of cells with these masses, `(G + 1,)`; ends are cut off at the floor."""
    shares = np.concatenate([[0.0], np.cumsum((1 - FLOOR) * masses + FLOOR / len(masses))])
    end = FLOOR / len(masses) / 2
    quantiles: NDArray[np.float64] = stats.norm.ppf(np.clip(shares, end, 1 - end))
    return quantiles
