"""Guides that draw a discrete site after a continuous one, q(z2) q(y | z2) q(z1 | z2, y), by quadrature over z2."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.density.draws import BlockedGuide
from pyrogaps.density.runs import evaluating
from pyrogaps.refine import own_family
from pyrogaps.refine.enumerated import EnumeratedGuide
from pyrogaps.refine.local import points_of
from pyrogaps.refine.optimise import Optimisation
from pyrogaps.run import Run
from pyrogaps.streams import Chunk
from tests.discrete_pairs import DTYPE, best_of

X = torch.tensor([-2.0, 0.3, 2.5], dtype=DTYPE)
STATES, PRIOR = 3, torch.tensor([0.5, 0.2, 0.3], dtype=DTYPE)
SHIFT, SLOPE, SPREAD = torch.tensor([-1.5, 0.2, 1.4], dtype=DTYPE), 0.6, 0.7
GAIN, NOISE = 1.2, 0.8
SHORT = pg.Refinement().tolerance  # what a refinement may fall short of the best by, in nats
U = torch.linspace(-9.0, 9.0, 601, dtype=DTYPE)  # z2 in unconstrained space


class Model(nn.Module):
    """z1 and y, then z2 given both, linear and Gaussian in z1; z2 or its logarithm, which is u, is seen with noise."""

    def __init__(self, positive: bool = False) -> None:
        super().__init__()
        self.positive = positive

    def forward(self, x: Tensor) -> None:
        kind = dist.LogNormal if self.positive else dist.Normal
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(()), 1.0))
            y = pyro.sample("y", dist.Categorical(PRIOR.to(x)))
            z2 = pyro.sample("z2", kind(SHIFT[y].to(x) + SLOPE * z1, SPREAD))
            pyro.sample("x", dist.Normal(GAIN * (z2.log() if self.positive else z2), NOISE), obs=x)


def bound(log_q: Tensor, log_weights: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The ELBO `(B,)` of a guide: log q(u) `(G, B)` and q(y | u) `(G, B, K)` on the grid, z1 Normal given both."""
    u = U[:, None, None]
    given_z1 = (u - SHIFT - SLOPE * loc).square() + (SLOPE * scale).square()
    log_joint = (
        PRIOR.log()
        - 0.5 * (loc.square() + scale.square())
        - given_z1 / (2 * SPREAD**2)
        - math.log(SPREAD)
        - math.log(2 * math.pi)
        + dist.Normal(GAIN * u, NOISE).log_prob(X[:, None])
    )
    entropy = 0.5 + 0.5 * math.log(2 * math.pi) + scale.log()
    given_u = (log_weights.exp() * (log_joint + entropy - log_weights)).sum(-1)
    return (log_q.exp() * (given_u - log_q)).sum(0) * (U[1] - U[0])


