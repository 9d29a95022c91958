"""The bound: its special cases, its expectation by enumeration, its gradient, and training by it."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from torch import Tensor, nn
from torch.distributions import constraints

import pyrogaps as pg
from pyrogaps.mapa import empiricalized_posterior
from tests.mapa.examples import (
    DIM,
    LATENT,
    Encoder,
    Likelihood,
    Model,
    bernoulli,
    data,
    enumerated_bound,
    exact_log_likelihood,
    gaussian,
    log_likelihoods,
)

X = data()
N = len(X)
ALL = torch.arange(N)
DRAWS = 2000


class OwnDistribution(dist.TorchDistribution):
    """A Normal whose constructor takes more than its parameters, so that it cannot be built again."""

    arg_constraints = {"loc": constraints.real}  # noqa: RUF012
    support = constraints.real

    def __init__(self, loc: Tensor, power: float = 2.0, validate_args: bool | None = None) -> None:
        self.loc, self.power = loc, power
        super().__init__(loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "OwnDistribution":
        return OwnDistribution(self.loc.expand(batch_shape), self.power, validate_args=False)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        return self.loc.expand(sample_shape + self.batch_shape).detach()

    def log_prob(self, value: Tensor) -> Tensor:
        return -((value - self.loc).abs() ** self.power)


def multivariate(output: Tensor) -> Any:
    below = output[..., None].tanh().expand(*output.shape, DIM).tril(-1)
    scale_tril = torch.eye(DIM, dtype=output.dtype) + 0.3 * below
    return dist.MultivariateNormal(output, scale_tril=scale_tril)


def mixture(output: Tensor) -> Any:
    locs = torch.stack([output, -output], -1)
    weights = dist.Categorical(logits=torch.stack([output, 0 * output], -1))
    return dist.MixtureSameFamily(weights, dist.Normal(locs, 0.7)).to_event(1)


LIKELIHOODS: dict[str, tuple[Likelihood, Tensor]] = {
    "normal": (gaussian, X),
    "bernoulli": (bernoulli, (X > 0).double()),
    "bernoulli, probabilities": (lambda output: dist.Bernoulli(output.sigmoid()).to_event(1), (X > 0).double()),
    "continuous bernoulli": (lambda output: dist.ContinuousBernoulli(logits=output).to_event(1), X.sigmoid()),
    "scale of z": (lambda output: dist.Normal(output, output.exp()).to_event(1), X),
    "multivariate": (multivariate, X),
    "mixture": (mixture, X),
    "categorical": (lambda output: dist.Categorical(logits=output.unsqueeze(-1) * torch.arange(4)).to_event(1),
                    torch.arange(N * DIM).reshape(N, DIM) % 4),
    "own": (lambda output: OwnDistribution(output).to_event(1), X),
}  # fmt: skip


def posterior_of(x: Tensor, **options: Any) -> pg.MapaPosterior:
    return pg.mapa_posterior(x, pg.GaussianKernel(0.6), **options)


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_all_on_top_is_the_exact_log_likelihood(kind: str) -> None:
    likelihood, x = LIKELIHOODS[kind]
    model, encoder = Model(likelihood), Encoder()
    if x.dtype == torch.int64:
        encoder.net.forward = lambda x, net=encoder.net: nn.functional.linear(x.double(), net.weight, net.bias)
    loss = pg.MAPA_ELBO(posterior_of(x), num_top=N)
    rows = torch.tensor([5, 0, 2, 2])
    expected = exact_log_likelihood(log_likelihoods(model, encoder, x))
    torch.testing.assert_close(loss.bounds(model, encoder, rows), expected[rows], rtol=0, atol=1e-10)


def test_one_on_top_is_the_autoencoders_loss_less_log_n() -> None:
    model, encoder = Model(), Encoder()
    loss = pg.MAPA_ELBO(posterior_of(X))
    reconstruction = log_likelihoods(model, encoder, X).diagonal().detach()
    torch.testing.assert_close(
        loss.bounds(model, encoder, ALL).detach(), reconstruction - math.log(N), rtol=0, atol=1e-10
    )
    value = SVI(model, encoder, Adam({"lr": 1e-3}), loss=loss).evaluate_loss(ALL)
    assert value == pytest.approx(math.log(N) - float(reconstruction.mean()), abs=1e-5)


def test_a_plate_that_subsamples_is_not_scaled() -> None:
    encoder, plain = Encoder(), Model()

    def model(x: Tensor) -> None:
        with pyro.plate("data", N, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT).double(), 1.0).to_event(1))
            pyro.sample("x", gaussian(plain.decoder(z)), obs=x)

    loss = pg.MAPA_ELBO(posterior_of(X), num_top=N)
    expected = exact_log_likelihood(log_likelihoods(plain, encoder, X))[:2]
    torch.testing.assert_close(loss.bounds(model, encoder, ALL[:2]), expected, rtol=0, atol=1e-10)


def test_plates_inside_and_several_sites() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1).double(), 1.0))
            pyro.sample("y", dist.Poisson(z.exp()), obs=y)
            with pyro.plate("pixels", DIM, dim=-1):
                pyro.sample("x", dist.Normal(z * torch.arange(DIM), 0.5), obs=x)

    def encoder(x: Tensor, y: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2):
            pyro.sample("z", dist.Delta(0.3 * x.sum(-1, keepdim=True)))

    y = torch.arange(N, dtype=torch.float64)[:, None]
    z = 0.3 * X.sum(-1)
    table = dist.Normal(z[:, None] * torch.arange(DIM), 0.5).to_event(1).log_prob(X[:, None])
    table = table + dist.Poisson(z.exp()).log_prob(y)
    posterior = pg.mapa_posterior((X, y), pg.GaussianKernel(0.6))
    found = pg.MAPA_ELBO(posterior, num_top=N, plate="rows").bounds(model, encoder, ALL)
    torch.testing.assert_close(found, exact_log_likelihood(table), rtol=0, atol=1e-10)


def mean_bound(loss: pg.MAPA_ELBO, model: Any, encoder: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard error of the bound over `DRAWS` draws, `(N,)`."""
    with torch.no_grad():
        draws = loss.bounds(model, encoder, ALL.repeat(DRAWS)).reshape(DRAWS, N)
    return draws.mean(0), draws.std(0) / math.sqrt(DRAWS)


