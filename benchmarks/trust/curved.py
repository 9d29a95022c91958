"""Posteriors that bend: a ring, a banana, a funnel."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Generator, Tensor

from benchmarks.trust.guides import NormalGuide
from benchmarks.trust.problem import Bounds, Instance, Problem
from benchmarks.trust.scales import Scales
from benchmarks.trust.truths import best_gaussian, gaussian_elbo, log_integral, plane


def _normal(number: int, dim: int, generator: Generator) -> Tensor:
    return torch.randn(number, dim, generator=generator, dtype=torch.float64)


RING, BEND = 0.5, 0.3


def ring(number: int, generator: Generator) -> Instance:
    """z ~ N(0, I) in the plane, x ~ N(|z|^2, 0.5): a ring where x is well above 0. The guide sits on its right."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.square().sum(-1), RING), obs=x)

    def log_joint(z: Tensor) -> Tensor:
        squared = z.square().sum(-1)
        return -0.5 * squared - math.log(2 * math.pi) + dist.Normal(squared, RING).log_prob(x)

    # |z|^2 is exponential with mean 2.
    x = _normal(number, 2, generator).square().sum(-1) + RING * _normal(number, 1, generator)[:, 0]
    squared = lambda t: -0.5 * t[..., 0] - math.log(2) + dist.Normal(t[..., 0], RING).log_prob(x)  # noqa: E731
    log_evidence = log_integral(squared, 0.0, 60.0, 60001)

    def right(x: Tensor) -> Tensor:
        radius = x.clamp(min=0.1).sqrt()
        return torch.stack([radius, torch.zeros_like(radius)], -1)

    guide = NormalGuide(right, torch.tensor([0.2, 0.4], dtype=torch.float64))

    def bounds() -> Bounds:
        # A little off the axis, where the second coordinate's gradient is not zero by symmetry.
        starts = plane((0.0, 3.0, 25), (0.03, 0.03, 1))
        best = best_gaussian(log_joint, starts, (0.1, 0.2, 0.3, 0.4, 0.6, 0.8), number, polished=8)
        return Bounds(gaussian_elbo(log_joint, *guide.exact_parameters(x)), best)

    return Instance(model, guide, x, log_evidence, bounds)


def banana(number: int, generator: Generator) -> Instance:
    """z_1 ~ N(0, 1), z_2 ~ N(0, 3), x ~ N(z_2 + z_1^2, 0.3): the posterior bends along a parabola."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), x.new_tensor([1.0, 3.0])).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 1] + z[..., 0] ** 2, BEND), obs=x)

    def log_joint(z: Tensor) -> Tensor:
        prior = dist.Normal(0.0, 1.0).log_prob(z[..., 0]) + dist.Normal(0.0, 3.0).log_prob(z[..., 1])
        return prior + dist.Normal(z[..., 1] + z[..., 0] ** 2, BEND).log_prob(x)

    z = _normal(number, 3, generator)
    x = 3 * z[:, 1] + z[:, 0] ** 2 + BEND * z[:, 2]
    width = math.hypot(3.0, BEND)
    first = lambda z: dist.Normal(0.0, 1.0).log_prob(z[..., 0]) + dist.Normal(z[..., 0] ** 2, width).log_prob(x)  # noqa: E731
    guide = NormalGuide(
        lambda x: torch.stack([torch.zeros_like(x), 0.9 * x - 0.5], -1), torch.tensor([0.5, 0.3], dtype=torch.float64)
    )

    def bounds() -> Bounds:
        # z_2 lies near x - z_1^2.
        first = torch.linspace(-3.2, 3.2, 17, dtype=torch.float64)[:, None].expand(-1, number)
        starts = torch.cat([torch.stack([first, x - first**2 + off], -1) for off in (-0.6, -0.3, 0.0, 0.3)])
        best = best_gaussian(log_joint, starts, (0.1, 0.2, 0.3, 0.5), number)
        return Bounds(gaussian_elbo(log_joint, *guide.exact_parameters(x)), best)

    return Instance(model, guide, x, log_integral(first, -10.0, 10.0), bounds)


WIDTHS, FUNNEL_NOISE, NUM_IN_FUNNEL = 2.0, 1.0, 5


def funnel(number: int, generator: Generator) -> Instance:
    """v ~ N(0, 2), z_1 to z_5 ~ N(0, exp(v / 2)), x_j ~ N(z_j, 1): one vector of latents for every datapoint."""
    of = Scales(WIDTHS, FUNNEL_NOISE)

    def model(x: Tensor) -> None:
        size = x.shape[-1]
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(x.new_zeros(()), WIDTHS))
            scale = (v / 2).exp()[..., None].expand(*v.shape, size)
            z = pyro.sample("z", dist.Normal(torch.zeros_like(scale), scale).to_event(1))
            pyro.sample("x", dist.Normal(z, FUNNEL_NOISE).to_event(1), obs=x)

    x = of.draw(number, NUM_IN_FUNNEL, generator)
    guide = of.guide(NUM_IN_FUNNEL)
    return Instance(model, guide, x, of.log_evidence(x), lambda: Bounds(of.elbo(guide, x), of.best(x)))


PROBLEMS = (
    Problem("ring", ring, "a ring in the plane", 64, 64),
    Problem("banana", banana, "a banana in the plane", 64, 64),
    Problem("funnel", funnel, "a scale and five variables of that scale, each seen once", 64, 64),
)
