"""Discrete latents that a guide draws: the space of y and z, its density, and the guide's."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.density import GuideDensity, JointDensity
from tests.discrete_pairs import DTYPE, Mixture, MixtureGuide, Sites, SitesGuide

STANDARD_ERRORS = 4.0


def problem_of(**settings: Any) -> tuple[Mixture, Tensor, pg.Problem]:
    model = Mixture(**settings)
    x = model.data(6)
    return model, x, pg.Problem.of(model, MixtureGuide(**settings), x)


@pytest.mark.parametrize("one_hot", [False, True])
def test_the_guide_draws_states_beside_the_latents(one_hot: bool) -> None:
    _model, x, problem = problem_of(one_hot=one_hot)
    assert [*problem.joint.sites] == ["z"]
    assert [*problem.scored.sites] == ["y", "z"]
    assert problem.dim == 2
    density = problem.guide_density()
    z, log_q = density.sample(500)
    y = z[..., 0].long()
    assert torch.equal(z[..., 0], y.to(z))
    guide = problem.guide
    h = guide.latents(x) + guide.shift[y]
    right = torch.log_softmax(guide.logits(x), -1).expand(500, -1, -1).gather(-1, y[..., None])[..., 0]
    right = right + dist.Normal(h[..., :2], (0.3 * h[..., 2:]).exp()).log_prob(z[..., 1:]).sum(-1)
    torch.testing.assert_close(log_q, right)
    torch.testing.assert_close(density.log_prob(z), right)
    share = torch.nn.functional.one_hot(y, 3).double().mean(0)
    probs = torch.softmax(guide.logits(x), -1)
    assert bool(((share - probs).abs() < STANDARD_ERRORS * (probs * (1 - probs) / 500).sqrt() + 1e-9).all())


@pytest.mark.parametrize("one_hot", [False, True])
def test_the_density_is_that_of_both_and_sums_to_that_of_the_latents(one_hot: bool) -> None:
    model, x, problem = problem_of(one_hot=one_hot)
    z = torch.randn(5, 6, 2, dtype=DTYPE)
    columns = []
    for k in range(3):
        flat = torch.cat([torch.full((5, 6, 1), float(k), dtype=DTYPE), z], -1)
        right = model.probs[k].log() + dist.Normal(model.loc[k], model.scale[k]).log_prob(z).sum(-1)
        right = right + dist.Normal(z @ model.weight.T, model.noise).log_prob(x).sum(-1)
        columns.append(problem.scored(flat))
        torch.testing.assert_close(columns[-1], right)
    torch.testing.assert_close(torch.stack(columns).logsumexp(0), problem.joint(z))


def test_recorded_densities_agree() -> None:
    _, _, problem = problem_of()
    z, _ = problem.guide_density().sample(7)
    (values,), (gradients,) = problem.scorer.bind(torch.arange(6), 7)(z)
    torch.testing.assert_close(values, problem.scored(z))
    assert not bool(gradients[..., 0].any())


@pytest.mark.parametrize("one_hot", [False, True])
def test_the_elbo_is_that_of_pyro(one_hot: bool) -> None:
    """`TraceEnum_ELBO` sums over y in the guide, or with sequential enumeration runs it once for each."""
    model, x, problem = problem_of(one_hot=one_hot)
    found = pg.elbo(problem, num_particles=4000)
    loss = TraceEnum_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1)
    theirs = torch.tensor([-loss.loss(model, problem.guide, x) for _ in range(20)], dtype=DTYPE)
    error = (found.mcse.square().sum() + theirs.var() / len(theirs)).sqrt()
    assert abs(float(found.value.sum() - theirs.mean())) < STANDARD_ERRORS * float(error)


def test_the_elbo_is_that_of_plain_draws() -> None:
    model, x = Sites(), torch.tensor([-1.0, 0.4, 2.0], dtype=DTYPE)
    guide = SitesGuide()
    found = pg.elbo(model, guide, x, num_particles=4000)
    loss = Trace_ELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1)
    theirs = torch.tensor([-loss.loss(model, guide, x) for _ in range(20)], dtype=DTYPE)
    error = (found.mcse.square().sum() + theirs.var() / len(theirs)).sqrt()
    assert abs(float(found.value.sum() - theirs.mean())) < STANDARD_ERRORS * float(error)


def test_weights_of_both_have_the_evidence_for_a_mean() -> None:
    model, x = Sites(), torch.tensor([-1.0, 0.4, 2.0], dtype=DTYPE)
    weights = pg.iwae(model, SitesGuide(), x, num_particles=20000).log_weights
    ratios = (weights - model.log_joint(x).logsumexp(-1)).exp()
    assert bool(((ratios.mean(0) - 1).abs() < STANDARD_ERRORS * ratios.std(0) / len(ratios) ** 0.5).all())


class FirstOnly(nn.Module):
    """A guide of `Sites` that draws y1 and leaves y2 out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, 0.5], dtype=DTYPE))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y1 = pyro.sample("y1", dist.Bernoulli(logits=self.weight[0] * x))
            pyro.sample("z", dist.Normal(self.weight[1] * x + y1, 1.3))


def test_sites_that_the_guide_leaves_out_stay_summed_out() -> None:
    model, x = Sites(), torch.tensor([-1.0, 0.4, 2.0], dtype=DTYPE)
    problem = pg.Problem.of(model, FirstOnly(), x)
    assert [*problem.scored.sites] == ["y1", "z"]
    assert [*problem.joint.sites] == ["z"]
    weights = pg.iwae(problem, num_particles=20000).log_weights
    ratios = (weights - model.log_joint(x).logsumexp(-1)).exp()
    assert bool(((ratios.mean(0) - 1).abs() < STANDARD_ERRORS * ratios.std(0) / len(ratios) ** 0.5).all())


