"""Small models whose evidence, posterior and gaps are known exactly, and how estimates are held against them.

Thresholds are in units of the estimator's own standard error. A comparison of one estimate fails by chance with
probability 6e-5 (four standard errors, Normal); seeds are fixed, so a suite that passes stays passing on a machine.
"""

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import integrate, optimize
from torch import Tensor, nn

from pyrogaps import Problem, Refinement
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.models.sequences import SequenceModel
from pyrogaps.models.state_space import LinearGaussianStateSpace
from pyrogaps.refine import RefinedGuide, Refiner, own_family
from pyrogaps.run import Run
from pyrogaps.streams import Chunk, seeded

STANDARD_ERRORS = 4.0
MCSE = 0.05
ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-4}


def assert_exact(value: Tensor, mcse: Tensor, exact: Tensor | float, dtype: torch.dtype = torch.float64) -> None:
    """Each value within four of its standard errors of the truth, and the errors small enough to matter."""
    value, exact = value.detach(), torch.as_tensor(exact).detach().double()
    mcse = mcse.detach()
    assert float(mcse.max()) < MCSE
    excess = (value - exact).abs() - STANDARD_ERRORS * mcse - ROUNDING[dtype]
    assert float(excess.max()) < 0, f"off by {((value - exact) / mcse).tolist()} standard errors"


def assert_mean_one(ratios: Tensor) -> None:
    """The mean of independent `ratios` `(*)` within four standard errors of 1."""
    ratios = ratios.double().flatten()
    error = float(ratios.std()) / math.sqrt(len(ratios))
    assert abs(float(ratios.mean()) - 1) < STANDARD_ERRORS * error, f"{float(ratios.mean())} +- {error}"


def anisotropic(
    data_dim: int, latent_dim: int, *, decades: float = 0.6, dtype: torch.dtype = torch.float64, seed: int = 0
) -> LinearGaussian:
    """Loadings whose columns, noise scales and prior scales all differ; the loadings over `decades` powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.logspace(-decades / 2, decades / 2, latent_dim, dtype=torch.float64)
    weight = torch.randn(data_dim, latent_dim, generator=generator, dtype=torch.float64) * columns
    noise = torch.logspace(-0.2, 0.4, data_dim, dtype=torch.float64)
    prior = torch.linspace(0.7, 1.5, latent_dim, dtype=torch.float64)
    bias = torch.linspace(-1, 2, data_dim, dtype=torch.float64)
    return LinearGaussian(weight.to(dtype), bias, noise, prior)


def draws_of(model: LinearGaussian, number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Data `(N, D)` from the model and the latents behind them `(N, d)`: exact posterior draws."""
    generator = torch.Generator().manual_seed(seed)
    W, dtype = model.weight.detach(), model.weight.dtype
    z = torch.randn(number, model.latent_dim, generator=generator, dtype=torch.float64).to(dtype) * model.prior_scale
    noise = torch.randn(number, model.data_dim, generator=generator, dtype=torch.float64).to(dtype)
    return (z @ W.T + model.bias + noise * model.noise_scale).detach(), z


class WrongEncoder(nn.Module):
    """A linear-Gaussian posterior's mean shrunk and shifted, its scales too wide by `width`: wrong, knowingly."""

    def __init__(self, model: LinearGaussian, *, shrink: float = 0.8, shift: float = 0.3, width: float = 1.4) -> None:
        super().__init__()
        information = model.weight.T / model.noise_scale**2
        mean = torch.linalg.solve(model.precision, information).detach()
        best = model.precision.diagonal().rsqrt().detach()
        self.weight = nn.Parameter(shrink * mean)
        self.bias = nn.Parameter(shift * best - shrink * mean @ model.bias.detach())
        self.log_scale = nn.Parameter((width * best).log())

    def parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.weight.T + self.bias, self.log_scale.exp().expand(len(x), -1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(*self.parameters_of(x)).to_event(1))


