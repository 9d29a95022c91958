"""Priors for a decoder that MAPA trained: each makes a model whose decoder takes standard Normal noise."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from pyrogaps.mapa import MonotoneTransport, aggregated_transport, recovered_transport
from pyrogaps.models.synthetic import SyntheticModel

# Of the rank map: the likeliest of all priors for the validation data is taken.
NUM_PIECES = (8, 32)
# Points of the aggregated posterior's grid are this many standard deviations of the noise apart, as long as there are
# few enough of them.
SPACING, MAX_POINTS = 0.5, 1000
AGGREGATED = "aggregated posterior"


def transports(model: SyntheticModel, latents: Tensor, x: Tensor) -> Iterator[tuple[str, MonotoneTransport]]:
    """Maps from noise to the latents `(N, 1)` of the data `x` `(N, 2)`, by name."""
    for pieces in NUM_PIECES:
        yield f"ranks, {pieces} pieces", recovered_transport(latents, num_pieces=pieces)
    z = along(model, latents)
    yield AGGREGATED, aggregated_transport(log_likelihood(model, x, z), z)


def with_transport(model: SyntheticModel, transport: MonotoneTransport) -> SyntheticModel:
    """The generative model: noise, the transport, then the decoder that was trained."""
    whole = SyntheticModel(model.curve)
    whole.decoder = nn.Sequential(transport, model.decoder)
    return whole


def along(model: SyntheticModel, latents: Tensor) -> Tensor:
    """Latents `(G,)`, ascending, at equal distances along the decoder's curve, from the least of `latents` to the last.

    Where the decoder stands still, they move on slowly.
    """
    fine = torch.linspace(float(latents.min()), float(latents.max()), 4001, dtype=torch.float64)
    with torch.no_grad():
        steps = model.decoder(fine[:, None].to(latents)).double().diff(dim=0).norm(dim=1)
    number = math.ceil(float(steps.sum()) / (SPACING * float(model.variance) ** 0.5))
    steps = steps + 1e-3 * steps.mean()
    length = np.concatenate([[0.0], steps.cumsum(0).numpy()])
    wanted = np.linspace(0, length[-1], min(max(number, 10), MAX_POINTS))
    return torch.from_numpy(np.interp(wanted, length, fine.numpy())).to(latents)


def log_likelihood(model: SyntheticModel, x: Tensor, z: Tensor) -> Tensor:
    """log p(x_n | z_g) of `x` `(N, 2)` at `z` `(G,)`: `(N, G)`, nats, double precision."""
    variance = float(model.variance)
    with torch.no_grad():
        means = model.decoder(z[:, None]).double()
    return -torch.cdist(x.double(), means).square() / (2 * variance) - math.log(2 * math.pi * variance)
