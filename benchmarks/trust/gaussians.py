"""Correlated Gaussian posteriors: everything in closed form, in up to 200 dimensions."""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Generator, Tensor

from benchmarks.trust.guides import NormalGuide
from benchmarks.trust.problem import Bounds, Instance, Problem


def correlated(dim: int, decades: float, number: int, generator: Generator) -> Instance:
    r"""z ~ N(0, S), x ~ N(z, I); S has random axes, so that the posterior's precision, $S^{-1} + I$, spans `decades`.

    The guide's mean is 0.95 of the posterior's and its scales are those of the best mean field.
    """
    axes, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    # Prior variances v give precisions 1 + 1/v, here from 1.01 to 1.01 times the condition number.
    precisions = 1.01 * torch.logspace(0, decades, dim, dtype=torch.float64)
    prior = (axes / (precisions - 1)) @ axes.T
    root = torch.linalg.cholesky((prior + prior.T) / 2)
    precision = (axes * precisions) @ axes.T
    gain = (axes / precisions) @ axes.T
    z = torch.randn(number, dim, generator=generator, dtype=torch.float64) @ root.T
    x = z + torch.randn(number, dim, generator=generator, dtype=torch.float64)
    one = torch.ones(dim, dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros_like(one), scale_tril=root))
            pyro.sample("x", dist.Normal(z, one).to_event(1), obs=x)

    log_evidence = dist.MultivariateNormal(0 * one, prior + torch.eye(dim, dtype=torch.float64)).log_prob(x)
    scale = precision.diagonal().rsqrt()
    gap = (precision.diagonal().log().sum() - precisions.log().sum()) / 2

    def bounds() -> Bounds:
        missed = 0.05 * x @ gain.T
        distance = torch.einsum("ni,ij,nj->n", missed, precision, missed) / 2
        return Bounds(log_evidence - gap - distance, log_evidence - gap)

    guide = NormalGuide(lambda x: 0.95 * x @ gain.T, scale)
    return Instance(model, guide, x, log_evidence, bounds)


def _problem(dim: int, decades: int, number: int, number_of_evidence: int, *, easy: bool = False) -> Problem:
    about = f"Gaussian posterior in {dim} dimensions, condition number 1e{decades}"
    name = f"gaussian-{dim}-1e{decades}"
    return Problem(name, partial(correlated, dim, decades), about, number, number_of_evidence, easy)


PROBLEMS = (
    _problem(6, 2, 64, 352, easy=True),
    _problem(6, 4, 64, 64),
    _problem(20, 2, 64, 352, easy=True),
    _problem(20, 4, 64, 64),
    _problem(50, 2, 64, 64, easy=True),
    _problem(50, 4, 64, 64),
    _problem(200, 2, 32, 32),
    _problem(200, 4, 32, 32),
)
