"""Several modes: mixtures as priors of the first coordinates, guides that sit in one mode or between them."""

import math
from collections.abc import Sequence
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Generator, Tensor
from torch.distributions import constraints

from benchmarks.trust.guides import NormalGuide
from benchmarks.trust.problem import Bounds, Instance, Problem
from benchmarks.trust.truths import best_gaussian, gaussian_elbo, line


class Mixture(dist.MixtureSameFamily):
    """Mixtures of Normals on the line, with the support said in Pyro's words."""

    support = constraints.real


def mixture(
    weights: Sequence[float],
    centres: Sequence[float],
    widths: Sequence[float],
    start: float,
    start_scale: float,
    mixed: int,
    dim: int,
    noise: float,
    number: int,
    generator: Generator,
) -> Instance:
    r"""`dim` independent coordinates: `mixed` of them with a mixture as prior, N(0, 1) for the rest; x ~ N(z, noise).

    Everything is a sum over coordinates. The guide is the same for all x: at `start` in the mixed coordinates, at the
    posterior's scale and 0.9 of its mean in the rest.
    """
    w, c, s = (torch.tensor(values, dtype=torch.float64) for values in (weights, centres, widths))
    components = dist.Categorical(w.expand(dim, -1))
    plain = torch.arange(dim)[:, None] >= mixed
    means, scales = torch.where(plain, 0.0, c), torch.where(plain, 1.0, s)

    def prior() -> Mixture:
        return Mixture(components, dist.Normal(means, scales))

    which = torch.multinomial(w, number * dim, replacement=True, generator=generator).reshape(number, dim)
    columns = torch.arange(dim)
    unit = torch.randn(2, number, dim, generator=generator, dtype=torch.float64)
    z = means[columns, which] + scales[columns, which] * unit[0]
    x = z + noise * unit[1]

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior().to_event(1))
            pyro.sample("x", dist.Normal(z, noise).to_event(1), obs=x)

    total = (scales**2 + noise**2).sqrt()
    of_each = torch.logsumexp(w.log() + dist.Normal(means, total).log_prob(x[..., None]), -1)
    shrink = 1 / (1 + noise**2)
    first = (columns < mixed).double()
    scale = first * start_scale + (1 - first) * noise * math.sqrt(shrink)
    guide = NormalGuide(lambda x: first * start + (1 - first) * 0.9 * shrink * x, scale)

    def bounds() -> Bounds:
        def log_joint(z: Tensor) -> Tensor:
            """Of the mixed coordinates, each a datapoint of its own."""
            own = torch.logsumexp(w.log() + dist.Normal(c, s).log_prob(z), -1)
            return own + dist.Normal(z[..., 0], noise).log_prob(x[:, :mixed].flatten())

        size = number * mixed
        grid = line(float((c - 2 * s).min()), float((c + 2 * s).max()), 121)
        smallest, largest = float(s.min()) / 2, float(max(s.max(), c.std(correction=0))) * 1.5
        scales = torch.logspace(math.log10(smallest), math.log10(largest), 5).tolist()
        best = best_gaussian(log_joint, grid, scales, size)
        ones = torch.ones(size, 1, dtype=torch.float64)
        given = gaussian_elbo(log_joint, start * ones, start_scale * ones)
        rest = of_each[:, mixed:].sum(-1)
        missed = 0.5 * (0.1 * shrink * x[:, mixed:]).square().sum(-1) * (1 + noise**-2)
        fold = lambda values: values.reshape(number, mixed).sum(-1) + rest  # noqa: E731
        return Bounds(fold(given) - missed, fold(best))

    return Instance(model, guide, x, of_each.sum(-1), bounds)


def _problem(
    name: str,
    about: str,
    weights: Sequence[float],
    centres: Sequence[float],
    widths: Sequence[float],
    start: float,
    start_scale: float,
    *,
    mixed: int = 1,
    dim: int = 1,
    noise: float = 5.0,
    number_of_evidence: int = 352,
) -> Problem:
    make = partial(mixture, weights, centres, widths, start, start_scale, mixed, dim, noise)
    return Problem(name, make, about, 64, number_of_evidence)


PROBLEMS = (
    _problem(
        "two-modes-near",
        "modes 2.8 standard deviations apart, weights 0.6 and 0.4",
        (0.6, 0.4),
        (-1, 1),
        (0.7, 0.7),
        -1,
        0.7,
    ),
    _problem(
        "two-modes-equal",
        "modes 16 standard deviations apart, the guide in one",
        (0.5, 0.5),
        (-4, 4),
        (0.5, 0.5),
        -4,
        0.5,
    ),
    _problem(
        "two-modes-unequal",
        "the same with weights 0.7 and 0.3, the guide in the heavier",
        (0.7, 0.3),
        (-4, 4),
        (0.5, 0.5),
        -4,
        0.5,
    ),
    _problem(
        "three-modes",
        "weights 0.5, 0.3, 0.2, the guide in the middle",
        (0.5, 0.3, 0.2),
        (0, -5, 5),
        (0.5, 0.5, 0.5),
        0,
        0.5,
    ),
    _problem(
        "four-modes",
        "two modes in each of two dimensions, the guide in one of four",
        (0.6, 0.4),
        (-3, 3),
        (0.5, 0.5),
        -3,
        0.5,
        mixed=2,
        dim=2,
    ),
    _problem(
        "two-modes-20",
        "two modes in one of 20 dimensions, the guide in one",
        (0.5, 0.5),
        (-4, 4),
        (0.5, 0.5),
        -4,
        0.5,
        dim=20,
        noise=2.5,
        number_of_evidence=64,
    ),
    _problem("two-modes-between", "the guide wide and between both modes", (0.5, 0.5), (-4, 4), (0.5, 0.5), 0, 4.0),
    _problem(
        "wrong-mode", "the guide in a mode with a twentieth of the mass", (0.05, 0.95), (-4, 4), (0.5, 0.5), -4, 0.5
    ),
    _problem(
        "spike-and-slab",
        "a mode 0.1 wide with half of the mass inside one 3 wide",
        (0.5, 0.5),
        (1.0, 0.0),
        (0.1, 3.0),
        0.0,
        2.5,
    ),
)
