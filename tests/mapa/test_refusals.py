"""Bad input gets one clear line, or the documented limit, and never NaN."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta
from pyro.optim import Adam
from torch import Tensor

import pyrogaps as pg
from pyrogaps.mapa import empiricalized_posterior
from tests.mapa.examples import DIM, LATENT, Encoder, Model, bernoulli, data, gaussian

X = data()
N = len(X)
ALL = torch.arange(N)


def refused(run: Callable[[], Any], *words: str) -> None:
    """`run` raises an `InputError` of one line that holds all of `words`."""
    with pytest.raises(pg.InputError) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def with_bad(value: float) -> Tensor:
    x = X.clone()
    x[3, 1] = value
    return x


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda: pg.mapa_posterior(with_bad(math.nan), "gaussian", bandwidth=1.0), ("data", "NaN", "impute")),
        (lambda: pg.mapa_posterior(with_bad(math.inf), "gaussian", bandwidth=1.0), ("data", "infinite")),
        (lambda: pg.mapa_posterior(torch.ones(0, 3), "gaussian", bandwidth=1.0), ("data", "no datapoints")),
        (lambda: pg.mapa_posterior(X, "bernoulli", bandwidth=0.9), ("support", "Bernoulli", "Binarise")),
        (lambda: pg.mapa_posterior(X, "continuous_bernoulli", bandwidth=1.0), ("support", "from 0 to 1")),
        (lambda: pg.mapa_posterior(X, "gaussian", bandwidth=0.0), ("bandwidth", "above 0", "0.0")),
        (lambda: pg.mapa_posterior(X, "gaussian", bandwidth=-1.0), ("bandwidth", "above 0", "-1")),
        (lambda: pg.GaussianKernel(math.nan), ("GaussianKernel.variance", "above 0")),
        (lambda: pg.GaussianKernel(math.inf), ("GaussianKernel.variance", "above 0")),
        (lambda: pg.BernoulliKernel(0.5), ("BernoulliKernel.alpha", "above 0.5 and below 1")),
        (lambda: pg.BernoulliKernel(1.0), ("BernoulliKernel", "alpha")),
        (lambda: pg.ContinuousBernoulliKernel(0.0), ("ContinuousBernoulliKernel.temperature", "above 0")),
        (lambda: pg.ContinuousBernoulliKernel(1.0, alpha=0.4), ("ContinuousBernoulliKernel", "alpha")),
        (lambda: pg.mapa_posterior(X, "gaussian"), ("bandwidth", "noise variance")),
        (lambda: pg.mapa_posterior(X, "poisson", bandwidth=1.0), ("likelihood", "gaussian, bernoulli", "'poisson'")),
        (lambda: pg.mapa_posterior(X, 0.3), ("likelihood: must be a string or callable", "0.3")),
        (lambda: pg.mapa_posterior(X, pg.GaussianKernel(1.0), bandwidth=2.0), ("bandwidth", "by name")),
        (lambda: pg.mapa_posterior(X, "gaussian", bandwidth=1.0, num_neighbours=0), ("num_neighbours", "at least 1")),
        (lambda: pg.mapa_posterior(X, "gaussian", bandwidth=1.0, num_neighbours=8), ("num_neighbours", "got 8")),
        (lambda: pg.mapa_posterior(X, lambda x, y: x @ y.T * math.nan), ("kernel", "NaN")),
        (lambda: pg.mapa_posterior(X, lambda x, y: x.sum(1)), ("kernel", "(7, 7)", "(7,)")),
        (lambda: pg.mapa_posterior(X, lambda x, y: None), ("kernel", "(7, 7)", "NoneType")),
        (lambda: pg.mapa_posterior(X, lambda x, y: x @ y.T - math.inf), ("kernel", "-infinity")),
        (lambda: pg.mapa_posterior(X, lambda x, y: x @ y.T).with_bandwidth(1.0), ("bandwidth", "custom kernel")),
        (lambda: pg.mapa_posterior(pg.IndexedData(7, lambda i: ("x",)), "gaussian", bandwidth=1.0), ("data", "tensor")),
    ],
)
def test_posterior(run: Callable[[], Any], words: tuple[str, ...]) -> None:
    refused(run, *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_top": 8}, ("num_top=8", "only 7 datapoints")),
        ({"num_top": 0}, ("num_top and num_samples", "both 0")),
        ({"num_top": -1, "num_samples": 3}, ("MAPA_ELBO.num_top", "at least 0")),
        ({"num_top": 7, "num_samples": 1}, ("none remain to draw", "num_samples=0")),
        ({"num_top": 3, "num_samples": 5, "replacement": False}, ("without replacement", "Lower it to 4")),
    ],
)
def test_sizes(options: dict[str, Any], words: tuple[str, ...]) -> None:
    posterior = pg.mapa_posterior(X, "gaussian", bandwidth=1.0)
    refused(lambda: pg.MAPA_ELBO(posterior, **options), "MAPA_ELBO", *words)


def test_sizes_of_a_sparse_posterior() -> None:
    posterior = pg.mapa_posterior(X, "gaussian", bandwidth=1.0, num_neighbours=4)
    refused(lambda: pg.MAPA_ELBO(posterior, num_top=5), "num_top=5", "4 neighbours")
    refused(lambda: pg.MAPA_ELBO(posterior, num_top=1, num_samples=4, replacement=False), "Lower it to 3,")


@pytest.mark.parametrize(
    ("indices", "word"),
    [
        (torch.arange(0), "at least one"),
        (torch.tensor([0, 7]), "N - 1 = 6"),
        (torch.tensor([-1]), "N - 1 = 6"),
        (torch.tensor([0.0]), "whole number"),
        (torch.tensor([True]), "whole number"),
        (torch.tensor(3), "shape (B,)"),
    ],
)
def test_indices(indices: Tensor, word: str) -> None:
    posterior = pg.mapa_posterior(X, "gaussian", bandwidth=1.0)
    svi = SVI(Model(), Encoder(), Adam({"lr": 1e-3}), loss=pg.MAPA_ELBO(posterior))
    refused(lambda: svi.step(indices), "indices", word)
    refused(lambda: svi.step(indices, X), "MAPA_ELBO", "fetches the data")


def encoder_of(site: Callable[[Tensor], Any], name: str = "z") -> Callable[[Tensor], None]:
    def encoder(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample(name, site(x))

    return encoder


def fixed(x: Tensor) -> Any:
    return dist.Delta(x[:, :LATENT], event_dim=1)


def positive(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(torch.ones(LATENT).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(-1, DIM), 1.0).to_event(1), obs=x)


def no_plate(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x), LATENT).double(), 1.0).to_event(2))
    pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(-1, DIM), 1.0).to_event(2), obs=x)


def autoregressive(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(LATENT).double(), 1.0).to_event(1))
        before = torch.nn.functional.pad(x, (1, 0))[:, :-1]
        pyro.sample("x", dist.Normal(before + z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)


def masked(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(LATENT).double(), 1.0).to_event(1))
        likelihood = dist.Normal(z.sum(-1, keepdim=True).expand(-1, DIM), 1.0).mask(x > 0)
        pyro.sample("x", likelihood.to_event(1), obs=x)


@pytest.mark.parametrize(
    ("model", "encoder", "words"),
    [
        (None, encoder_of(lambda x: dist.Normal(x[:, :2], 1.0).to_event(1)), ("'z'", "Normal", "dist.Delta")),
        (None, encoder_of(fixed, "h"), ("'h'", "only the encoder has it")),
        (None, lambda x: None, ("'z'", "the encoder lacks it")),
        (positive, encoder_of(fixed), ("'z'", "support")),
        (None, encoder_of(lambda x: dist.Delta(x[:, :2] * math.nan, event_dim=1)), ("'z'", "NaN")),
        (no_plate, encoder_of(fixed), ("model", "no data plate")),
        (autoregressive, encoder_of(fixed), ("'x'", "as well as on z")),
        (masked, encoder_of(fixed), ("'x'", "masked")),
    ],
)
def test_programs(model: Any, encoder: Any, words: tuple[str, ...]) -> None:
    posterior = pg.mapa_posterior(X, "gaussian", bandwidth=1.0)
    model = model or Model()
    refused(lambda: pg.MAPA_ELBO(posterior).bounds(model, encoder, ALL), *words)
    refused(lambda: empiricalized_posterior(model, encoder, X), *words)


def test_autoguides_and_latents() -> None:
    model = Model()
    posterior = pg.mapa_posterior(X, "gaussian", bandwidth=1.0)
    refused(lambda: pg.MAPA_ELBO(posterior).bounds(model, AutoDelta(model), ALL), "AutoDelta", "function of x")
    refused(lambda: empiricalized_posterior(model, torch.zeros(5, LATENT), X), "latents 'z'", "7 datapoints, got 5")
    refused(lambda: empiricalized_posterior(model, {"h": torch.zeros(N, LATENT)}, X), "'h'")


def test_data_outside_the_models_support() -> None:
    posterior = pg.mapa_posterior(X, "gaussian", bandwidth=1.0)
    refused(lambda: pg.MAPA_ELBO(posterior).bounds(Model(bernoulli), Encoder(), ALL), "site 'x'", "support")


@pytest.mark.parametrize(
    "x",
    [torch.ones(6, DIM).double(), torch.ones(1, DIM).double(), X[[0, 0, 1, 1, 0, 0]], torch.eye(6, DIM).double() * 1e8],
    ids=["constant", "one", "duplicates", "far apart"],
)
@pytest.mark.parametrize("replacement", [True, False])
def test_limits_train_without_nan(x: Tensor, replacement: bool) -> None:
    number = len(x)
    model, encoder = Model(), Encoder()
    for bandwidth in (1e-12, 1e12):
        posterior = pg.mapa_posterior(x, "gaussian", bandwidth=bandwidth)
        num_samples = 0 if number == 1 else 2
        loss = pg.MAPA_ELBO(posterior, num_top=1, num_samples=num_samples, replacement=replacement)
        svi = SVI(model, encoder, Adam({"lr": 1e-4}), loss=loss)
        assert all(math.isfinite(svi.step(torch.arange(number))) for _ in range(3))
        for value in (*model.parameters(), *encoder.parameters()):
            assert bool(torch.isfinite(value).all())


def test_loss_that_is_not_finite_stops_before_the_gradient() -> None:
    model, encoder = Model(lambda output: gaussian(output)), Encoder()
    svi = SVI(model, encoder, Adam({"lr": 1e-3}), loss=pg.MAPA_ELBO(pg.mapa_posterior(X, pg.GaussianKernel(1.0))))
    svi.step(ALL)
    before = [value.clone() for value in encoder.parameters()]
    with torch.no_grad():
        model.decoder[2].weight.fill_(math.nan)
    with pyro.validation_enabled(False), pytest.raises(FloatingPointError, match="bound is nan"):
        svi.step(ALL)
    assert all(torch.equal(left, right) for left, right in zip(before, encoder.parameters(), strict=True))