@pytest.mark.parametrize(("num_top", "num_samples"), [(0, 1), (1, 1), (2, 2), (4, 1), (0, 3)])
def test_expectation_is_that_of_enumeration(num_top: int, num_samples: int) -> None:
    model, encoder = Model(), Encoder()
    posterior = posterior_of(X)
    expected = enumerated_bound(log_likelihoods(model, encoder, X).detach(), posterior, num_top, num_samples)
    loss = pg.MAPA_ELBO(posterior, num_top=num_top, num_samples=num_samples)
    mean, error = mean_bound(loss, model, encoder)
    assert float(((mean - expected).abs() / error).max()) < 4


def test_bound_rises_with_top_and_with_samples() -> None:
    table = log_likelihoods(Model(), Encoder(), X).detach()
    exact = exact_log_likelihood(table)
    for posterior in (posterior_of(X), posterior_of(X).with_bandwidth(1e300)):
        by_top = torch.stack([enumerated_bound(table, posterior, top, 0) for top in range(1, N + 1)])
        with_draws = torch.stack([enumerated_bound(table, posterior, top, 2) for top in range(N)])
        by_draws = torch.stack([enumerated_bound(table, posterior, 1, number) for number in range(5)])
        for bounds in (by_top, with_draws, by_draws):
            assert float(bounds.diff(dim=0).min()) > -1e-12
            assert float((exact - bounds).min()) > -1e-12
        torch.testing.assert_close(by_top[-1], exact)


def test_draws_without_replacement_tighten_the_bound() -> None:
    model, encoder = Model(), Encoder()
    posterior = posterior_of(X)
    exact = exact_log_likelihood(log_likelihoods(model, encoder, X).detach())
    loss = {kind: pg.MAPA_ELBO(posterior, num_top=1, num_samples=4, replacement=kind) for kind in (True, False)}
    (with_mean, with_error), (mean, error) = (mean_bound(loss[kind], model, encoder) for kind in (True, False))
    assert bool((mean > with_mean - 3 * (error + with_error)).all())
    assert float((mean - with_mean).mean()) > 4 * float((error.square() + with_error.square()).sum().sqrt()) / N
    assert bool((mean < exact + 4 * error).all())
    full = pg.MAPA_ELBO(posterior, num_top=2, num_samples=N - 2, replacement=False)
    torch.testing.assert_close(full.bounds(model, encoder, ALL), exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("replacement", [True, False])
def test_true_posterior_makes_the_bound_tight(replacement: bool) -> None:
    model, encoder = Model(), Encoder()
    posterior = empiricalized_posterior(model, encoder, X)
    exact = exact_log_likelihood(log_likelihoods(model, encoder, X))
    for num_top, num_samples in ((0, 1), (1, 2), (3, 2)):
        loss = pg.MAPA_ELBO(posterior, num_top=num_top, num_samples=num_samples, replacement=replacement)
        torch.testing.assert_close(loss.bounds(model, encoder, ALL), exact, rtol=0, atol=1e-9)


def test_sparse_posterior_gives_a_lower_bound_that_leaves_the_rest_out() -> None:
    model, encoder = Model(), Encoder()
    table = log_likelihoods(model, encoder, X).detach()
    sparse = posterior_of(X, num_neighbours=4)
    found = pg.MAPA_ELBO(sparse, num_top=4).bounds(model, encoder, ALL)
    expected = table.gather(1, sparse.indices.long()).logsumexp(1) - math.log(N)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert bool((found < exact_log_likelihood(table)).all())
    drawn = pg.MAPA_ELBO(sparse, num_top=1, num_samples=3, replacement=False).bounds(model, encoder, ALL)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-9)