class WrongFullEncoder(WrongEncoder):
    """The same with the covariance as a full matrix: kind (b) with a multivariate Normal."""

    def forward(self, x: Tensor) -> None:
        mean, scale = self.parameters_of(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=torch.diag_embed(scale)))


class NearPosterior(nn.Module):
    """The exact posterior, its mean shifted and its full covariance widened a little."""

    def __init__(self, model: LinearGaussian, *, shift: float = 0.1, width: float = 1.05) -> None:
        super().__init__()
        self.exact = model.posterior
        covariance = model.posterior(model.bias[None])[1].detach()
        self.shift = nn.Parameter(shift * covariance.diagonal().sqrt())
        self.scale_tril = nn.Parameter(width * torch.linalg.cholesky(covariance))

    def parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.exact(x)[0].detach() + self.shift, self.scale_tril

    def forward(self, x: Tensor) -> None:
        mean, scale_tril = self.parameters_of(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=scale_tril))


CONCENTRATION, RATE = 1.5, 0.5


def gamma_poisson(x: Tensor) -> None:
    """rate ~ Gamma(1.5, 0.5), x_j ~ Poisson(rate): `x` `(N, J)` counts; conjugate, positive and skewed."""
    shape, rate = x.new_tensor(CONCENTRATION), x.new_tensor(RATE)
    with pyro.plate("data", len(x)):
        intensity = pyro.sample("intensity", dist.Gamma(shape, rate))
        pyro.sample("x", dist.Poisson(intensity[..., None].expand(x.shape)).to_event(1), obs=x)


def gamma_poisson_posterior(x: Tensor) -> dist.Gamma:
    return dist.Gamma(CONCENTRATION + x.double().sum(-1), torch.full((len(x),), RATE + x.shape[-1]).double())


def gamma_poisson_evidence(x: Tensor) -> Tensor:
    """log of the negative binomial of the total and the multinomial of its parts, `(N,)`."""
    x = x.double()
    a, b = CONCENTRATION + x.sum(-1), RATE + x.shape[-1]
    prior = CONCENTRATION * math.log(RATE) - math.lgamma(CONCENTRATION)
    return prior + torch.lgamma(a) - a * math.log(b) - torch.lgamma(x + 1).sum(-1)


def log_normal_gap(concentration: Tensor) -> Tensor:
    """KL of the best LogNormal from a Gamma of that concentration: Stirling's remainder, whatever the rate."""
    a = concentration.double()
    return torch.lgamma(a) - (a - 0.5) * a.log() + a - 0.5 * math.log(2 * math.pi)


def counts(number: int = 8, columns: int = 2) -> Tensor:
    return torch.poisson(
        torch.linspace(0.3, 6, number).double()[:, None].expand(-1, columns), torch.Generator().manual_seed(2)
    )


SPREAD = 0.8


def parabola(x: Tensor) -> None:
    """z ~ N(0, 1), x ~ N(z^2, 0.8): two modes where x > 0.3 or so."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), x.new_tensor(1.0)))
        pyro.sample("x", dist.Normal(z**2, SPREAD), obs=x)


def parabola_joint(x: float, z: np.ndarray) -> np.ndarray:
    """log p(x, z), by hand."""
    return -0.5 * z**2 - 0.5 * ((x - z**2) / SPREAD) ** 2 - math.log(2 * math.pi * SPREAD)


def parabola_evidence(x: Tensor) -> Tensor:
    """By quadrature, to 1e-10, `(N,)`."""
    values = [
        integrate.quad(lambda z, x=x: math.exp(parabola_joint(x, z)), -8, 8, epsabs=1e-12, limit=400)[0]
        for x in x.tolist()
    ]
    return torch.tensor(values, dtype=torch.float64).log()


def parabola_best_elbo(x: Tensor) -> Tensor:
    """max over Normals N(m, v) of the ELBO, in closed form in m and v, `(N,)`."""

    def loss(parameters: np.ndarray, x: float) -> float:
        m, v = parameters[0], math.exp(parameters[1])
        second, fourth = m**2 + v, m**4 + 6 * m**2 * v + 3 * v**2
        energy = 0.5 * second + 0.5 * (x**2 - 2 * x * second + fourth) / SPREAD**2 + math.log(2 * math.pi * SPREAD)
        return energy - 0.5 * math.log(2 * math.pi * math.e * v)

    best = [
        min(optimize.minimize(loss, (start, -1.0), args=(x,), tol=1e-12).fun for start in (0.0, 0.5, 1.5))
        for x in x.tolist()
    ]
    return -torch.tensor(best, dtype=torch.float64)


BEND = 0.3


def banana(x: Tensor) -> None:
    """z_1 ~ N(0, 1), z_2 ~ N(0, 3), x ~ N(z_2 + z_1^2, 0.3): the posterior bends along a parabola."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), x.new_tensor([1.0, 3.0])).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 1] + z[..., 0] ** 2, BEND), obs=x)


