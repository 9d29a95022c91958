"""The bound with entropy: the bounds that it contains, its expectation, its limit, and training by it."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.guides.amortized import AmortizedMultivariateNormal, AmortizedNormal
from pyrogaps.log_weights import mcse_of_mean
from pyrogaps.mapa.explainers import explaining_mixture
from pyrogaps.models.linear_gaussian import LinearGaussian
from tests.mapa.examples import DIM, LATENT, Encoder, Model, data

X = data(12)
N = len(X)
ALL = torch.arange(N)
POSTERIOR = pg.mapa_posterior(X, pg.GaussianKernel(1.5))
LINEAR = LinearGaussian(data(LATENT, seed=4).T, 0.3, 0.8)


class Exact(nn.Module):
    """The posterior of `LINEAR`."""

    def forward(self, x: Tensor) -> None:
        mean, covariance = LINEAR.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(mean.detach(), covariance.detach()))


def guide(kind: Any = AmortizedNormal) -> Any:
    torch.manual_seed(3)
    return kind(DIM, LATENT, (6,)).double()


def posterior_of(encoder: Any, x: Tensor) -> Any:
    if isinstance(encoder, AmortizedMultivariateNormal):
        mean, scale_tril = encoder.parameters_of(x)
        return dist.MultivariateNormal(mean, scale_tril=scale_tril)
    return dist.Normal(*encoder.parameters_of(x)).to_event(1)


def test_one_draw_of_itself_is_the_elbo() -> None:
    encoder = guide()
    loss = pg.MAPA_IWAE_ELBO(POSTERIOR)
    loss.bounds(LINEAR, encoder, ALL)
    torch.manual_seed(0)
    bounds = loss.bounds(LINEAR, encoder, ALL)
    torch.manual_seed(0)
    expected = -Trace_ELBO().loss(LINEAR, encoder, X)
    assert float(bounds.sum().detach()) == pytest.approx(expected, rel=1e-12)


def test_draws_of_itself_alone_are_the_importance_weighted_bound() -> None:
    encoder, rows = guide(), 400
    repeated = X[:1].expand(rows, -1).contiguous()
    loss = pg.MAPA_IWAE_ELBO(pg.mapa_posterior(repeated, pg.GaussianKernel(1.0), num_neighbours=1), num_draws=5)
    ours = torch.cat([loss.bounds(LINEAR, encoder, torch.arange(rows)).detach() for _ in range(10)])
    with torch.no_grad():
        z = posterior_of(encoder, repeated).sample(torch.Size([5 * 10]))
        weights = joint_of(repeated, z) - posterior_of(encoder, repeated).log_prob(z)
        theirs = (weights.reshape(10, 5, rows).logsumexp(1) - math.log(5)).flatten()
    error = math.hypot(float(mcse_of_mean(ours)), float(mcse_of_mean(theirs)))
    assert abs(float(ours.mean() - theirs.mean())) < 4 * error


def joint_of(x: Tensor, z: Tensor) -> Tensor:
    """log p(x, z) under `LINEAR`."""
    prior = dist.Normal(torch.zeros_like(LINEAR.prior_scale), LINEAR.prior_scale).to_event(1)
    likelihood = dist.Normal(z @ LINEAR.weight.T + LINEAR.bias, LINEAR.noise_scale).to_event(1)
    total: Tensor = prior.log_prob(z) + likelihood.log_prob(x)
    return total


@pytest.mark.parametrize("kind", [AmortizedNormal, AmortizedMultivariateNormal])
@pytest.mark.parametrize(("num_top", "num_samples", "num_draws"), [(1, 0, 3), (4, 0, 1), (2, 3, 2), (0, 4, 1)])
def test_it_is_the_bound_of_its_docstring(kind: Any, num_top: int, num_samples: int, num_draws: int) -> None:
    encoder, indices = guide(kind), torch.tensor([7, 2, 2, 11])
    loss = pg.MAPA_IWAE_ELBO(POSTERIOR, num_top=num_top, num_samples=num_samples, num_draws=num_draws)
    loss.bounds(LINEAR, encoder, indices)
    torch.manual_seed(1)
    bounds = loss.bounds(LINEAR, encoder, indices)
    torch.manual_seed(1)
    columns, log_mixture = explaining_mixture(POSTERIOR, indices, num_top, num_samples)
    unique = torch.cat([indices, columns.flatten()]).unique()
    z = posterior_of(encoder, X[unique].repeat(num_draws, 1)).rsample().reshape(num_draws, len(unique), LATENT)
    for n, index in enumerate(indices):
        explaining = posterior_of(encoder, X[columns[n]])
        total = torch.zeros((), dtype=torch.float64)
        for i, log_a in zip(columns[n], log_mixture[n], strict=True):
            for draw in z[:, int((unique == i).nonzero())]:
                proposal = (log_mixture[n] + explaining.log_prob(draw)).logsumexp(0)
                total = total + (log_a + joint_of(X[index], draw) - proposal).exp() / num_draws
        torch.testing.assert_close(bounds[n], total.log(), rtol=1e-9, atol=1e-9)


def test_its_exponential_is_unbiased() -> None:
    encoder = guide()
    loss = pg.MAPA_IWAE_ELBO(POSTERIOR, num_top=2, num_samples=3, num_draws=2)
    with torch.no_grad():
        draws = torch.stack([loss.bounds(LINEAR, encoder, ALL) for _ in range(2000)])
        ratios = (draws - LINEAR.log_evidence(X)).exp()
    z_scores = (ratios.mean(0) - 1) / mcse_of_mean(ratios)
    assert float(z_scores.abs().max()) < 4.5
    assert float(z_scores.square().mean()) < 2.5
    assert bool((draws.mean(0) < LINEAR.log_evidence(X)).all())


def test_exact_posterior_makes_it_tight() -> None:
    for num_draws in (1, 3):
        loss = pg.MAPA_IWAE_ELBO(POSTERIOR, num_draws=num_draws)
        torch.testing.assert_close(loss.bounds(LINEAR, Exact(), ALL), LINEAR.log_evidence(X))


def test_it_rises_with_draws_and_explanations() -> None:
    encoder, means = guide(), []
    for num_top, num_draws in ((1, 1), (1, 4), (1, 16), (6, 16)):
        loss = pg.MAPA_IWAE_ELBO(POSTERIOR, num_top=num_top, num_draws=num_draws)
        with torch.no_grad():
            draws = torch.stack([loss.bounds(LINEAR, encoder, ALL).mean() for _ in range(300)])
        means.append(float(draws.mean()))
    assert means == sorted(means)


def test_it_becomes_mapas_bound_as_the_guide_becomes_a_delta_and_the_prior_is_made_of_them() -> None:
    model, encoder, scale = Model(), Encoder(), 1e-7

    def mixed(x: Tensor) -> None:
        centers = dist.Normal(encoder.net(X), scale).to_event(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(N).double()), centers))
            pyro.sample("x", model.likelihood(model.decoder(z)), obs=x)

    def narrow(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder.net(x), scale).to_event(1))

    with torch.no_grad():
        bounds = pg.MAPA_IWAE_ELBO(POSTERIOR, num_top=N).bounds(mixed, narrow, ALL)
        expected = pg.MAPA_ELBO(POSTERIOR, num_top=N).bounds(model, encoder, ALL)
    torch.testing.assert_close(bounds, expected, rtol=0, atol=1e-4)


def test_explanations_without_probability_change_nothing() -> None:
    narrow = pg.mapa_posterior(X, pg.GaussianKernel(1e-6))
    assert bool((narrow.log_q[:, 1:] < -700).all())
    encoder = guide()
    loss = pg.MAPA_IWAE_ELBO(narrow, num_top=1, num_samples=4)
    values = loss.bounds(LINEAR, encoder, ALL)
    values.sum().backward()
    assert bool(torch.isfinite(values).all())
    assert all(bool(torch.isfinite(value.grad).all()) for value in encoder.parameters())


def test_rows_are_decoded_once_and_counted() -> None:
    model, encoder = Model(), guide()
    loss = pg.MAPA_IWAE_ELBO(POSTERIOR, num_top=3, num_draws=2)
    loss.bounds(model, encoder, ALL)
    model.decoded.clear()
    loss.reset_counts()
    loss.bounds(model, encoder, ALL)
    assert model.decoded == [2 * N] == [loss.num_decoded]
    assert loss.num_scored == N


def test_training_by_it_gets_near_the_best_model() -> None:
    torch.manual_seed(0)
    x = dist.Normal(torch.randn(300, LATENT).double() @ LINEAR.weight.detach().T, 0.8).sample()
    # Of two latents and three dimensions every Gaussian is a model, but for the noise, which is shared here by all.
    best = dist.MultivariateNormal(x.mean(0), x.T.cov()).log_prob(x).mean()
    model, encoder = LinearGaussian(data(LATENT, seed=9).T, 0.0, 1.0), guide(AmortizedMultivariateNormal)
    loss = pg.MAPA_IWAE_ELBO(pg.mapa_posterior(x, "gaussian", bandwidth=1.0), num_top=2, num_samples=2)
    started = float(model.log_evidence(x).detach().mean())
    result = pg.train(model, encoder, x, objective=loss, num_epochs=60, learning_rate=0.02, progress=False)
    reached = float(model.log_evidence(x).detach().mean())
    assert started < float(best) - 0.3
    assert float(best) - 0.05 < reached < float(best) + 1e-6
    assert result.train_elbo < reached + 0.02


class Sites(nn.Module):
    """A guide that `draws`."""

    def __init__(self, draws: Any) -> None:
        super().__init__()
        self.draws = draws

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            self.draws(x[:, :LATENT])


def two_sites(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(torch.zeros(LATENT).double(), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(a.sum(-1), 1.0))
        pyro.sample("x", dist.Normal(b[:, None], 1.0).expand([len(x), DIM]).to_event(1), obs=x)


def leaning(x: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(x, 1.0).to_event(1))
    pyro.sample("b", dist.Normal(a.sum(-1), 1.0))


def independent(x: Tensor) -> None:
    pyro.sample("a", dist.Normal(x, 1.0).to_event(1))
    pyro.sample("b", dist.Normal(x.sum(-1), 1.0))


class Uniformly(dist.Normal):  # type: ignore[misc]
    has_rsample = False


REFUSED = {
    "it is a Delta in the encoder": lambda x: pyro.sample("z", dist.Delta(x, event_dim=1)),
    "cannot be reparametrised": lambda x: pyro.sample("z", Uniformly(x, 1.0).to_event(1)),
    "masked": lambda x: pyro.sample("z", dist.Normal(x, 1.0).to_event(1).mask(x[:, 0] > 0)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_encoders_without_a_density_of_their_own_are_refused(message: str) -> None:
    with pytest.raises(pg.InputError, match=f"site 'z': .*{message}"):
        pg.MAPA_IWAE_ELBO(POSTERIOR).bounds(LINEAR, Sites(REFUSED[message]), ALL)


def test_several_sites_serve_where_each_depends_on_x_alone() -> None:
    loss = pg.MAPA_IWAE_ELBO(POSTERIOR, num_top=3)
    assert bool(torch.isfinite(loss.bounds(two_sites, Sites(independent), ALL)).all())
    with pytest.raises(pg.InputError, match="site 'b': its density in the encoder depends on other latents"):
        pg.MAPA_IWAE_ELBO(POSTERIOR).bounds(two_sites, Sites(leaning), ALL)


def test_sizes_are_refused() -> None:
    with pytest.raises(pg.InputError, match=r"MAPA_IWAE_ELBO\.num_draws: must be a whole number of at least 1, got 0"):
        pg.MAPA_IWAE_ELBO(POSTERIOR, num_draws=0)
    with pytest.raises(pg.InputError, match=r"MAPA_IWAE_ELBO: num_samples=12 is too large to draw without replacement"):
        pg.MAPA_IWAE_ELBO(POSTERIOR, num_samples=N)


def test_looking_leaves_no_trace() -> None:
    with poutine.trace(param_only=True) as trace:
        pg.MAPA_IWAE_ELBO(POSTERIOR)._paired(LINEAR, guide())
    assert not [name for name, site in trace.trace.nodes.items() if site["type"] == "param"]