def test_draws_ignore_that_sites_are_marked_for_enumeration() -> None:
    """Also where the model's own site is marked, which `config_enumerate` does."""
    model = poutine.infer_config(Mixture(), lambda site: {"enumerate": "parallel"} if site["name"] == "y" else {})
    x = Mixture().data(6)
    marked, plain = pg.elbo(model, MixtureGuide(), x), pg.elbo(Mixture(), MixtureGuide(), x)
    torch.testing.assert_close(marked.value, plain.value)


def test_a_plate_inside_the_data_plate() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0))
            with pyro.plate("inner", 3, dim=-1):
                y = pyro.sample("y", dist.Bernoulli(torch.tensor([0.3, 0.6, 0.5])))
                pyro.sample("x", dist.Normal(z + 2 * y, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            with pyro.plate("inner", 3, dim=-1):
                y = pyro.sample("y", dist.Bernoulli(logits=x))
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True) - y.mean(-1, keepdim=True), 0.8))

    x = torch.randn(4, 3)
    problem = pg.Problem.of(model, guide, x)
    assert problem.scored.sites["y"].shape == (3,)
    z, log_q = problem.guide_density().sample(50)
    y, latent = z[..., problem.scored.sites["y"].columns], z[..., problem.scored.sites["z"].columns]
    right = dist.Bernoulli(logits=x).log_prob(y).sum(-1)
    right = right + dist.Normal(x.mean(-1) - y.mean(-1), 0.8).log_prob(latent[..., 0])
    torch.testing.assert_close(log_q, right)
    right = dist.Bernoulli(torch.tensor([0.3, 0.6, 0.5])).log_prob(y).sum(-1)
    right = right + dist.Normal(0.0, 1.0).log_prob(latent[..., 0])
    right = right + dist.Normal(latent + 2 * y, 0.5).log_prob(x).sum(-1)
    torch.testing.assert_close(problem.scored(z), right)


def test_masked_elements_have_one_state() -> None:
    def model(x: Tensor, length: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for t in range(2):
                with poutine.mask(mask=t < length):
                    y = pyro.sample(f"y{t}", dist.Bernoulli(0.3))
                    pyro.sample(f"x{t}", dist.Normal(2 * y, 1.0), obs=x[:, t])

    def guide(x: Tensor, length: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for t in range(2):
                with poutine.mask(mask=t < length):
                    pyro.sample(f"y{t}", dist.Bernoulli(logits=x[:, t]))

    data = torch.randn(3, 2), torch.tensor([1, 2, 2])
    problem = pg.Problem.of(model, guide, data)
    z, log_q = problem.guide_density().sample(200)
    assert not bool(z[:, 0, 1].any())
    right = dist.Bernoulli(logits=data[0]).log_prob(z)
    torch.testing.assert_close(log_q[:, 1:], right.sum(-1)[:, 1:])
    torch.testing.assert_close(log_q[:, 0], right[:, 0, 0])


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (dist.Categorical(torch.ones(4)), "site 'y': 4 states in the guide, 3 in the model"),
        (dist.Normal(0.0, 1.0), "site 'y': continuous in the guide, discrete in the model"),
    ],
)
def test_other_supports_are_refused(fn: Any, message: str) -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", fn)
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))

    model = Mixture()
    with pytest.raises(pg.InputError, match=message):
        pg.Problem.of(model, guide, model.data(4))


def test_a_discrete_site_in_the_place_of_a_continuous_one_is_refused() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(torch.ones(3)))
            pyro.sample("z", dist.Bernoulli(torch.ones(len(x), 2) / 2).to_event(1))

    model = Mixture()
    with pytest.raises(pg.InputError, match="site 'z': discrete in the guide, continuous in the model"):
        pg.Problem.of(model, guide, model.data(4))


def test_guides_that_draw_states_are_never_taken_for_factorised() -> None:
    """Two runs that draw the same states, as nearly certain ones do, say nothing of what depends on them."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([1 - 2e-6, 1e-6, 1e-6], dtype=DTYPE)))
            pyro.sample("z", dist.Normal(y[:, None].expand(-1, 2).to(DTYPE), 1.0).to_event(1))

    model = Mixture()
    x = model.data(4)
    density = pg.Problem.of(model, guide, x).guide_density()
    assert not density.factorised
    z = torch.zeros(1, 4, 3, dtype=DTYPE)
    z[..., 0] = 2.0
    right = dist.Normal(2.0, 1.0).log_prob(torch.zeros((), dtype=DTYPE)) * 2 + torch.tensor(1e-6, dtype=DTYPE).log()
    torch.testing.assert_close(density.log_prob(z), right.expand(1, 4))


def test_the_density_may_be_read_with_columns_for_states() -> None:
    model = Mixture()
    joint = JointDensity(model, model.data(4), drawn=("y",))
    z = joint.sample_prior(200)
    assert set(z[..., 0].unique().tolist()) == {0.0, 1.0, 2.0}
    values = joint.constrain(z)
    assert torch.equal(values["y"].to(z), z[..., 0])
    assert GuideDensity(MixtureGuide(), None, joint).terms[0].site.num_states == 3