def two_wells(x: Tensor) -> None:
    """z ~ N(0, I) in two dimensions, x ~ N(z_1^2 + 0.3 z_2, 0.3): two modes where x is well above 0."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 0] ** 2 + 0.3 * z[..., 1], BEND), obs=x)


def grid_of_plane(half_width: float = 7.0, points: int = 601) -> tuple[Tensor, float]:
    """Points `(points^2, 2)` of a square around 0, and the log of the area that each stands for."""
    line = torch.linspace(-half_width, half_width, points, dtype=torch.float64)
    return torch.cartesian_prod(line, line), 2 * math.log(float(line[1] - line[0]))


def banana_evidence(x: Tensor) -> Tensor:
    """log p(x) of `banana` by quadrature over z_1, z_2 summed out in closed form, `(N,)`."""
    z = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    width = math.hypot(3.0, BEND)
    log_joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z**2, width).log_prob(x.double()[:, None])
    return torch.logsumexp(log_joint, -1) + math.log(float(z[1] - z[0]))


def two_wells_evidence(x: Tensor) -> Tensor:
    """log p(x) of `two_wells`, in the same way."""
    z = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    width = math.hypot(0.3, BEND)
    log_joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z**2, width).log_prob(x.double()[:, None])
    return torch.logsumexp(log_joint, -1) + math.log(float(z[1] - z[0]))


class RaggedWalk(SequenceModel):
    """A scalar linear-Gaussian chain of sequences of several lengths: `RaggedWalk()(x, lengths)`."""

    data_dim = 1

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("decay", torch.tensor(0.9, dtype=torch.float64))

    def first(self, number: int) -> tuple[Tensor, Tensor]:
        return self.decay.new_zeros(number, 1), self.decay.new_ones(number, 1)

    def transition(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.decay * z, torch.full_like(z, 0.7)

    def emission(self, z: Tensor) -> Tensor:
        return z

    def likelihood(self, output: Tensor) -> dist.TorchDistribution:
        return dist.Normal(output, 1.0).to_event(1)

    def log_evidence(self, x: Tensor, lengths: Tensor) -> Tensor:
        """By Kalman, sequence by sequence."""
        exact = LinearGaussianStateSpace(float(self.decay), 0.49, 1.0, 1.0, 1.0)
        return torch.cat([exact.log_evidence(s[None, :n].float()).double() for s, n in zip(x, lengths, strict=True)])


def refined_by_adam(model: Any, guide: Any, x: Tensor, settings: Refinement) -> RefinedGuide:
    """A guide's own family refined by Adam, also where natural gradients would do."""
    problem = Problem.of(model, guide, x)
    chunk, run, refiner = Chunk(0, len(x)), Run(), Refiner(own_family(problem.guide_density()), settings)
    with seeded(0, "by Adam"):
        part, progress = refiner(problem.evaluator, chunk, run)
    return RefinedGuide(problem.joint, [chunk], [part], [progress])
