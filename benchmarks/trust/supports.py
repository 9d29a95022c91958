"""Latents on intervals, half lines, the simplex, and in order; conjugate or integrated in one dimension."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from torch import Generator, Tensor, nn

from benchmarks.trust.guides import LogNormalGuide, NormalGuide
from benchmarks.trust.problem import Bounds, Instance, Problem
from benchmarks.trust.truths import best_gaussian, gaussian_elbo, line, log_integral, plane


def _c(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _gammas(concentration: Tensor, generator: Generator) -> Tensor:
    """Standard gamma draws; torch's sampler takes a generator."""
    return torch._standard_gamma(concentration.double(), generator=generator)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


class BetaGuide(nn.Module):
    """q(z|x) = Beta(offset + weight x, offset' + weight' (trials - x))."""

    def __init__(self, trials: int) -> None:
        super().__init__()
        self.trials = trials
        self.offset, self.weight = nn.Parameter(_c(1.5, 1.5)), nn.Parameter(_c(0.8, 0.8))

    def given(self, x: Tensor) -> dist.Beta:
        parts = self.offset + self.weight * torch.cat([x, self.trials - x], -1)
        return dist.Beta(parts[:, :1], parts[:, 1:])

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.given(x).to_event(1))


def beta(a: float, b: float, trials: int, number: int, generator: Generator) -> Instance:
    """z ~ Beta(a, b), x ~ Binomial(trials, z); the guide's family holds the posterior."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Beta(_c(a), _c(b)).to_event(1))
            pyro.sample("x", dist.Binomial(trials, z).to_event(1), obs=x)

    gammas = _gammas(_c(a, b).expand(number, 2), generator)
    size = torch.full((number, 1), float(trials), dtype=torch.float64)
    x = torch.binomial(size, gammas[:, :1] / gammas.sum(-1, keepdim=True), generator=generator)
    ways = math.lgamma(trials + 1) - torch.lgamma(x[:, 0] + 1) - torch.lgamma(trials - x[:, 0] + 1)
    log_evidence = _log_beta(a + x[:, 0], b + trials - x[:, 0]) - _log_beta(_c(a), _c(b)) + ways
    guide = BetaGuide(trials)

    def bounds() -> Bounds:
        with torch.no_grad():
            gap = torch.distributions.kl_divergence(guide.given(x), dist.Beta(a + x, b + trials - x))[:, 0]
        return Bounds(log_evidence - gap, log_evidence)

    return Instance(model, guide, x, log_evidence, bounds)


def gamma(concentration: float, rate: float, columns: int, number: int, generator: Generator) -> Instance:
    """z ~ Gamma(concentration, rate), x_1, x_2, ... ~ Poisson(z); the guide is LogNormal."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(_c(concentration), _c(rate)).to_event(1))
            pyro.sample("x", dist.Poisson(z.expand(*z.shape[:-1], columns)).to_event(1), obs=x)

    intensity = _gammas(_c(concentration).expand(number, 1), generator) / rate
    x = torch.poisson(intensity.expand(-1, columns).contiguous(), generator=generator)
    a, b = concentration + x.sum(-1), rate + columns
    constant = concentration * math.log(rate) - math.lgamma(concentration) - torch.lgamma(x + 1).sum(-1)

    def log_joint(u: Tensor) -> Tensor:
        return a * u[..., 0] - b * u[..., 0].exp() + constant

    guide = LogNormalGuide(lambda x: ((concentration + x.sum(-1, keepdim=True)) / b).log(), _c(0.5))
    log_evidence = constant + torch.lgamma(a) - a * math.log(b)

    def bounds() -> Bounds:
        # KL of the best LogNormal from a Gamma: Stirling's remainder, whatever the rate.
        remainder = torch.lgamma(a) - (a - 0.5) * a.log() + a - 0.5 * math.log(2 * math.pi)
        return Bounds(gaussian_elbo(log_joint, *guide.exact_parameters(x)), log_evidence - remainder)

    return Instance(model, guide, x, log_evidence, bounds)


