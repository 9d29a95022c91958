"""`mapa_posterior`: which other datapoints explain each datapoint, known before any model is."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from pyrogaps.density import Data, IndexedData
from pyrogaps.density.data import all_indices
from pyrogaps.density.forms import as_indexed
from pyrogaps.density.structure import check_finite
from pyrogaps.errors import InputError, counted
from pyrogaps.guard import guarded
from pyrogaps.mapa.continuous_bernoulli import ContinuousBernoulliKernel
from pyrogaps.mapa.kernels import BernoulliKernel, CustomKernel, GaussianKernel, Kernel, LogKernel
from pyrogaps.mapa.neighbours import cached, search
from pyrogaps.settings import Count, File, Positive, checked

MAX_DENSE = 4096
NUM_NEIGHBOURS = 128
KERNELS: dict[str, Callable[[float], Kernel]] = {
    "gaussian": GaussianKernel,
    "bernoulli": BernoulliKernel,
    "continuous_bernoulli": ContinuousBernoulliKernel,
}


@dataclass(frozen=True, repr=False)
class MapaPosterior:
    r"""q(i|x_n) over the M datapoints i that most probably explain datapoint n, fixed during training.

    Attributes:
        data: the data set of N datapoints.
        indices: the M datapoints of every row, most probable first, whole numbers `(N, M)`. Among equally probable
            ones, the datapoint itself comes first.
        log_q: log q(i|x_n) of these, `(N, M)`, double precision, nats. Every row of q sums to 1, also for M < N.
        kernel: the kernel that made the posterior; None for a posterior without one.
        distances: the distances that the kernel is a function of, `(N, M)`, ascending; None without a kernel.

    Example:
        >>> import torch, pyrogaps as pg
        >>> posterior = pg.mapa_posterior(torch.randn(20, 2), "gaussian", bandwidth=0.5)
        >>> posterior.to_dense().exp().sum(1).allclose(torch.ones(20, dtype=torch.float64))
        True
    """

    data: IndexedData
    indices: Tensor
    log_q: Tensor
    kernel: Kernel | None = None
    distances: Tensor | None = None

    def __repr__(self) -> str:
        number, neighbours = counted(self.num_datapoints, "datapoint"), counted(self.num_neighbours, "neighbour")
        return f"MapaPosterior({number}, {neighbours} each, kernel {self.kernel})"

    @property
    def num_datapoints(self) -> int:
        """N, the number of datapoints."""
        return len(self.indices)

    @property
    def num_neighbours(self) -> int:
        """M, at most N. With M = N the posterior is dense, and exact."""
        return self.indices.shape[1]

    @checked()
    def with_bandwidth(self, bandwidth: Positive) -> "MapaPosterior":
        """The same posterior with another bandwidth of its kernel, from the distances that it holds.

        Raises `InputError` where the kernel refuses the bandwidth or has none, and for a posterior without a kernel.
        """
        if self.kernel is None or self.distances is None:
            raise InputError("bandwidth: this posterior was not built with a kernel, so it has no bandwidth")
        kernel = self.kernel.with_bandwidth(bandwidth)
        return replace(self, log_q=_normalised(kernel, self.distances), kernel=kernel)

    def to_dense(self) -> Tensor:
        """log q `(N, N)`, columns in the order of the data; -infinity where i is not among the M of datapoint n."""
        dense = torch.full((self.num_datapoints,) * 2, -torch.inf, dtype=self.log_q.dtype, device=self.log_q.device)
        return dense.scatter(1, self.indices.long(), self.log_q)


@guarded
@checked()
def mapa_posterior(
    data: Data,
    likelihood: str | LogKernel,
    *,
    bandwidth: Positive | None = None,
    num_neighbours: Count | None = None,
    cache: File | None = None,
) -> MapaPosterior:
    r"""MAPA: a posterior over the datapoints that explain each datapoint, from the data and a kernel alone.

    $$q(i|x_n) = \kappa(x_n, x_i) / \sum_j \kappa(x_n, x_j)$$

    It approximates the posterior of the empiricalized model, $i \sim U\{1..N\}, x|i \sim p_\theta(x|h_\phi(x_i))$, for
    any model that reconstructs its data.

    Args:
        data: as for `JointDensity`; of several tensors, the kernel compares the first.
        likelihood: that of the model to be trained: "gaussian", "bernoulli" or "continuous_bernoulli", with a
            `bandwidth`; a kernel (`GaussianKernel`, `BernoulliKernel`, `ContinuousBernoulliKernel`); or a function of
            datapoints `(n, *event)` and `(m, *event)` that returns log kappa, `(n, m)`, nats.
        bandwidth: for a likelihood given by its name: a variance near that of the noise, alpha near 1, a temperature.
        num_neighbours: M, the number of datapoints to keep in each row; by default all N up to 4,096, else 128. All
            others have q = 0. Neighbours are found by brute force, see `search`.
        cache: a file (npz) that keeps distances; they are read from it where it exists. They serve every bandwidth.

    Raises:
        InputError: for data that are NaN, infinite or outside the likelihood's support; for a bandwidth that is not
            positive or an alpha outside (0.5, 1); for M outside 1..N; for a cache of other data; for a kernel that
            returns another shape, NaN, +infinity, or -infinity for all pairs of a datapoint.

    Source: Y. Yacoby, W. Pan, F. Doshi-Velez, "Towards Model-Agnostic Posterior Approximation for Fast and Accurate
    Variational Autoencoders" (AABI 2024, arXiv:2403.08941).

    Example:
        >>> import torch, pyrogaps as pg
        >>> pg.mapa_posterior(torch.randn(20, 2), "gaussian", bandwidth=0.5, num_neighbours=5)
        MapaPosterior(20 datapoints, 5 neighbours each, kernel GaussianKernel(variance=0.5))
    """
    kernel = _kernel(likelihood, bandwidth)
    indexed = as_indexed(data)
    x = first_argument(indexed)
    kernel.check(x)
    number = checked_number(num_neighbours, len(x))
    neighbours = search(kernel.compare(x), number) if cache is None else cached(cache, x, kernel, number)
    log_q = _normalised(kernel, neighbours.distances)
    return MapaPosterior(indexed, neighbours.indices, log_q, kernel, neighbours.distances)


def _normalised(kernel: Kernel, distances: Tensor) -> Tensor:
    """log q of sorted distances."""
    # Differences from the nearest are finite for every bandwidth; a narrow kernel of the distances would underflow.
    return torch.log_softmax(kernel.of_distances(distances - distances[:, :1]), 1)


def _kernel(likelihood: str | LogKernel, bandwidth: float | None) -> Kernel:
    """The kernel for a name, a kernel or a user's function."""
    if isinstance(likelihood, str):
        return kernel_named(likelihood, bandwidth)
    if bandwidth is not None:
        raise InputError(
            "bandwidth: has an effect only with a likelihood given by name. Set the bandwidth in the kernel instead"
        )
    return cast(Kernel, likelihood) if hasattr(likelihood, "of_distances") else CustomKernel(likelihood)


