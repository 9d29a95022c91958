"""Shared posteriors against closed forms: static Gaussians and the missing bit; and the ledger that holds them.

The refined q sees half of the completions, K / 2 of them, so that its bound is low by about half of `overfitting`; for
Gaussians exactly so. Thresholds are in units of the bound's own Monte Carlo error.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyrogaps as pg
from pyrogaps.guides.amortized import AmortizedMultivariateNormal
from pyrogaps.guides.partial import PartialNormal
from pyrogaps.models.toy import MissingBit, MissingGaussian

SETTINGS = pg.Conditioning(num_completions=64, max_completions=64)
REFINEMENT = pg.Refinement(num_steps=300)


class FullCovariance(AmortizedMultivariateNormal):
    """A full-covariance guide of the first `shown` elements."""

    def __init__(self, data_dim: int, latent_dim: int, shown: int) -> None:
        super().__init__(data_dim, latent_dim, (8,))
        self.conditions = torch.arange(data_dim) < shown

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(torch.where(self.conditions, x, torch.zeros_like(x)))


def drawn(model: MissingGaussian, number: int) -> Tensor:
    noise = torch.Generator().manual_seed(3)
    z = torch.randn(number, model.latent_dim, generator=noise, dtype=model.weight.dtype) * model.prior_scale
    e = torch.randn(number, model.data_dim, generator=noise, dtype=model.weight.dtype)
    return (z @ model.weight.T + model.bias + e * model.noise_scale).detach()


@pytest.mark.parametrize(
    ("latent", "shown", "hidden", "seed"), [(1, 1, 1, None), (2, 2, 3, 1), (3, 3, 2, 2), (4, 2, 2, 3)]
)
def test_static_gaussians(latent: int, shown: int, hidden: int, seed: int | None) -> None:
    model = (
        MissingGaussian.unit()
        if seed is None
        else MissingGaussian.random(shown + hidden, latent, seed=seed, shown=shown)
    )
    model = model.double()
    x = drawn(model, 64)
    guide = FullCovariance(shown + hidden, latent, shown).double()
    found = pg.shared_posterior(model, guide, x, settings=SETTINGS, refinement=REFINEMENT)
    mean, covariance = model.shared_posterior(x)
    exact = model.elbo(x, mean, scale_tril=torch.linalg.cholesky(covariance))
    error = found.elbo.mcse.square().sum().sqrt() / len(x)
    bias, gap = found.overfitting.mean() / 2, float(model.conditioning_gap().detach())
    assert error < 0.05 * max(1.0, gap)
    assert abs(found.elbo.value.mean() + bias - exact.mean()) < 4 * error
    # 2 g / (K / 2) is what overfitting comes to: a chi-squared variable, whose spread tells little where it is low.
    expected = gap / 16
    assert abs(found.overfitting.mean() - expected) < 4 * max(found.overfitting.std(), expected) / len(x) ** 0.5
    # The covariance is the smoother's, not the filter's.
    for half in found.guides:
        draws, _ = half.sample(2000)
        torch.testing.assert_close(draws.std(0).mean(0), covariance.diagonal().sqrt(), rtol=0.03, atol=0)


def test_conditioning_gap_of_the_unit_toy_in_the_ledger() -> None:
    model = MissingGaussian.unit().double()
    x = drawn(model, 128)
    guide = PartialNormal(2, 1, (4,), shown=1).double()
    ledger = pg.decompose(
        model, guide, x, conditioning=SETTINGS, refinement=REFINEMENT, num_particles=400, progress=False
    )
    per = ledger.per_datapoint
    children = per["approximation_gap"] + per["conditioning_gap"] + per["amortization_gap"]
    torch.testing.assert_close(torch.tensor(children.values), torch.tensor(per["inference_gap"].values))
    row = ledger.summary().loc["conditioning_gap"]
    bias = float(per["overfitting"].mean()) / 2
    assert abs(row["mean"] - bias - 0.25) < 4 * (row["standard_error"] ** 2 + row["mcse"] ** 2) ** 0.5
    assert "├─ conditioning gap" in str(ledger)
    again = pg.GapLedger.from_datatree(ledger.to_datatree())
    assert str(again) == str(ledger)


def test_data_that_do_not_follow_the_model_show() -> None:
    model = MissingGaussian.unit().double()
    x = drawn(model, 64) + torch.tensor([0.0, 5.0])
    guide = PartialNormal(2, 1, (4,), shown=1).double()
    found = pg.shared_posterior(model, guide, x, settings=SETTINGS, refinement=REFINEMENT, num_particles=400)
    misfit = found.on_completions.value - found.elbo.value
    assert misfit.mean() > 4 * misfit.std() / 8


class Fixed(torch.nn.Module):
    """One Normal for all x: nothing of x is shown."""

    def __init__(self, model: MissingBit) -> None:
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.log_scale = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.conditions = model.conditions

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, scale = self.loc.expand(len(x), 1), self.log_scale.exp().expand(len(x), 1)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def test_missing_bit() -> None:
    """A gap of 3.311571776 nats; q_C = N(1.2, 0.4) is the posteriors' renormalised product."""
    model = MissingBit().double()
    x = torch.arange(64, dtype=torch.float64) % 2
    found = pg.shared_posterior(model, Fixed(model), x, settings=SETTINGS, refinement=REFINEMENT)
    gap = model.log_evidence(x) - found.elbo.value
    error = found.elbo.mcse.square().sum().sqrt() / len(x)
    assert error < 0.1
    assert abs(gap.mean() - found.overfitting.mean() / 2 - 3.311571776) < 4 * error
    mean, variance = model.shared_posterior()
    # ln q_C on a grid, from the completions: each has its own share of ones.
    grid = torch.linspace(-6, 8, 1401, dtype=torch.float64)[:, None]
    moments = []
    for n in range(0, 64, 8):
        density = torch.softmax(found.log_density(grid, n), 0)
        m = (density * grid[:, 0]).sum()
        moments.append(torch.stack([m, (density * (grid[:, 0] - m) ** 2).sum()]))
    m, v = torch.stack(moments).unbind(1)
    assert abs(m.mean() - mean) < 4 * m.std() / 8**0.5
    assert abs(v.mean() - variance) < 4 * v.std() / 8**0.5


