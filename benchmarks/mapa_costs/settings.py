"""What the measurements share: the images, how they are explained, and how long everything is."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pyrogaps.datasets import MNIST, Digits
from pyrogaps.mapa import MapaPosterior, mapa_posterior

BATCH_SIZE, NUM_NEIGHBOURS = 100, 100
# By KL(true || MAPA) over the neighbours, 0.55 comes nearest to the posterior of a decoder trained on 6,000 images. It
# draws many neighbours; 0.9, near 1 as the kernel's alpha is meant to be, draws few, again and again.
BANDWIDTHS = (0.55, 0.9)


@dataclass(frozen=True)
class Settings:
    """Where files lie, how much is measured (see the command's help), and the seed."""

    runs: Path
    quick: bool
    num_rounds: int
    num_draws: int
    seed: int

    @property
    def cache(self) -> Path:
        """The file of distances of all training images."""
        return self.runs / "distances.npz"

    def images(self) -> Tensor:
        """The training images: binarised MNIST; if quick, digits."""
        data = Digits(num_test=1) if self.quick else MNIST(num_test=1)
        return data.train

    def posterior(self, x: Tensor) -> MapaPosterior:
        """MAPA's posterior of the images `x` with the first bandwidth; its distances are kept in `cache`."""
        return mapa_posterior(x, "bernoulli", bandwidth=BANDWIDTHS[0], num_neighbours=NUM_NEIGHBOURS, cache=self.cache)