class DirichletGuide(nn.Module):
    """q(z|x) = Dirichlet(offset + weight x)."""

    def __init__(self) -> None:
        super().__init__()
        self.offset, self.weight = nn.Parameter(_c(1.5, 1.5, 1.5)), nn.Parameter(_c(0.8, 0.8, 0.8))

    def concentration(self, x: Tensor) -> Tensor:
        return self.offset + self.weight * x

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Dirichlet(self.concentration(x)))


def dirichlet(number: int, generator: Generator) -> Instance:
    """z ~ Dirichlet(1, 2, 3), x ~ Multinomial(20, z); the guide's family holds the posterior."""
    prior, trials = _c(1.0, 2.0, 3.0), 20

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(prior))
            pyro.sample("x", dist.Multinomial(trials, z), obs=x)

    gammas = _gammas(prior.expand(number, 3), generator)
    drawn = torch.multinomial(gammas / gammas.sum(-1, keepdim=True), trials, replacement=True, generator=generator)
    x = nn.functional.one_hot(drawn, 3).sum(1).double()
    ways = math.lgamma(trials + 1) - torch.lgamma(x + 1).sum(-1)
    log_beta = lambda alpha: torch.lgamma(alpha).sum(-1) - torch.lgamma(alpha.sum(-1))  # noqa: E731
    log_evidence = ways + log_beta(prior + x) - log_beta(prior)
    guide = DirichletGuide()

    def bounds() -> Bounds:
        given = dist.Dirichlet(guide.concentration(x).detach())
        gap = torch.distributions.kl_divergence(given, dist.Dirichlet(prior + x))
        return Bounds(log_evidence - gap, log_evidence)

    return Instance(model, guide, x, log_evidence, bounds)


ORDERED_NOISE = 0.5


def ordered(number: int, generator: Generator) -> Instance:
    """z_1 < z_2, with z_1 and log(z_2 - z_1) standard Normal, each seen once under noise 0.5."""

    def prior() -> dist.TransformedDistribution:
        base = dist.Normal(_c(0.0, 0.0), 1.0).to_event(1)
        return dist.TransformedDistribution(base, [transforms.OrderedTransform()])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z, ORDERED_NOISE).to_event(1), obs=x)

    unit = torch.randn(number, 4, generator=generator, dtype=torch.float64)
    x = torch.stack([unit[:, 0], unit[:, 0] + unit[:, 1].exp()], -1) + ORDERED_NOISE * unit[:, 2:]

    def log_joint(u: Tensor) -> Tensor:
        z = torch.stack([u[..., 0], u[..., 0] + u[..., 1].exp()], -1)
        return dist.Normal(0.0, 1.0).log_prob(u).sum(-1) + dist.Normal(z, ORDERED_NOISE).log_prob(x).sum(-1)

    def log_joint_of_step(u: Tensor) -> Tensor:
        """Of u_2 alone: given it, x is Gaussian with mean (0, exp u_2)."""
        mean = torch.cat([torch.zeros_like(u), u.exp()], -1)
        spread = torch.eye(2, dtype=torch.float64) * ORDERED_NOISE**2 + 1
        return dist.MultivariateNormal(mean, spread).log_prob(x) + dist.Normal(0.0, 1.0).log_prob(u[..., 0])

    def start(x: Tensor) -> Tensor:
        return torch.stack([0.8 * x[:, 0], 0.7 * (x[:, 1] - x[:, 0]).clamp(min=0.3).log()], -1)

    guide = NormalGuide(start, _c(0.4, 0.4), [transforms.OrderedTransform()])

    def bounds() -> Bounds:
        starts = start(x) + plane((-1.0, 1.0, 9), (-1.5, 1.5, 9))
        best = best_gaussian(log_joint, starts, (0.2, 0.4, 0.8), number)
        return Bounds(gaussian_elbo(log_joint, *guide.exact_parameters(x)), best)

    return Instance(model, guide, x, log_integral(log_joint_of_step, -9.0, 9.0, 4001), bounds)