class Guide(nn.Module):
    """z2 first, from a Normal or a Gamma; `scales`: z1's scale depends on y."""

    def __init__(self, positive: bool = False, scales: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.positive, self.scales = positive, scales
        self.first = nn.Linear(1, 2)
        self.logits = nn.Linear(2, STATES)
        self.loc, self.log_scale = nn.Parameter(torch.randn(STATES)), nn.Parameter(0.3 * torch.randn(STATES))
        self.slope = nn.Parameter(torch.tensor(0.4))
        self.to(DTYPE)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            first, second = self.first(0.3 * x[:, None]).unbind(-1)
            here = dist.Gamma(1 + first.exp(), second.exp()) if self.positive else dist.Normal(first, second.exp())
            z2 = pyro.sample("z2", here)
            y = pyro.sample("y", dist.Categorical(logits=self.logits(torch.stack([x, z2], -1))))
            scale = self.log_scale[y] if self.scales else self.log_scale[0].expand_as(z2)
            pyro.sample("z1", dist.Normal(self.loc[y] + self.slope * z2, scale.exp()))


def begun(
    guide: Any, model: Any, x: Any = X, plate: Any = None, mode: Any = "eager"
) -> tuple[pg.Problem, EnumeratedGuide]:
    """A problem and its guide as refinement begins."""
    problem = pg.Problem.of(model, guide, x, plate, mode)
    family, chunk = own_family(problem.guide_density()), Chunk(0, problem.num_datapoints)
    assert family.kind == "enumerated"
    refinable = family.start(problem.scored, chunk, Run(0))
    assert isinstance(refinable, EnumeratedGuide)
    return problem, refinable


def by_quadrature(refinable: EnumeratedGuide) -> Tensor:
    """The ELBO `(B,)` of a guide that is being refined, as a function of its parameters."""
    sites, number = refinable.joint.sites, len(U) * STATES
    z = torch.zeros(len(U), STATES, len(X), 3, dtype=DTYPE)
    z[..., sites["z2"].start] = U[:, None, None]
    z[..., sites["y"].start] = torch.arange(STATES)[:, None]
    everyone = torch.arange(len(X))
    with evaluating(refinable.density.guide):
        handler = refinable.sites_with(everyone, number, z.reshape(-1, 3))
        at = refinable.density.messages(everyone, number, handler)

    def on_grid(values: Tensor) -> Tensor:
        return values.expand(number * len(X)).reshape(len(U), STATES, len(X)).transpose(1, 2)

    log_q = on_grid(at["z2"]["fn"].log_prob(at["z2"]["value"]))[..., 0]
    log_q = log_q + U[:, None] if refinable.density.guide.positive else log_q
    log_weights = on_grid(at["y"]["fn"].log_prob(at["y"]["value"]))
    return bound(log_q, log_weights, on_grid(at["z1"]["fn"].loc), on_grid(at["z1"]["fn"].scale))


@pytest.mark.parametrize("positive", [False, True], ids=["normal", "gamma"])
def test_bound_and_gradient_are_those_of_quadrature(positive: bool) -> None:
    """Anywhere in the family: means over draws, within four standard errors."""
    problem, refinable = begun(Guide(positive), Model(positive))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in refinable.parameters:
            parameter.add_(0.3 * torch.randn_like(parameter))
    exact = by_quadrature(refinable)
    gradients = torch.autograd.grad(exact.sum(), refinable.parameters)
    assert sum(gradient[0].numel() for gradient in gradients) == 2 + 2 * (STATES - 1) + (1 + STATES) + STATES
    settings = pg.Refinement(num_particles=120 * STATES)
    density = problem.scorer.bind(torch.arange(len(X)), points_of(refinable, settings.num_particles)[1])
    run = Run(0)
    optimisation = Optimisation(refinable, density, Chunk(0, len(X)), settings, run, "own")
    steps = [
        optimisation._path_gradient(run.stream("gradient"), step, measure=True, mirrored=step % 2 == 0)
        for step in range(60)
    ]
    values = torch.stack([value for value, _ in steps if value is not None])
    found = [torch.stack([each[place] for _, each in steps]) for place in range(len(gradients))]
    for right, mean in zip((exact, *gradients), (values, *found), strict=True):
        error = mean.std(0) / math.sqrt(len(mean))
        assert bool(((mean.mean(0) - right).abs() < 4 * error + 1e-9).all())
        assert float(error.max()) < 0.05 + 0.15 * float(right.detach().abs().max())


def best(scales: bool) -> Tensor:
    """The highest ELBO `(B,)` of the family, over its parameters as a person would write them."""

    def elbo(free: list[Tensor]) -> Tensor:
        place, logits, z1 = free
        log_q = dist.Normal(place[:, 0], place[:, 1].exp()).log_prob(U[:, None])
        intercept, slope = nn.functional.pad(logits.unflatten(1, (2, STATES - 1)), (1, 0)).unbind(1)
        log_weights = (intercept + slope * U[:, None, None]).log_softmax(-1)
        loc = z1[:, :STATES] + z1[:, STATES, None] * U[:, None, None]
        raw = z1[:, STATES + 1 :] if scales else z1[:, STATES + 1, None].expand(-1, STATES)
        return bound(log_q, log_weights, loc, raw.exp().expand_as(loc))

    starts = []
    for seed in range(2):
        torch.manual_seed(seed)
        sizes = (2, 2 * (STATES - 1), 2 * STATES + 1)
        starts.append([0.5 * torch.randn(len(X), size, dtype=DTYPE) for size in sizes])
    return best_of(starts, elbo).detach()


@pytest.mark.parametrize("scales", [True, False])
def test_refined_to_the_best_of_the_family(scales: bool) -> None:
    problem, refinable = begun(Guide(scales=scales), Model(), mode="captured")
    assert (("z1", "scale") in refinable.changes) and ("y", "logits") in refinable.changes
    start = by_quadrature(refinable).detach()
    result = pg.refine(problem, settings=pg.Refinement(num_steps=400), referee=False)
    assert bool(result.converged.all())
    (part,) = result.parts
    assert isinstance(part, EnumeratedGuide)
    reached, highest = by_quadrature(part).detach(), best(scales)
    assert bool((highest > start + 0.1).all())
    assert bool((reached < highest + 1e-6).all()) and bool((reached > highest - SHORT).all()), reached - highest
    found = pg.elbo(problem.with_guide(result), num_particles=2000)  # on draws of y
    assert bool(((found.value - reached).abs() < 4 * found.mcse).all())


class TwoStates(nn.Module):
    """q(y1) q(z | y1) q(y2 | y1, z): the model's factor is any; elements of y2 may be masked."""

    def __init__(self, draws: Callable[..., Any], plate: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.draws, self.plate = draws, plate
        self.weight = nn.Parameter(torch.randn(3, dtype=DTYPE))
        self.given = nn.Parameter(torch.randn(2, dtype=DTYPE))
        self.net = nn.Linear(2, 3, dtype=DTYPE)

    def rows(self, x: Tensor) -> Any:
        return pyro.plate("data", len(x)) if self.plate else nullcontext()

    def model(self, x: Tensor, present: Tensor) -> None:
        with self.rows(x):
            y1 = pyro.sample("y1", dist.Bernoulli(x.new_tensor(0.3)))
            z = pyro.sample("z", self.draws(y1 - 0.5, x.new_tensor(1.0)))
            with pyro.poutine.mask(mask=present):
                y2 = pyro.sample("y2", dist.OneHotCategorical(logits=torch.stack([y1, 0 * y1, -y1], -1)))
            total = z + (y2 @ y2.new_tensor([-1.0, 0.0, 2.0])) * present
            pyro.sample("x", dist.Normal(total, 1.0), obs=x)

    def guide(self, x: Tensor, present: Tensor) -> None:
        with self.rows(x):
            y1 = pyro.sample("y1", dist.Bernoulli(logits=self.weight[0] * x))
            z = pyro.sample("z", self.draws(self.given[y1.long()] + self.weight[1] * x, self.weight[2].exp()))
            with pyro.poutine.mask(mask=present):
                pyro.sample("y2", dist.OneHotCategorical(logits=self.net(torch.stack([y1, z], -1))))


PRESENT = torch.tensor([True, False, True])


@pytest.mark.parametrize("draws", [dist.Normal, dist.Laplace, dist.Gumbel])
@pytest.mark.parametrize("plate", [True, False])
def test_weights_of_paths_add_up_to_one(draws: Any, plate: bool) -> None:
    """With noise that the paths of a particle share, whatever depends on what; their bound is that of draws."""
    if plate:
        program, data = TwoStates(draws), (X, PRESENT)
    else:
        program, data = TwoStates(draws, plate=False), (X[2], PRESENT[0])
    problem, refinable = begun(program.guide, program.model, data, None if plate else False)
    with torch.no_grad():
        for parameter in refinable.parameters:
            parameter.add_(0.2)
    size = problem.num_datapoints
    number, chunk = 200 if plate else 20, Chunk(0, size)  # without a plate, every path is a run
    guide = BlockedGuide(refinable, chunk)
    with torch.no_grad():
        paths = guide.sample_paths(number, Run(0).stream("paths"))
        assert paths is not None and paths.log_weights is not None and len(paths.z) == 6 * number
        weights = paths.log_weights.exp().reshape(6, number, size)
        torch.testing.assert_close(weights.sum(0), torch.ones(number, size, dtype=DTYPE))
        (values,) = problem.scorer.bind(chunk.indices, 6 * number).values(paths.z)
        by_particle = (values - paths.log_q).nan_to_num(neginf=0.0).reshape(6, number, size)
        bounds = (weights * by_particle).sum(0)
        torch.testing.assert_close(paths.mean(values - paths.log_q), bounds.mean(0))
        z, log_q = guide.sample(number, Run(1).stream("draws"))
        torch.testing.assert_close(refinable.at(chunk.indices).log_prob(z), log_q)
        drawn = problem.scored(z, chunk.indices) - log_q
    error = ((bounds.var(0) + drawn.var(0)) / number).sqrt()
    assert bool(((bounds.mean(0) - drawn.mean(0)).abs() < 4 * error).all())
