"""Linear-Gaussian models at extremes: float32 far from zero, an outlier, exact and far too narrow guides."""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Generator, Tensor, nn

from benchmarks.trust.guides import NormalGuide
from benchmarks.trust.problem import Bounds, Instance, Problem
from pyrogaps.models.linear_gaussian import LinearGaussian


def _model(data_dim: int, latent_dim: int, generator: Generator) -> LinearGaussian:
    """In double precision, with loadings, noise and prior scales that all differ."""
    weight = torch.randn(data_dim, latent_dim, generator=generator, dtype=torch.float64)
    noise = torch.logspace(-0.2, 0.3, data_dim, dtype=torch.float64)
    return LinearGaussian(weight, 0.3, noise, torch.linspace(0.7, 1.5, latent_dim, dtype=torch.float64))


def _data(model: LinearGaussian, number: int, generator: Generator, times: float = 1.0) -> Tensor:
    """From the model, with `times` as much noise."""
    z = torch.randn(number, model.latent_dim, generator=generator, dtype=torch.float64) * model.prior_scale
    noise = torch.randn(number, model.data_dim, generator=generator, dtype=torch.float64) * model.noise_scale
    return (z @ model.weight.T + model.bias + times * noise).detach()


def _instance(exact: LinearGaussian, model: LinearGaussian, guide: NormalGuide, x: Tensor) -> Instance:
    """With the closed forms of `exact`, the same model in double precision."""
    wide = x.double()

    def bounds() -> Bounds:
        mean, scale = guide.exact_parameters(x)
        best, widths = exact.mean_field_optimum(wide)
        return Bounds(exact.elbo(wide, mean, scale=scale).detach(), exact.elbo(wide, best, scale=widths).detach())

    return Instance(model, guide, x, exact.log_evidence(wide).detach(), bounds)


def mean_field(width: float, shift: float, outlier: float, number: int, generator: Generator) -> Instance:
    """A guide with `width` times the best scales, its mean off by `shift` of them; one datapoint with an `outlier`."""
    model = _model(8, 3, generator)
    x = _data(model, number, generator)
    x[0, 3] += outlier * model.noise_scale[3].item()
    best = model.precision.diagonal().rsqrt().detach()
    guide = NormalGuide(lambda x: 0.98 * model.posterior(x)[0].detach() + shift * best, width * best)
    return _instance(model, model, guide, x)


def single(number: int, generator: Generator) -> Instance:
    """2,000 observations of each datapoint, ten times as noisy as the model says: log p(x) is near -1e5, in float32."""
    double = _model(2000, 4, generator)
    model = LinearGaussian(double.weight.float(), 0.3, double.noise_scale.float(), double.prior_scale.float())
    exact = LinearGaussian(
        model.weight.double(), model.bias.double(), model.noise_scale.double(), model.prior_scale.double()
    )
    x = _data(double, number, generator, 10.0).float()
    best = exact.precision.diagonal().rsqrt().detach()
    guide = NormalGuide(
        lambda x: (exact.posterior(x.double())[0].detach() + 0.5 * best).to(x.dtype), 1.2 * best.float()
    )
    return _instance(exact, model, guide, x)


class ExactGuide(nn.Module):
    """The posterior of a linear-Gaussian model."""

    def __init__(self, model: LinearGaussian) -> None:
        super().__init__()
        self.posterior = model.posterior
        self.scale_tril = nn.Parameter(torch.linalg.cholesky(model.posterior(model.bias[None])[1]).detach())

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(self.posterior(x)[0].detach(), scale_tril=self.scale_tril))


def exact_guide(number: int, generator: Generator) -> Instance:
    """All gaps are zero."""
    model = _model(8, 5, generator)
    x = _data(model, number, generator)
    log_evidence = model.log_evidence(x).detach()
    return Instance(model, ExactGuide(model), x, log_evidence, lambda: Bounds(log_evidence, log_evidence))


PROBLEMS = (
    Problem("exact-guide", exact_guide, "the guide is the posterior, of 5 dimensions", 64, 352, easy=True),
    Problem(
        "narrow-guide",
        partial(mean_field, 0.05, 0.0, 0.0),
        "the guide's scales are 20 times too small",
        64,
        352,
        easy=True,
    ),
    Problem("wide-guide", partial(mean_field, 20.0, 0.0, 0.0), "the guide's scales are 20 times too large", 64, 352),
    Problem(
        "far-guide",
        partial(mean_field, 1.0, 20.0, 0.0),
        "the guide is 20 standard deviations off in each dimension",
        64,
        352,
    ),
    Problem(
        "outlier",
        partial(mean_field, 1.0, 0.1, 50.0),
        "one observation of one datapoint at 50 standard deviations",
        64,
        352,
    ),
    Problem("float32", single, "log p(x) near -1e5 in float32", 32, 32),
)
