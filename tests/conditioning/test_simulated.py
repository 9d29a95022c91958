"""Data without end, drawn from a frozen model."""

import pyro
import pytest
import torch

import pyrogaps as pg
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.linear_gaussian import LinearGaussian


def test_every_fetch_is_a_new_draw() -> None:
    model = LinearGaussian.random(data_dim=4, latent_dim=2)
    data = pg.SimulatedData(model, torch.randn(10, 4), num_datapoints=5000)
    assert len(data) == 5000
    indices = torch.arange(5000)
    (first,), (second,) = data.fetch(indices), data.fetch(indices)
    assert first.shape == (5000, 4)
    assert not torch.equal(first, second)
    covariance = model.weight @ model.weight.T + torch.eye(4)
    centred = first - model.bias
    products = centred[:, :, None] * centred[:, None]
    assert ((products.mean(0) - covariance).abs() < 4 * products.std(0) / 5000**0.5).all()


def test_training_on_it_leaves_the_model_alone_and_nears_the_best_guide() -> None:
    """One latent, so that a Normal guide can be exact: its ELBO then is log p(x)."""
    model = LinearGaussian(torch.tensor([[1.0], [2.0]]))
    guide = AmortizedNormal(2, 1, (), activation="ELU")
    before = {name: value.clone() for name, value in model.named_parameters()}
    data = pg.SimulatedData(model, torch.zeros(2, 2), num_datapoints=2000)
    pg.train(model, guide, data, num_epochs=30, learning_rate=0.02, schedule=lambda e: 0.85**e, freeze_model=True,
             progress=False)  # fmt: skip
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
    (x,) = data.fetch(torch.arange(500))
    gap = model.log_evidence(x) - pg.elbo(model, guide, x, num_particles=200).value
    assert gap.mean() < 0.02


def test_lengths_stay_those_of_the_data() -> None:
    def model(x: torch.Tensor, lengths: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
            keep = torch.arange(x.shape[1]) < lengths[:, None]
            pyro.sample("x", pyro.distributions.Normal(z[:, None], 1.0).mask(keep).to_event(1), obs=x)

    lengths = torch.tensor([1, 3, 2])
    x, drawn = pg.SimulatedData(model, (torch.zeros(3, 3), lengths)).fetch(torch.tensor([2, 0, 4, 2]))
    assert drawn.tolist() == [2, 1, 3, 2]
    assert x.shape == (4, 3)


def test_models_without_a_plate_are_refused() -> None:
    def model(x: torch.Tensor) -> None:
        z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
        pyro.sample("x", pyro.distributions.Normal(z, 1.0).expand(x.shape).to_event(1), obs=x)

    with pytest.raises(pg.InputError, match="no data plate"):
        pg.SimulatedData(model, torch.randn(5))


def test_it_is_for_training_and_not_to_be_evaluated() -> None:
    model = LinearGaussian.random(data_dim=4, latent_dim=2)
    data = pg.SimulatedData(model, torch.zeros(10, 4))
    with pytest.raises(pg.InputError, match=r"changed between two calls.*data\.fetch\(torch\.arange\(len\(data\)\)\)"):
        pg.elbo(model, AmortizedNormal(4, 2, ()), data)
