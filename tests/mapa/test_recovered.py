"""`RecoveredPrior`: an ordinary model before and after, against exact log p(x), through weights and refusals."""

from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.guides.delta import AmortizedDelta
from pyrogaps.mapa import Mapa, RecoveredPrior, train_by_mapa
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.models.synthetic import SyntheticData, SyntheticModel
from pyrogaps.training import Training, load_weights, save_weights
from tests.mapa.examples import DIM, LATENT, data


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()


def linear() -> LinearGaussian:
    return LinearGaussian(data(LATENT, seed=4).T, 0.3, 0.8)


class Given(nn.Module):
    """An encoder that knows every latent: `x` begins with it."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro.distributions.Delta(x[:, :LATENT], event_dim=1))


def evidence(model: Any, x: Tensor) -> Any:
    settings = pg.AIS(num_chains=8, num_temperatures=60, num_leapfrog=5, initial="prior")
    return pg.ais(model, None, x, settings=settings)


def joint_of(model: Any, x: Tensor, z: Tensor) -> Tensor:
    return pg.JointDensity(model, x)(z)


def test_before_recovery_it_is_the_model_with_a_standard_normal_prior() -> None:
    x, z = data(9), torch.randn(4, 9, LATENT).double()
    whole = RecoveredPrior(linear(), LATENT).double()
    torch.testing.assert_close(joint_of(whole, x, z), joint_of(linear(), x, z))


def test_recovered_model_has_the_mixtures_density_and_gradient() -> None:
    latents = torch.cat([torch.randn(400, LATENT) * 0.3 + 4, torch.randn(600, LATENT).cumsum(1) - 2]).double()
    x = torch.cat([latents, torch.randn(1000, DIM - LATENT).double()], 1)
    whole = RecoveredPrior(linear(), LATENT, max_components=8).double()
    whole.recover(Given(), x)
    assert int((whole.log_weights > -torch.inf).sum()) in (2, 4, 8)
    z = latents[None, :50].clone().requires_grad_()
    prior, _ = pg.JointDensity(whole, x[:50]).terms(z)
    mixture = whole.prior()
    torch.testing.assert_close(prior[0], mixture.log_prob(latents[:50]))
    (gradient,) = torch.autograd.grad(prior.sum(), z)
    assert bool(torch.isfinite(gradient).all())
    truth = torch.distributions.Normal(torch.tensor(4.0).double(), 0.3).log_prob(latents[:50]).sum(-1)
    assert float((mixture.log_prob(latents[:50]) - truth - torch.log(torch.tensor(0.4))).mean().abs()) < 0.15


def test_its_evidence_is_that_of_the_exact_model() -> None:
    """Latents N(1, 2^2) make the recovered model another linear-Gaussian one, of known log p(x)."""
    torch.manual_seed(2)
    latents = 1 + 2 * torch.randn(20_000, LATENT).double()
    x = torch.cat([latents, torch.zeros(len(latents), DIM - LATENT).double()], 1)
    plain = linear()
    whole = RecoveredPrior(plain, LATENT, max_components=1).double()
    whole.recover(Given(), x)
    bias = plain.bias.detach() + plain.weight.detach().sum(1)
    exact = LinearGaussian(plain.weight.detach(), bias, 0.8, 2.0).log_evidence(x[:40]).detach()
    found = evidence(whole, x[:40])
    # The prior was fitted to 20,000 draws.
    errors = (found.value - exact) / (found.mcse**2 + 0.02**2).sqrt()
    assert float(errors.abs().max()) < 4.5


def test_weights_carry_the_prior(tmp_path: Path) -> None:
    def pair() -> tuple[RecoveredPrior, AmortizedNormal]:
        return RecoveredPrior(SyntheticModel("circle")), AmortizedNormal(2, 1, (5,))

    held = SyntheticData("circle", 200, 0, 10)
    model, guide = pair()
    model.recover(AmortizedDelta(2, 1, (5,)), held.train)
    save_weights(tmp_path / "weights.pt", model, guide)
    other, other_guide = pair()
    load_weights(tmp_path / "weights.pt", other, other_guide)
    torch.testing.assert_close(other.prior().log_prob(torch.ones(1)), model.prior().log_prob(torch.ones(1)))
    assert not torch.allclose(model.prior().log_prob(torch.ones(1)), pair()[0].prior().log_prob(torch.ones(1)))


@pytest.mark.parametrize("with_encoder", [True, False])
def test_training_by_settings_leaves_a_better_generative_model(with_encoder: bool) -> None:
    held = SyntheticData("circle", 300, 0, 40)
    plain = SyntheticModel("circle")
    model: Any = RecoveredPrior(plain) if with_encoder else plain
    encoder = AmortizedDelta(2, 1, (20,), "Tanh") if with_encoder else None
    guide = AmortizedNormal(2, 1, (20,), "Tanh")
    before = evidence(model, held.test)
    training = Training(num_epochs=60, learning_rate=0.02)
    settings = Mapa(bandwidth=0.02, num_samples=9, replacement=with_encoder, training=training)
    train_by_mapa(model, encoder, guide, held.train, settings, progress=False)
    after = evidence(model, held.test)
    assert float(after.value.mean()) > float(before.value.mean()) + 5


def test_a_resumed_run_ends_with_the_same_prior(tmp_path: Path) -> None:
    held = SyntheticData("circle", 120, 0, 5)

    def run(num_epochs: int, path: Path | None) -> Tensor:
        torch.manual_seed(7)
        model, encoder = RecoveredPrior(SyntheticModel("circle")), AmortizedDelta(2, 1, (8,))
        settings = Mapa(bandwidth=0.02, num_samples=3, training=Training(num_epochs=num_epochs, learning_rate=0.01))
        train_by_mapa(model, encoder, encoder, held.train, settings, checkpoint=path, progress=False)
        return model.means

    run(2, tmp_path / "run.pt")
    unbroken = run(4, None)
    for _ in range(2):  # the second time there is nothing left to train
        torch.testing.assert_close(run(4, tmp_path / "run.pt"), unbroken, rtol=0, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(pg.InputError, match=r"RecoveredPrior\.latent_dim: must be a whole number of at least 1, got 0"):
        RecoveredPrior(linear(), 0)
    with pytest.raises(
        pg.InputError, match=r"site 'z' has event shape \(2,\), but the prior has \(1,\)\. Set latent_dim"
    ):
        RecoveredPrior(linear())(data(3))
    with pytest.raises(pg.InputError, match="mapa: plate is false"):
        train_by_mapa(linear(), None, linear(), data(5), Mapa(bandwidth=1.0), plate=False)
    for training, message in (
        (Training(objective=pg.IWAE_ELBO(3)), "Leave objective out"),
        (Training(patience=3), "patience needs validation data"),
        (Training(freeze_model=True), "Leave freeze_model false"),
    ):
        with pytest.raises(pg.InputError, match=message):
            Mapa(training=training)
