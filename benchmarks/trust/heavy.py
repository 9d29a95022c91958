"""Heavy tails: Student-t and Cauchy latents, observations that contradict each other, an outlier."""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Generator, Tensor

from benchmarks.trust.guides import NormalGuide
from benchmarks.trust.problem import Bounds, Instance, Problem
from benchmarks.trust.truths import best_gaussian, gaussian_elbo, line, log_integral


def _students(number: int, dim: int, generator: Generator) -> Tensor:
    """Draws of Student's t with three degrees of freedom: a Normal over the root of a third of a chi-squared."""
    unit = torch.randn(4, number, dim, generator=generator, dtype=torch.float64)
    return unit[0] / unit[1:].square().mean(0).sqrt()


def student(dim: int, noise: float, number: int, generator: Generator) -> Instance:
    """`dim` independent latents with Student's t (3) as prior, each seen once under Normal noise."""
    three, zero = torch.tensor(3.0, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(three, zero, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, noise).to_event(1), obs=x)

    x = _students(number, dim, generator) + noise * torch.randn(number, dim, generator=generator, dtype=torch.float64)
    flat = x.flatten()

    def log_joint(z: Tensor) -> Tensor:
        return dist.StudentT(three, 0.0, 1.0).log_prob(z[..., 0]) + dist.Normal(z[..., 0], noise).log_prob(flat)

    shrink = 1 / (1 + noise**2)
    guide = NormalGuide(lambda x: shrink * x, torch.full_like(zero, noise * shrink**0.5))

    def bounds() -> Bounds:
        means = torch.linspace(-0.2, 1.1, 53, dtype=torch.float64)[:, None, None] * flat[:, None]
        best = best_gaussian(log_joint, means, (0.3, 0.6, 1.0, 1.8, 3.0), len(flat))
        mean, scale = guide.exact_parameters(x)
        given = gaussian_elbo(log_joint, mean.reshape(-1, 1), scale.reshape(-1, 1))
        return Bounds(given.reshape(x.shape).sum(-1), best.reshape(x.shape).sum(-1))

    # The tails fall as the Normal's around x, so that twelve standard deviations of the noise beyond it are enough.
    far = float(flat.abs().max()) + 12 * noise + 5
    log_evidence = log_integral(log_joint, -far, far, 40001).reshape(x.shape).sum(-1)
    return Instance(model, guide, x, log_evidence, bounds)


def cauchy(number: int, generator: Generator) -> Instance:
    """z and the noise of x are Cauchy: two modes, at 0 and at x, where x is above 2; x is Cauchy of scale 2."""
    one = torch.ones(1, dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Cauchy(0 * one, one).to_event(1))
            pyro.sample("x", dist.Cauchy(z, one).to_event(1), obs=x)

    unit = torch.randn(2, number, 1, generator=generator, dtype=torch.float64)
    x = 2 * unit[0] / unit[1]

    def log_joint(z: Tensor) -> Tensor:
        return dist.Cauchy(0.0, 1.0).log_prob(z[..., 0]) + dist.Cauchy(z[..., 0], 1.0).log_prob(x[:, 0])

    guide = NormalGuide(lambda x: x / 2, one)

    def bounds() -> Bounds:
        near = line(-2.0, 2.0, 21)
        between = torch.linspace(0.0, 1.0, 11, dtype=torch.float64)[:, None, None] * x
        starts = torch.cat([near.expand(-1, number, -1), x + near, between])
        best = best_gaussian(log_joint, starts, (0.4, 0.8, 1.5, 3.0, 6.0, 12.0), number)
        return Bounds(gaussian_elbo(log_joint, *guide.exact_parameters(x)), best)

    return Instance(model, guide, x, dist.Cauchy(0.0, 2.0).log_prob(x[:, 0]), bounds)


def conflict(number: int, generator: Generator) -> Instance:
    """Two observations near -5 and 5 of one z under heavy-tailed noise; the guide between them, where neither is."""
    c = lambda value: torch.tensor(value, dtype=torch.float64)  # noqa: E731

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(c([0.0]), 3.0).to_event(1))
            pyro.sample("x", dist.StudentT(c(3.0), z.expand(*z.shape[:-1], 2), c(0.2)).to_event(1), obs=x)

    unit = torch.randn(number, 2, generator=generator, dtype=torch.float64)
    x = c([-5.0, 5.0]) + 0.3 * unit

    def log_joint(z: Tensor) -> Tensor:
        return dist.Normal(0.0, 3.0).log_prob(z[..., 0]) + dist.StudentT(c(3.0), z, c(0.2)).log_prob(x).sum(-1)

    guide = NormalGuide(lambda x: x.mean(-1, keepdim=True), c([0.2]))

    def bounds() -> Bounds:
        best = best_gaussian(log_joint, line(-6.5, 6.5, 131), (0.1, 0.2, 0.4, 1.0, 2.0, 5.0), number)
        return Bounds(gaussian_elbo(log_joint, *guide.exact_parameters(x)), best)

    return Instance(model, guide, x, log_integral(log_joint, -30.0, 30.0, 60001), bounds)


PROBLEMS = (
    Problem("student-5", partial(student, 5, 1.0), "five Student-t (3) latents, noise 1", 64, 352, easy=True),
    Problem(
        "student-5-weak", partial(student, 5, 4.0), "the same, noise 4: the posterior has the prior's tails", 64, 352
    ),
    Problem("cauchy", cauchy, "Cauchy latent and Cauchy noise: two modes with heavy tails where x is large", 64, 64),
    Problem("conflict", conflict, "two observations 10 apart under Student-t noise of scale 0.2", 32, 32),
)