def truncated(low: float, high: float, noise: float, number: int, generator: Generator) -> Instance:
    """z ~ Uniform(low, high), x ~ N(z, noise): a Normal cut off at both ends; the guide is a Normal of the logit."""
    size = high - low

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(_c(low), _c(high)).to_event(1))
            pyro.sample("x", dist.Normal(z, noise).to_event(1), obs=x)

    uniform = torch.rand(number, 1, generator=generator, dtype=torch.float64)
    x = low + size * uniform + noise * torch.randn(number, 1, generator=generator, dtype=torch.float64)

    def log_joint(u: Tensor) -> Tensor:
        z = low + size * torch.sigmoid(u[..., 0])
        jacobian = nn.functional.logsigmoid(u[..., 0]) + nn.functional.logsigmoid(-u[..., 0])
        return jacobian + dist.Normal(z, noise).log_prob(x[:, 0])

    to_interval = [transforms.SigmoidTransform(), transforms.AffineTransform(low, size)]
    guide = NormalGuide(lambda x: (x - (low + high) / 2).clamp(-2.0, 2.0), _c(0.8), to_interval)
    normal = dist.Normal(0.0, 1.0)
    inside = normal.cdf((high - x[:, 0]) / noise) - normal.cdf((low - x[:, 0]) / noise)

    def bounds() -> Bounds:
        best = best_gaussian(log_joint, line(-6.0, 6.0, 61), (0.3, 0.6, 1.2, 2.4), number)
        return Bounds(gaussian_elbo(log_joint, *guide.exact_parameters(x)), best)

    return Instance(model, guide, x, inside.log() - math.log(size), bounds)


def half_normal(number: int, generator: Generator) -> Instance:
    """z ~ HalfNormal(1), x ~ N(z, 0.5): cut off at 0, where many posteriors have their mass; a LogNormal guide."""
    noise = 0.5

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.HalfNormal(_c(1.0)).to_event(1))
            pyro.sample("x", dist.Normal(z, noise).to_event(1), obs=x)

    unit = torch.randn(2, number, 1, generator=generator, dtype=torch.float64)
    x = unit[0].abs() + noise * unit[1]
    precision = 1 + noise**-2

    def log_joint(u: Tensor) -> Tensor:
        z = u[..., 0].exp()
        prior = dist.Normal(0.0, 1.0).log_prob(z) + math.log(2)
        return prior + dist.Normal(z, noise).log_prob(x[:, 0]) + u[..., 0]

    guide = LogNormalGuide(lambda x: (0.8 * x).clamp(min=0.2).log(), _c(0.5))
    mean = x[:, 0] / noise**2 / precision
    positive = torch.special.log_ndtr(mean * precision**0.5)
    log_evidence = math.log(2) + dist.Normal(0.0, (1 + noise**2) ** 0.5).log_prob(x[:, 0]) + positive

    def bounds() -> Bounds:
        best = best_gaussian(log_joint, line(-5.0, 2.0, 57), (0.1, 0.2, 0.4, 0.8, 1.6), number)
        return Bounds(gaussian_elbo(log_joint, *guide.exact_parameters(x)), best)

    return Instance(model, guide, x, log_evidence, bounds)


PROBLEMS = (
    Problem("beta", partial(beta, 2.0, 3.0, 10), "a Beta latent, 10 trials, a Beta guide", 64, 352, easy=True),
    Problem("beta-sparse", partial(beta, 0.5, 0.5, 2), "a U-shaped Beta latent, 2 trials, a Beta guide", 64, 352),
    Problem("gamma", partial(gamma, 1.5, 0.5, 2), "a Gamma latent, 2 counts, a LogNormal guide", 64, 352, easy=True),
    Problem("gamma-sparse", partial(gamma, 0.1, 0.1, 1), "a Gamma latent of shape 0.1, one count, mostly 0", 64, 352),
    Problem("dirichlet", dirichlet, "a Dirichlet latent, 20 trials, a Dirichlet guide", 64, 352, easy=True),
    Problem("ordered", ordered, "two ordered latents, each seen once", 12, 352),
    Problem(
        "truncated",
        partial(truncated, -1.0, 2.0, 0.5),
        "a Normal posterior cut off at both ends, a logit-Normal guide",
        12,
        352,
    ),
    Problem("half-normal", half_normal, "a Normal posterior cut off at 0, a LogNormal guide", 64, 352),
)
