"""`mapa_posterior`: which other datapoints explain this one, known before any model is."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from pyrogaps.density import Data, IndexedData
from pyrogaps.density.data import all_indices, as_indexed, as_tuple
from pyrogaps.density.structure import check_finite
from pyrogaps.errors import InputError
from pyrogaps.mapa.continuous_bernoulli import ContinuousBernoulliKernel
from pyrogaps.mapa.kernels import BernoulliKernel, GaussianKernel, Kernel, LogKernel, OwnKernel
from pyrogaps.mapa.neighbours import Neighbours, cached, search

MAX_DENSE = 4096
NUM_NEIGHBOURS = 128
KERNELS: dict[str, Callable[[float], Kernel]] = {
    "gaussian": GaussianKernel,
    "bernoulli": BernoulliKernel,
    "continuous_bernoulli": ContinuousBernoulliKernel,
}


@dataclass(frozen=True)
class MapaPosterior:
    r"""q(i|x_n) over the datapoints i that may explain datapoint n, the M most probable of them, fixed while training.

    Attributes:
        data: the data set of N datapoints.
        indices: the M datapoints of every row, most probable first, whole numbers `(N, M)`; among equally probable
            ones a datapoint itself comes first.
        log_q: log q(i|x_n) of these, `(N, M)`, double precision, nats; the rows sum to 1, whatever was left out.
        kernel: what it was made with; None for a posterior that no kernel made.
        distances: what the kernel is a function of, `(N, M)`, ascending; None without a kernel.
    """

    data: IndexedData
    indices: Tensor
    log_q: Tensor
    kernel: Kernel | None = None
    distances: Tensor | None = None

    @property
    def num_datapoints(self) -> int:
        """N."""
        return len(self.indices)

    @property
    def num_neighbours(self) -> int:
        """M, at most N; where it is N the posterior is exact, or dense."""
        return self.indices.shape[1]

    def with_bandwidth(self, bandwidth: float) -> "MapaPosterior":
        """The same posterior with another bandwidth of its kernel, from the distances that are known already.

        Raises `InputError` where the kernel refuses the bandwidth or has none, or where no kernel made the posterior.
        """
        if self.kernel is None or self.distances is None:
            raise InputError("bandwidth: this posterior comes from no kernel, so it has none")
        kernel = self.kernel.with_bandwidth(bandwidth)
        return replace(self, log_q=_normalised(kernel, self.distances), kernel=kernel)

    def to_dense(self) -> Tensor:
        """log q `(N, N)`, datapoints in their order, -infinity where datapoint i is not among the M of datapoint n."""
        dense = torch.full((self.num_datapoints,) * 2, -torch.inf, dtype=self.log_q.dtype, device=self.log_q.device)
        return dense.scatter(1, self.indices.long(), self.log_q)


def mapa_posterior(
    data: Data,
    likelihood: str | Kernel | LogKernel,
    *,
    bandwidth: float | None = None,
    num_neighbours: int | None = None,
    cache: str | Path | None = None,
) -> MapaPosterior:
    r"""MAPA: a posterior over the datapoints that explain each one, made of the data and a kernel alone.

    $$q(i|x_n) = \kappa(x_n, x_i) / \sum_j \kappa(x_n, x_j)$$

    It approximates the posterior of the empiricalized model, $i \sim U\{1..N\}, x|i \sim p_\theta(x|h_\phi(x_i))$, for
    any model that reconstructs its data.

    Args:
        data: as for `JointDensity`; of several tensors the kernel sees the first.
        likelihood: of the model to be trained: "gaussian", "bernoulli" or "continuous_bernoulli", with a `bandwidth`;
            a kernel (`GaussianKernel`, `BernoulliKernel`, `ContinuousBernoulliKernel`); or a function of datapoints
            `(n, *event)` and `(m, *event)` that returns log kappa, `(n, m)`, nats.
        bandwidth: of a likelihood given by its name: a variance near that of the noise, alpha near 1, a temperature.
        num_neighbours: M, how many datapoints to keep of each row; by default all N up to 4,096 of them, else 128.
            The rest counts as q = 0. Neighbours are found by brute force, see `search`.
        cache: a file (npz) to keep distances in, which no bandwidth changes, or to read them from.

    Raises:
        InputError: for data that are NaN, infinite or outside the likelihood's support; a bandwidth that is not
            positive or an alpha outside (0.5, 1); M outside 1..N; a cache that belongs to other data; a kernel that
            returns another shape, NaN, +infinity, or nothing but -infinity for a datapoint.

    Source: Y. Yacoby, "Towards Model-Agnostic Posterior Approximation for Fast and Accurate Variational Autoencoders"
    (AABI 2024, arXiv:2403.08941).
    """
    kernel = _kernel(likelihood, bandwidth)
    indexed = as_indexed(data)
    x = first_argument(indexed)
    kernel.check(x)
    number = checked_number(num_neighbours, len(x))
    found = search(kernel.compare(x), number) if cache is None else cached(cache, x, kernel, number)
    return of_neighbours(indexed, kernel, found)


def of_neighbours(data: IndexedData, kernel: Kernel, neighbours: Neighbours) -> MapaPosterior:
    """The posterior of neighbours found already, by `search` or otherwise, distances ascending in each row."""
    log_q = _normalised(kernel, neighbours.distances)
    return MapaPosterior(data, neighbours.indices, log_q, kernel, neighbours.distances)


def _normalised(kernel: Kernel, distances: Tensor) -> Tensor:
    # Differences from the nearest, which is finite: a narrow kernel would else be infinitely small, or large, all over.
    return torch.log_softmax(kernel.of_distances(distances - distances[:, :1]), 1)


def _kernel(likelihood: str | Kernel | LogKernel, bandwidth: float | None) -> Kernel:
    if isinstance(likelihood, str):
        return _kernel_named(likelihood, bandwidth)
    if not callable(likelihood):
        raise InputError(
            "likelihood: expected a name, a kernel or a function that returns log kappa, got "
            f"{type(likelihood).__name__}"
        )
    if bandwidth is not None:
        raise InputError("bandwidth: only a likelihood that is given by its name takes one; give it to the kernel")
    return cast(Kernel, likelihood) if hasattr(likelihood, "of_distances") else OwnKernel(likelihood)


def _kernel_named(name: str, bandwidth: float | None) -> Kernel:
    """The kernel of a likelihood's name. Raises `InputError` for another name, or without a bandwidth."""
    if name not in KERNELS:
        raise InputError(f"likelihood: must be one of {', '.join(KERNELS)}, a kernel or a function, got '{name}'")
    if bandwidth is None:
        raise InputError(
            f"bandwidth: a {name} likelihood needs one: near the noise variance (gaussian), alpha near 1 (bernoulli), "
            "or a temperature such as 1 (continuous_bernoulli)"
        )
    return KERNELS[name](bandwidth)


def first_argument(data: IndexedData) -> Tensor:
    """The first of a data set's arguments, all of it, `(N, *event)`. Raises `InputError` where it is no such tensor."""
    x = as_tuple(data.fetch(all_indices(data)))[0]
    if not isinstance(x, Tensor) or x.dim() == 0 or len(x) != data.num_datapoints:
        raise InputError(
            f"data: the first argument must be a tensor of {data.num_datapoints} datapoints, which the kernel compares"
        )
    check_finite([("the first argument", x)], "data", "clean or impute them first")
    return x.detach()


def checked_number(num_neighbours: int | None, num_datapoints: int) -> int:
    """M, given or by default. Raises `InputError` where it is not from 1 to N."""
    if num_neighbours is None:
        return num_datapoints if num_datapoints <= MAX_DENSE else NUM_NEIGHBOURS
    if not 1 <= num_neighbours <= num_datapoints:
        raise InputError(f"num_neighbours: must be from 1 to N = {num_datapoints}, got {num_neighbours}")
    return num_neighbours
