"""Refinement of guides that draw discrete latents, against the best of their families in closed form."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.density.guide_states import MAX_STATES, read_states
from pyrogaps.refine import own_family
from pyrogaps.refine.tables import Factors
from tests.discrete_pairs import (
    DTYPE,
    LEVELS,
    ONLY,
    Mixture,
    MixtureGuide,
    Sites,
    SitesGuide,
    best_of_sites,
    only_states,
)

X = torch.tensor([-2.0, -0.5, 0.3, 1.0, 2.5], dtype=DTYPE)


# What a refinement may fall short of the best by, in nats: where it settles.
SHORT = pg.Refinement().tolerance
# Of the references, which are optimised.
REFERENCE = 1e-4


def refined(model: Any, guide: Any, x: Any, plate: Any = None) -> pg.log_weights.Estimate:
    """The ELBO of the refined guide, on draws of its own."""
    problem = pg.Problem.of(model, guide, x, plate, "eager")
    result = pg.refine(problem, referee=False)
    assert bool(result.converged.all())
    return pg.elbo(problem.with_guide(result), num_particles=4000)


def assert_best(found: pg.log_weights.Estimate, best: Tensor) -> None:
    """The best of the family: no more than four standard errors above it, nor further below than refinement settles."""
    assert float(found.mcse.max()) < 0.05
    error = found.value - best.detach()
    assert bool((error < 4 * found.mcse + REFERENCE).all()), (error, found.mcse)
    assert bool((error > -4 * found.mcse - SHORT).all()), (error, found.mcse)


@pytest.mark.parametrize("one_hot", [False, True])
def test_latents_given_each_state_then_the_states(one_hot: bool) -> None:
    """L[q*] = log-sum-exp of the best bounds given each state, for independent Normals."""
    model = Mixture(one_hot=one_hot)
    x = model.data(6)
    found = refined(model, MixtureGuide(one_hot=one_hot), x)
    best = model.best_bounds(x).logsumexp(-1)
    assert_best(found, best)
    assert bool((best < model.log_joint(x).logsumexp(-1) - 1e-3).all())  # there is a gap to get right


def test_latents_that_do_not_depend_on_the_states() -> None:
    """q(y) q(z): both are the best for each other. Several optima, because x says little of which y it is."""
    model = Mixture(alike=True, noise=4.0)
    x = model.data(6)
    family = own_family(pg.Problem.of(model, MixtureGuide(shared=True), x).guide_density())
    assert not bool(family.read.steers.any())
    found = refined(model, MixtureGuide(shared=True), x)
    best = model.best_shared(x)
    assert_best(found, best)
    assert float((model.best_bounds(x).logsumexp(-1) - best).max()) > 0.2  # more than dependence would leave


@pytest.mark.parametrize(
    "links", [("21", "z1", "z2"), ("z1", "z2"), ("21", "z2"), ("21",), ()], ids=lambda links: "-".join(links) or "none"
)
def test_several_sites(links: tuple[str, ...]) -> None:
    """Each dependence that the guide leaves out costs what it costs, and no more."""
    model, guide = Sites(), SitesGuide(links)
    read = read_states(pg.Problem.of(model, guide, X).guide_density())
    assert bool(read.parents[1, 0]) == ("21" in links)
    assert not bool(read.parents[0].any())
    assert read.steers.tolist() == ["z1" in links, "z2" in links]
    found = refined(model, guide, X)
    full = len(links) == 3  # the posterior is in the family
    assert_best(found, model.log_joint(X).logsumexp(-1) if full else best_of_sites(model, links, X))


def test_a_guide_that_is_certain_of_the_wrong_state_comes_back() -> None:
    model = Mixture()
    x, guide = model.data(6), MixtureGuide()
    with torch.no_grad():
        guide.logits.weight.zero_()
        guide.logits.bias.copy_(torch.tensor([400.0, 0.0, 0.0]))
    found = refined(model, guide, x)
    assert_best(found, model.best_bounds(x).logsumexp(-1))


def test_what_is_refined_scores_its_own_draws_and_others() -> None:
    model = Sites()
    problem = pg.Problem.of(model, SitesGuide(), X, mode="eager")
    result = pg.refine(problem, referee=False)
    z, log_q = result.sample(300)
    assert [*result.joint.sites] == ["y1", "y2", "z"]
    torch.testing.assert_close(result.at(torch.arange(5)).log_prob(z), log_q)
    mean, scale = model.moments(X)
    state = (3 * z[..., 0] + z[..., 1]).long()
    right = model.log_joint(X).log_softmax(-1).expand(300, -1, -1).gather(-1, state[..., None])[..., 0]
    right = right + dist.Normal(mean, scale).log_prob(z[..., 2:]).gather(-1, state[..., None])[..., 0]
    apart = log_q - right  # its mean is the divergence from the posterior, which the family holds
    assert bool((apart.mean(0) < SHORT + 4 * apart.std(0) / len(apart) ** 0.5).all())
    with pyro.poutine.trace() as tracer:
        values = result(X)
    assert set(values) == {"y1", "y2", "z"}
    assert set(tracer.trace.nodes["y2"]["value"].unique().tolist()) <= {0, 1, 2}


class OnlyStates(nn.Module):
    def __init__(self, linked: bool) -> None:
        super().__init__()
        self.linked = linked
        self.weight = nn.Parameter(torch.tensor([0.3, -0.4], dtype=DTYPE))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(logits=torch.stack([self.weight[0] * x, -x], -1)))
            lean = a if self.linked else 0.5
            pyro.sample("b", dist.Categorical(logits=torch.stack([self.weight[1] * x + lean, x], -1)))


def test_states_alone_are_exact() -> None:
    joint = (ONLY.log() + dist.Normal(LEVELS, 0.7).log_prob(X[:, None, None])).reshape(5, 4)
    problem = pg.Problem.of(only_states, OnlyStates(linked=True), X)
    assert problem.dim == 0
    result = pg.refine(problem, referee=False)
    weights = pg.elbo(only_states, result, X, num_particles=100).log_weights
    torch.testing.assert_close(weights, joint.logsumexp(-1).expand(100, -1))
    states = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    half = torch.full((5, 4, 2), math.log(0.5), dtype=DTYPE)
    best = Factors(states, torch.zeros(2, 2, dtype=torch.bool)).best(joint, half)[1]
    found = refined(only_states, OnlyStates(linked=False), X)
    assert_best(found, best)
    assert float((joint.logsumexp(-1) - best).max()) > 0.01


def test_no_plate() -> None:
    """A latent class and a latent mean of the whole data set."""
    loc = torch.tensor([-1.0, 0.0, 1.5], dtype=DTYPE)
    probs = torch.tensor([0.2, 0.3, 0.5], dtype=DTYPE)

    def model(x: Tensor) -> None:
        y = pyro.sample("y", dist.Categorical(probs))
        z = pyro.sample("z", dist.Normal(loc[y], 1.0))
        with pyro.plate("d", len(x)):
            pyro.sample("x", dist.Normal(z + 0.5 * y, 2.0), obs=x)

    def guide(x: Tensor) -> None:
        logits = pyro.param("logits", lambda: torch.zeros(3, dtype=DTYPE))
        place = pyro.param("place", lambda: torch.tensor([0.1, 0.2, 0.3], dtype=DTYPE))
        scale = pyro.param("scale", lambda: torch.tensor(1.0, dtype=DTYPE), constraint=dist.constraints.positive)
        y = pyro.sample("y", dist.Categorical(logits=logits))
        pyro.sample("z", dist.Normal(place[y], scale))

    guide(X)
    covariance = torch.ones(5, 5, dtype=DTYPE) + 4 * torch.eye(5, dtype=DTYPE)
    means = (loc + 0.5 * torch.arange(3))[:, None].expand(3, 5)
    exact = (probs.log() + torch.distributions.MultivariateNormal(means, covariance).log_prob(X)).logsumexp(-1)
    found = refined(model, guide, X, plate=False)
    assert_best(found, exact[None])


def test_masked_steps() -> None:
    """Ragged sequences: what is masked out has one state, with probability 1."""
    probs = torch.tensor([0.3, 0.6], dtype=DTYPE)

    def model(x: Tensor, length: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), dtype=DTYPE), 1.0))
            for t in range(2):
                with pyro.poutine.mask(mask=t < length):
                    y = pyro.sample(f"y{t}", dist.Bernoulli(probs[t]))
                    pyro.sample(f"x{t}", dist.Normal(z + 2 * y, 0.8), obs=x[:, t])

    weight = nn.Linear(2, 2, dtype=DTYPE)

    def guide(x: Tensor, length: Tensor) -> None:
        pyro.module("weight", weight)
        with pyro.plate("data", len(x)):
            logits = weight(x)
            with pyro.poutine.mask(mask=length > 0):
                first = pyro.sample("y0", dist.Bernoulli(logits=logits[:, 0]))
            with pyro.poutine.mask(mask=length > 1):
                second = pyro.sample("y1", dist.Bernoulli(logits=logits[:, 1] + first))
            scale = pyro.param("scale", lambda: torch.tensor(1.0, dtype=DTYPE), constraint=dist.constraints.positive)
            pyro.sample("z", dist.Normal(x[:, 0] - first - second, scale))

    x, length = torch.randn(3, 2, dtype=DTYPE), torch.tensor([1, 2, 2])
    guide(x, length)
    found = refined(model, guide, (x, length))
    exact = []
    for row, number in zip(x, length.tolist(), strict=True):
        states = torch.cartesian_prod(*[torch.arange(2)] * number).reshape(-1, number)
        covariance = torch.ones(number, number, dtype=DTYPE) + 0.64 * torch.eye(number, dtype=DTYPE)
        prior = dist.Bernoulli(probs[:number]).log_prob(states.to(DTYPE)).sum(-1)
        likelihood = torch.distributions.MultivariateNormal(2 * states.to(DTYPE), covariance).log_prob(row[:number])
        exact.append((prior + likelihood).logsumexp(0))
    assert_best(found, torch.stack(exact))


def test_too_many_states_are_counted_and_the_remedies_work() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))
            with pyro.plate("inner", 20, dim=-1):
                y = pyro.sample("y", dist.Bernoulli(torch.full((20,), 0.4)))
                pyro.sample("x", dist.Normal(z + y, 0.5), obs=x)

    weight = nn.Parameter(torch.zeros(2))

    def guide(x: Tensor, draw: bool = True) -> None:
        pyro.param("weight", lambda: torch.zeros(2))
        with pyro.plate("data", len(x), dim=-2):
            if draw:
                with pyro.plate("inner", 20, dim=-1):
                    pyro.sample("y", dist.Bernoulli(logits=pyro.param("weight")[0] * x))
            pyro.sample("z", dist.Normal(pyro.param("weight")[1] * x.mean(-1, keepdim=True), 1.0))

    x = torch.randn(3, 20) + weight[0].detach()
    assert MAX_STATES < 2**20
    guide(x)
    with pytest.raises(pg.InputError, match="site 'y': the guide draws 10\\^6 joint states"):
        pg.refine(model, guide, x)
    assert bool(torch.isfinite(pg.elbo(model, guide, x, num_particles=10).value).all())
    assert bool(torch.isfinite(pg.refine(model, lambda x: guide(x, draw=False), x, referee=False).traces).all())


def test_states_that_depend_on_latents_without_parameters_are_refused() -> None:
    """Those of a flow; with parameters at all sites, see test_enumerated."""
    model = Mixture()
    flow = dist.transforms.spline(2)

    def guide(x: Tensor, learned: bool = True) -> None:
        if learned:
            pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            base = dist.Normal(x[:, :2], 1.0).to_event(1)
            z = pyro.sample("z", dist.TransformedDistribution(base, [flow]) if learned else base)
            pyro.sample("y", dist.Categorical(logits=torch.cat([z, x[:, :1]], -1)))

    expected = "'y': .* depends on continuous latents, and the parameters of site 'z' \\(TransformedDistribution\\)"
    with pytest.raises(pg.InputError, match=expected):
        pg.refine(model, guide, model.data(4))
    with pytest.raises(pg.InputError, match="it has no learned parameters"):
        pg.refine(model, lambda x: guide(x, learned=False), model.data(4))
    assert bool(torch.isfinite(pg.elbo(model, guide, model.data(4)).value).all())
