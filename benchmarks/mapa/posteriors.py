"""The posterior over datapoints by each way to know it, brought to the latent line, where the true one can be seen.

There, every posterior is smoothed by one Gaussian kernel of the standard deviation `SMOOTHING`: one over datapoints is
then a density, of which the true one, smoothed alike, is the limit for many datapoints.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

import pyrogaps as pg
from benchmarks.mapa.uniform import uniform_posterior
from pyrogaps.mapa import empiricalized_posterior
from pyrogaps.models.synthetic import SyntheticData, SyntheticModel
from pyrogaps.plots.source import mean_and_error

EMPIRICALIZED, MAPA, WIDER, UNIFORM = "empiricalized", "MAPA", "MAPA, twice the variance", "uniform"
COLUMNS = (
    *("data set", "posterior"),
    *("from the true posterior", "standard error from the true"),
    *("from the empiricalized", "standard error from the empiricalized"),
)
# The prior's standard deviation is 1, and a millionth of its mass lies beyond the line.
SMOOTHING = 0.1
LINE = torch.linspace(-5, 5, 401, dtype=torch.float64)
# For the true posterior, whose steps are sharper than the kernel.
_FINE = torch.linspace(-5, 5, 4001, dtype=torch.float64)


def over_datapoints(data: SyntheticData) -> dict[str, Tensor]:
    """q(i|x_n) over the training data, `(N, N)` each, by name; MAPA's with the variance of the noise and with twice."""
    variance = float(data.truth.variance)
    mapa = pg.mapa_posterior(data.train, "gaussian", bandwidth=variance)
    found = {
        EMPIRICALIZED: empiricalized_posterior(data.truth, data.latents["train"], data.train),
        MAPA: mapa,
        WIDER: mapa.with_bandwidth(2 * variance),
        UNIFORM: uniform_posterior(data.train),
    }
    return {name: posterior.to_dense().exp() for name, posterior in found.items()}


def smoothed(q: Tensor, z: Tensor) -> Tensor:
    """The density on `LINE` of posteriors `q` `(R, N)` over datapoints with latents `z` `(N, 1)`, `(R, 401)`."""
    return q @ _kernel(z[:, 0].double())


def true_posterior(model: SyntheticModel, x: Tensor) -> Tensor:
    """The smoothed p(z|x) of `x` `(R, 2)` on `LINE`, `(R, 401)`."""
    masses = model.log_posterior(x, _FINE).softmax(1)
    return masses @ _kernel(_FINE)


def _kernel(z: Tensor) -> Tensor:
    """The kernel around each of `z` `(G,)` on `LINE`, `(G, 401)`."""
    return (-((LINE - z[:, None]) / SMOOTHING).square() / 2).exp() / (math.sqrt(2 * math.pi) * SMOOTHING)


def distances(data_set: str, data: SyntheticData) -> Iterator[list[object]]:
    """How far each posterior lies from the true one and from the empiricalized model's, a row for each.

    The distance is the total variation between the two smoothed densities, from 0 to 1; its mean over datapoints, with
    the standard error.
    """
    truth = true_posterior(data.truth, data.train)
    densities = {name: smoothed(q, data.latents["train"]) for name, q in over_datapoints(data).items()}
    for name, density in densities.items():
        to_empiricalized = (None, None) if name == EMPIRICALIZED else _distance(density, densities[EMPIRICALIZED])
        yield [data_set, name, *_distance(density, truth), *to_empiricalized]


def _distance(one: Tensor, other: Tensor) -> tuple[float, float]:
    variation = (one - other).abs().sum(1) * (LINE[1] - LINE[0]) / 2
    return mean_and_error(variation.numpy())
