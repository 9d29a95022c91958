"""Kernels: how well one datapoint explains another, before any model is known."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Protocol, TypeAlias

from torch import Tensor

from pyrogaps.errors import InputError
from pyrogaps.mapa.distances import Comparison, CustomDistances, Mismatches, SquaredDistances
from pyrogaps.settings import Positive, checked, within

LogKernel: TypeAlias = Callable[[Tensor, Tensor], Tensor]
# Elsewhere a Bernoulli kernel is flat, inverted or infinite.
Alpha = Annotated[float, within("above 0.5 and below 1")]


class Kernel(Protocol):
    """A monotone function of a distance. Its bandwidth can change without another search."""

    @property
    def bandwidth(self) -> float:
        """The only hyper-parameter."""
        ...

    @property
    def distance(self) -> str:
        """A name that determines the distance, parameters included; empty for a user's own function."""
        ...

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """log kappa(x_n, y_m) of rows `(n, *)` and `(m, *)`, shape `(n, m)`, double precision, nats."""
        ...

    def check(self, x: Tensor) -> None:
        """Raise `InputError` where `x` `(N, *event)` has values outside the likelihood's support."""
        ...

    def compare(self, x: Tensor) -> Comparison:
        """Distances of the datapoints `x` `(N, *event)` from each other."""
        ...

    def of_distances(self, distances: Tensor) -> Tensor:
        """log kappa of distances from one datapoint, up to a constant of that datapoint."""
        ...

    def with_bandwidth(self, bandwidth: float) -> "Kernel":
        """The same kernel with another bandwidth."""
        ...


@checked("GaussianKernel")
@dataclass(frozen=True)
class GaussianKernel:
    r"""The RBF kernel, for Gaussian likelihoods: $\log \kappa(x, y) = -\lVert x - y \rVert^2 / (2 v)$ [nats].

    Args:
        variance: v, the bandwidth, in squared units of the data; between the model's noise variance and twice that.

    Raises:
        InputError: where `variance` is not positive and finite.

    Example:
        >>> import torch, pyrogaps as pg
        >>> pg.mapa_posterior(torch.randn(20, 2), pg.GaussianKernel(0.5), num_neighbours=5)
        MapaPosterior(20 datapoints, 5 neighbours each, kernel GaussianKernel(variance=0.5))
    """

    variance: Positive

    @property
    def bandwidth(self) -> float:
        return self.variance

    @property
    def distance(self) -> str:
        return "squared Euclidean"

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.of_distances(SquaredDistances.between(flat(x), flat(y)))

    def check(self, x: Tensor) -> None:
        """Accept any data."""

    def compare(self, x: Tensor) -> Comparison:
        return SquaredDistances(flat(x))

    def of_distances(self, distances: Tensor) -> Tensor:
        return -distances / (2 * self.variance)

    def with_bandwidth(self, bandwidth: float) -> "GaussianKernel":
        return replace(self, variance=bandwidth)


@checked("BernoulliKernel")
@dataclass(frozen=True)
class BernoulliKernel:
    r"""Softened agreement, for Bernoulli likelihoods of data of zeros and ones:

    $$\kappa(x, y) = \alpha^{\#\{d: x_d = y_d\}} (1 - \alpha)^{\#\{d: x_d \ne y_d\}}$$

    Args:
        alpha: the bandwidth, between 1/2 (all datapoints explain alike) and 1 (each explains only itself).

    Raises:
        InputError: where `alpha` is not inside (0.5, 1).

    Example:
        >>> import torch, pyrogaps as pg
        >>> x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> pg.mapa_posterior(x, pg.BernoulliKernel(0.9)).to_dense()[0].exp().argmax().item()
        0
    """

    alpha: Alpha

    @property
    def bandwidth(self) -> float:
        return self.alpha

    @property
    def distance(self) -> str:
        return "mismatches"

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        mismatches = Mismatches.between(flat(x), flat(y))
        return x[0].numel() * math.log(self.alpha) + self.of_distances(mismatches)

    def check(self, x: Tensor) -> None:
        if not bool(((x == 0) | (x == 1)).all()):
            raise InputError(
                "data: outside the support of a Bernoulli likelihood, which is 0 and 1. Binarise them, or use "
                "ContinuousBernoulliKernel for values between 0 and 1"
            )

    def compare(self, x: Tensor) -> Comparison:
        return Mismatches(flat(x))

    def of_distances(self, distances: Tensor) -> Tensor:
        return distances * (math.log1p(-self.alpha) - math.log(self.alpha))

    def with_bandwidth(self, bandwidth: float) -> "BernoulliKernel":
        return replace(self, alpha=bandwidth)


@dataclass(frozen=True)
class CustomKernel:
    """A user's function of two batches of datapoints that returns log kappa."""

    log_kernel: LogKernel
    bandwidth: float = math.nan
    distance: str = ""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.log_kernel(x, y)

    def check(self, x: Tensor) -> None:
        """Accept any data; the function may refuse them."""

    def compare(self, x: Tensor) -> Comparison:
        return CustomDistances(x, self.log_kernel)

    def of_distances(self, distances: Tensor) -> Tensor:
        return -distances

    def with_bandwidth(self, bandwidth: float) -> "CustomKernel":
        raise InputError("bandwidth: a custom kernel has no bandwidth. Build a new posterior with a different kernel")


def flat(x: Tensor) -> Tensor:
    """Datapoints as rows, `(N, D)`."""
    return x.reshape(len(x), -1)