def kernel_named(name: str, bandwidth: float | None) -> Kernel:
    """The kernel of a likelihood's name."""
    if name not in KERNELS:
        raise InputError(f"likelihood: must be one of {', '.join(KERNELS)}, a kernel or a function, got '{name}'")
    if bandwidth is None:
        raise InputError(
            f"bandwidth: a {name} likelihood needs one. Start near the noise variance (gaussian), with alpha near 1 "
            "(bernoulli), or with temperature 1 (continuous_bernoulli)"
        )
    return KERNELS[name](bandwidth)


def first_argument(data: IndexedData) -> Tensor:
    """The first argument of all datapoints, `(N, *event)`. Raises `InputError` where it is no such tensor."""
    args = data.fetch(all_indices(data))
    x = args[0] if args else None
    if not isinstance(x, Tensor) or x.dim() == 0 or len(x) != data.num_datapoints:
        raise InputError(
            f"data: the first argument must be a tensor of {counted(data.num_datapoints, 'datapoint')} for the kernel "
            "to compare"
        )
    check_finite([("the first argument", x)], "data", "Remove these datapoints, or impute the values")
    return x.detach()


def checked_number(num_neighbours: int | None, num_datapoints: int) -> int:
    """M, given or by default. Raises `InputError` where it is not from 1 to N."""
    if num_neighbours is None:
        return num_datapoints if num_datapoints <= MAX_DENSE else NUM_NEIGHBOURS
    if not 1 <= num_neighbours <= num_datapoints:
        raise InputError(f"num_neighbours: must be from 1 to N = {num_datapoints}, got {num_neighbours}")
    return num_neighbours
