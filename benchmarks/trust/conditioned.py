"""Guides that are not shown all of x: L[q*_C] in closed form on every datapoint."""

from functools import partial

import torch
from torch import Generator, Tensor

from benchmarks.trust.guides import NormalGuide, constant
from benchmarks.trust.problem import Bounds, Instance, Problem
from pyrogaps.models.toy import MissingBit, MissingGaussian


def gaussian(data_dim: int, latent_dim: int, shown: int, number: int, generator: Generator) -> Instance:
    r"""A linear-Gaussian model of which the guide sees the first `shown` elements.

    The best mean field that is shown no more has the mean E[z|C] and the scales $L_{ii}^{-1/2}$ of q*, because the
    ELBO is quadratic in the posterior's mean.
    """
    weight = torch.randn(data_dim, latent_dim, generator=generator, dtype=torch.float64)
    model = MissingGaussian(weight if data_dim > 2 else torch.ones(2, 1).double(), 0.0, 1.0, shown=shown)
    z = torch.randn(number, latent_dim, generator=generator, dtype=torch.float64)
    x = z @ model.weight.detach().T + torch.randn(number, data_dim, generator=generator, dtype=torch.float64)
    scale = model.precision.diagonal().rsqrt().detach()
    guide = NormalGuide(lambda x: 0.9 * model.conditional(x)[0].detach(), 1.2 * scale)
    guide.conditions = model.conditions

    def bounds() -> Bounds:
        mean, width = guide.exact_parameters(x)
        best = model.posterior(x)[0], model.conditional(x)[0]
        values = model.elbo(x, mean, scale=width), *(model.elbo(x, centre, scale=scale) for centre in best)
        return Bounds(*(value.detach() for value in values))

    return Instance(model, guide, x, model.log_evidence(x).detach(), bounds)


def bit(number: int, generator: Generator) -> Instance:
    """A guide that sees nothing; the bit that it does not see chooses one of two modes."""
    model = MissingBit(torch.tensor([0.3, 0.7], dtype=torch.float64))
    x = torch.bernoulli(torch.full((number,), 0.7, dtype=torch.float64), generator=generator)
    guide = NormalGuide(constant(0.5), torch.tensor([0.8], dtype=torch.float64))
    guide.conditions = model.conditions

    def bounds() -> Bounds:
        log_evidence, (centre, variance) = model.log_evidence(x), model.posterior(x)
        posterior = torch.distributions.Normal(centre[:, 0], variance[:, 0].sqrt())

        def elbo(mean: Tensor, scale: Tensor) -> Tensor:
            given = torch.distributions.Normal(mean, scale)
            return log_evidence - torch.distributions.kl_divergence(given, posterior)

        mean, scale = guide.exact_parameters(x)
        best, spread = model.shared_posterior()
        return Bounds(elbo(mean[:, 0], scale[:, 0]), log_evidence, elbo(best, spread.sqrt()))

    return Instance(model, guide, x, model.log_evidence(x), bounds)


PROBLEMS = (
    Problem(
        "conditioned-1",
        partial(gaussian, 2, 1, 1),
        "one latent, the guide sees one of two observations",
        352,
        352,
        easy=True,
    ),
    Problem(
        "conditioned-4",
        partial(gaussian, 8, 4, 3),
        "four latents, the guide sees three of eight observations",
        64,
        352,
        easy=True,
    ),
    Problem("conditioned-bit", bit, "the guide sees nothing, and is refined for both modes of one latent", 64, 64),
)