def test_sparse_with_all_neighbours_is_dense() -> None:
    model, encoder = Model(), Encoder()
    values = []
    for number in (None, N):
        torch.manual_seed(4)
        loss = pg.MAPA_ELBO(posterior_of(X, num_neighbours=number), num_top=2, num_samples=3)
        values.append(loss.bounds(model, encoder, ALL))
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("replacement", [True, False])
def test_no_gradient_flows_through_the_posterior(replacement: bool) -> None:
    """The gradient is that of the bound with the weights held fixed, also where the posterior came from the model."""
    model, encoder = Model(), Encoder()
    posterior = empiricalized_posterior(model, encoder, X)
    parameters = [*model.parameters(), *encoder.parameters()]
    loss = pg.MAPA_ELBO(posterior, num_top=1, num_samples=2, replacement=replacement)
    torch.manual_seed(5)
    gradients = torch.autograd.grad(loss.bounds(model, encoder, ALL).mean(), parameters)
    torch.manual_seed(5)
    columns, log_weights = pg.mapa.explainers(posterior, ALL, 1, 2, replacement=replacement)
    assert not posterior.log_q.requires_grad and not log_weights.requires_grad
    terms = log_likelihoods(model, encoder, X).gather(1, columns) + log_weights.clone()
    expected = torch.autograd.grad((terms.logsumexp(1) - math.log(N)).mean(), parameters)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


def test_each_datapoint_is_encoded_and_decoded_once_and_counted() -> None:
    model, encoder = Model(), Encoder()
    loss = pg.MAPA_ELBO(posterior_of(X), num_top=2, num_samples=3)
    svi = SVI(model, encoder, Adam({"lr": 1e-3}), loss=loss)
    svi.step(ALL[:2])
    loss.reset_counts()
    for batch in (ALL[:3], ALL[3:6]):
        encoder.encoded.clear()
        model.decoded.clear()
        before = loss.num_decoded
        svi.step(batch)
        assert encoder.encoded == model.decoded == [loss.num_decoded - before]
        assert loss.num_decoded - before <= N
    assert loss.num_encoded == loss.num_decoded
    assert loss.num_scored == 6


def test_checks_leave_the_callers_random_state_modes_and_parameters_alone() -> None:
    model, encoder = Model(), Encoder()
    encoder.eval()
    state = torch.get_rng_state()
    pg.MAPA_ELBO(posterior_of(X), num_top=2).bounds(model, encoder, ALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not encoder.training


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("likelihood", [gaussian, bernoulli])
def test_training_raises_the_likelihood(likelihood: Callable[..., Any], replacement: bool) -> None:
    z = torch.linspace(-1, 1, 60, dtype=torch.float64)
    x = torch.stack([2 * z, 3 * z.square(), z + 2], 1) + 0.1 * data(60)
    x = x if likelihood is gaussian else (x > 0.3).double()
    model, encoder = Model(likelihood), Encoder()
    posterior = posterior_of(x, num_neighbours=30)
    loss = pg.MAPA_ELBO(posterior, num_top=2, num_samples=3, replacement=replacement)
    svi = SVI(model, encoder, Adam({"lr": 3e-2}), loss=loss)
    before = exact_log_likelihood(log_likelihoods(model, encoder, x)).mean()
    torch.manual_seed(0)
    losses = [svi.step(batch) for _ in range(25) for batch in loss.minibatches(20)]
    assert all(math.isfinite(value) for value in losses)
    assert sum(losses[-6:]) < sum(losses[:6]) - 1
    assert exact_log_likelihood(log_likelihoods(model, encoder, x)).mean() > before + 0.2


def test_pyro_params_and_functions_are_trained_too() -> None:
    def model(x: Tensor) -> None:
        weight = pyro.param("weight", lambda: torch.randn(LATENT, DIM, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT).double(), 1.0).to_event(1))
            pyro.sample("x", gaussian(z @ weight), obs=x)

    def encoder(x: Tensor) -> None:
        weight = pyro.param("inverse", lambda: torch.randn(DIM, LATENT, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(x @ weight, event_dim=1))

    svi = SVI(model, encoder, Adam({"lr": 2e-2}), loss=pg.MAPA_ELBO(posterior_of(X), num_top=3))
    losses = [svi.step(ALL) for _ in range(60)]
    assert losses[-1] < losses[0] - 0.1
    assert set(pyro.get_param_store().keys()) == {"weight", "inverse"}
