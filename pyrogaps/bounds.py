"""ELBO and IWAE: lower bounds of log p(x) from a guide's importance weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyrogaps.capture import GradientEvaluator
from pyrogaps.density import Data
from pyrogaps.density.draws import BlockedGuide, Posterior
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.guard import guarded
from pyrogaps.log_weights import Estimate, log_mean_exp_estimate, mean_estimate
from pyrogaps.memory import free_cycles
from pyrogaps.problem import Problem
from pyrogaps.run import Run
from pyrogaps.settings import Count, Plate, Seed, checked
from pyrogaps.streams import Chunk, Stream, particle_blocks

Density = Callable[[Tensor, Tensor], Tensor]
# Above this many evaluations, recording the density first (about 0.5 s) is faster.
RECORDING_THRESHOLD = 100_000


def chunk_log_weights(
    density: Density, posterior: Posterior, chunk: Chunk, num_particles: int, stream: Stream
) -> Tensor:
    """log w = log p(x, z) - log q(z | x) of draws from `posterior`, `(S, B)` in double precision, nats.

    `density` gives log p(x, z): a `JointDensity`, or a `GradientEvaluator` where there is much to evaluate.

    Raises `InputError` naming datapoints whose weights are NaN or +infinity.
    """
    guide, parts = BlockedGuide(posterior, chunk), []
    with torch.no_grad():
        for first, size in enumerate(particle_blocks(num_particles)):
            z, log_q = guide.sample(size, stream, first)
            parts.append(density(z, chunk.indices).double() - log_q.double())
            free_cycles()
    return refuse_nan(torch.cat(parts), chunk.indices)


def refuse_nan(log_weights: Tensor, indices: Tensor) -> Tensor:
    """`log_weights` `(S, B)` of the datapoints `indices`, or an `InputError` that names those with NaN or +infinity."""
    bad = (torch.isnan(log_weights) | (log_weights == torch.inf)).any(0)
    if bool(bad.any()):
        raise InputError(
            f"datapoints {first_few(bad, indices)}: log p(x, z) - log q(z) is NaN or infinite for some draws. Check "
            "the parameters of model and guide for overflow or scales near zero"
        )
    return log_weights


def first_few(bad: Tensor, indices: Tensor) -> str:
    """The first five of the datapoints `indices` `(B,)` that are `bad` `(B,)`, in words; one may stand there twice."""
    return ", ".join(str(n) for n in list(dict.fromkeys(indices[bad.cpu()].tolist()))[:5])


@guarded
@checked()
def elbo(
    model: Program | Problem,
    guide: Program | Posterior | None = None,
    data: Data | None = None,
    *,
    num_particles: Count = 1000,
    plate: Plate = None,
    batch_size: Count = 64,
    seed: Seed = 0,
    progress: bool = True,
) -> Estimate:
    r"""The evidence lower bound of every datapoint.

    $$\mathcal L[q](x_n) = \mathbb E_{q(z|x_n)} [\log p(x_n, z) - \log q(z|x_n)] \le \log p(x_n)$$

    Args:
        model, guide, data, plate: as for `JointDensity` and `GuideDensity`; or a `Problem` alone.
        num_particles: S, draws per datapoint.
        batch_size: datapoints held at once; it does not change the result.
        seed: of all the randomness.
        progress: whether to show a progress bar once the call has taken two seconds.

    Returns:
        An `Estimate` in nats: `value` and `mcse` `(N,)`, `log_weights` `(S, N)`.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> bound = pg.elbo(model, guide, x)
        >>> bound.value.shape, bound.direction
        (torch.Size([6]), 'lower bound')
    """
    problem = Problem.of(model, guide, data, plate)
    return mean_estimate(log_weights_of(problem, num_particles, Run(seed, batch_size, progress)))


@guarded
@checked()
def iwae(
    model: Program | Problem,
    guide: Program | Posterior | None = None,
    data: Data | None = None,
    *,
    num_particles: Count = 1000,
    plate: Plate = None,
    batch_size: Count = 64,
    seed: Seed = 0,
    progress: bool = True,
) -> Estimate:
    r"""The importance-weighted bound with K = `num_particles`, of every datapoint.

    $$\log \frac1K \sum_k w_k, \quad w_k = p(x_n, z_k) / q(z_k | x_n), \quad z_k \sim q(z|x_n)$$

    A lower bound of log p(x_n) in expectation that grows with K (Burda et al., 2016, arXiv:1509.00519). Arguments and
    result as for `elbo`; the result has `ess` and Pareto `khat` too.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> bool((pg.iwae(model, guide, x).value > pg.elbo(model, guide, x).value).all())
        True
    """
    problem = Problem.of(model, guide, data, plate)
    return log_mean_exp_estimate(log_weights_of(problem, num_particles, Run(seed, batch_size, progress)))


def log_weights_of(problem: Problem, num_particles: int, run: Run) -> Tensor:
    """log w of `num_particles` draws from the guide at every datapoint, `(S, N)` in double precision, nats."""
    joint, posterior = problem.scored, problem.guided()
    many = joint.num_datapoints * num_particles >= RECORDING_THRESHOLD
    density = GradientEvaluator(joint, quiet=True) if many else joint

    def measure(chunk: Chunk, run: Run) -> Tensor:
        return chunk_log_weights(density, posterior, chunk, num_particles, run.stream("elbo"))

    return torch.cat(run.map_shown(measure, joint, "ELBO"), 1)