@pytest.mark.usefixtures("brief_check")
def test_completions_of_a_datapoint() -> None:
    model = MissingGaussian.unit().double()
    x = drawn(model, 70)
    found = pg.shared_posterior(
        model, PartialNormal(2, 1, (4,), shown=1).double(), x, settings=pg.Conditioning(8, 8),
        refinement=pg.Refinement(num_steps=5, num_selection=16), num_particles=50,
    )  # fmt: skip
    for n in (0, 63, 64, 69):
        (completed,), z = found.completions(n)
        assert completed.shape == (8, 2)
        assert z.shape == (8, 1)
        assert torch.equal(completed[:, 0], x[n, 0].expand(8))
    with pytest.raises(pg.InputError, match="must be from 0 to 69, got 70"):
        found.completions(70)


@pytest.mark.usefixtures("brief_check")
def test_batch_size_does_not_change_the_ledger() -> None:
    model = MissingGaussian.unit().double()
    x = drawn(model, 130)
    guide = PartialNormal(2, 1, (4,), shown=1).double()
    ledgers = [
        pg.decompose(
            model, guide, x, batch_size=size, conditioning=pg.Conditioning(4, 8, 0.01), num_particles=50,
            refinement=pg.Refinement(num_steps=5, num_selection=16), evidence=pg.AIS(num_temperatures=5),
            progress=False,
        ).per_datapoint
        for size in (64, 192)
    ]  # fmt: skip
    assert set(ledgers[0]["num_completions"].values.tolist()) == {8}
    for name in ("elbo_shared", "conditioning_gap", "overfitting"):
        torch.testing.assert_close(torch.tensor(ledgers[0][name].values), torch.tensor(ledgers[1][name].values))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_completions": 5}, "conditioning.num_completions: must be even"),
        ({"num_completions": 64, "max_completions": 32}, "at least num_completions"),
        ({"tolerance": 0.0}, "conditioning.tolerance: must be a number above 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, float], message: str) -> None:
    with pytest.raises(pg.InputError, match=message):
        pg.Conditioning(**settings)  # type: ignore[arg-type]
