"""The VAE that the benchmarks measure inference in, trained on statically binarised MNIST (if quick, on digits).

Latent 50, decoder 50-200-200-784, encoder 784-200-200-(50, 50), ELU: the network of Cremer, Li and Duvenaud
(arXiv:1801.03558). A run that was stopped continues from its checkpoint, one that has finished is loaded from it.
"""

from pathlib import Path

from torch import Tensor

import pyrogaps as pg
from pyrogaps.datasets import MNIST, Digits
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.vae import VAE
from pyrogaps.streams import seeded
from pyrogaps.training import Staircase

LATENT, HIDDEN = 50, (200, 200)


def trained_vae(runs: Path, *, quick: bool, num_epochs: int = 30) -> tuple[VAE, AmortizedNormal, Tensor]:
    """Model, guide and test images `(N, height, width)`; `runs` is the folder of the checkpoint."""
    data = Digits() if quick else MNIST()
    height, width = data.image_shape
    latent, hidden = (8, (32,)) if quick else (LATENT, HIDDEN)
    with seeded(0, "benchmark networks"):
        model = VAE(height * width, latent, hidden)
        guide = AmortizedNormal(height * width, latent, hidden)
    num_epochs = 3 if quick else num_epochs
    runs.mkdir(parents=True, exist_ok=True)
    pg.train(
        model,
        guide,
        data.train,
        num_epochs=num_epochs,
        batch_size=100,
        schedule=Staircase(num_epochs),
        optimizer_options={"eps": 1e-4},
        checkpoint=runs / ("digits-quick.pt" if quick else "mnist.pt"),
    )
    for parameter in [*model.parameters(), *guide.parameters()]:
        parameter.requires_grad_(False)
    return model, guide, data.test
