"""Posteriors on a grid, against exact ones: Gaussian, with several modes, on a constrained support; and refusals."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import nn

import pyrogaps as pg
from pyrogaps.grid import count_modes
from pyrogaps.guides.auxiliary_flows import AmortizedAuxiliaryFlow, AutoLocalAuxiliaryFlow
from pyrogaps.models.linear_gaussian import LinearGaussian
from tests.references import (
    CONCENTRATION,
    RATE,
    SPREAD,
    WrongEncoder,
    anisotropic,
    counts,
    draws_of,
    gamma_poisson_evidence,
    parabola_evidence,
)

ROUNDING = 1e-6
SHORT = pg.Refinement(num_steps=200)


def grid_of(model, guides, x, **options):
    return pg.posterior_grid(model, guides, x, progress=False, **options)


def points_of(panel):
    return np.stack(np.meshgrid(panel["grid_1"], panel["grid_2"], indexing="ij"), -1)


class PointGuide(nn.Module):
    """q(z|x) = N(loc, scale^2) for every x."""

    def __init__(self, loc, scale):
        super().__init__()
        self.loc, self.scale = torch.tensor(loc), scale

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc.to(x.dtype).expand(len(x), -1), self.scale).to_event(1))


def parabolas(x):
    """Two latents, each seen through its square: a mode for every choice of their signs."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z**2, SPREAD).to_event(1), obs=x)


def two_rates(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(CONCENTRATION * torch.ones_like(x), RATE).to_event(1))
        pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)


# Exact posteriors


def test_gaussian_posterior_evidence_and_gaps():
    model = anisotropic(5, 2)
    x, _ = draws_of(model, 3)
    guide = WrongEncoder(model)
    grid = grid_of(model, {"wrong": guide, "refined": pg.refine(model, guide, x, settings=SHORT)}, x)
    assert dict(grid.sizes) == {"datapoint": 3, "posterior": 3, "z_1": 200, "z_2": 200, "x_dim_0": 5}
    assert grid_of(model, guide, x).equals(grid_of(model, {"guide": guide}, x))
    assert list(grid["posterior"].values) == ["true posterior", "wrong", "refined"]
    np.testing.assert_allclose(grid["log_evidence"], model.log_evidence(x).detach(), atol=ROUNDING)
    assert float(grid["log_evidence_error"].max()) < 1e-4
    mean, covariance = model.posterior(x)
    for n in range(3):
        panel = grid.isel(datapoint=n)
        exact = multivariate_normal(mean[n].detach(), covariance.detach()).pdf(points_of(panel))
        np.testing.assert_allclose(panel["density"].isel(posterior=0), exact, atol=ROUNDING * exact.max())
    np.testing.assert_allclose(grid["mass"], 1, atol=1e-3)
    np.testing.assert_array_equal(grid["num_modes"], 1)
    loc, scale = guide.parameters_of(x)
    gap = (model.log_evidence(x) - model.elbo(x, loc, scale=scale)).detach()
    np.testing.assert_allclose(grid["gap"].sel(posterior="wrong"), gap, rtol=1e-3)
    np.testing.assert_allclose(grid["gap"].sel(posterior="refined"), model.approximation_gap().item(), atol=2e-3)


def test_every_mode_is_found():
    x = torch.tensor([[2.0, 2.0], [2.0, -1.0], [-1.0, -1.0]])
    grid = grid_of(parabolas, {}, x, num_points=100)
    evidence = parabola_evidence(x[:, 0]) + parabola_evidence(x[:, 1])
    np.testing.assert_allclose(grid["log_evidence"], evidence, atol=1e-5)
    np.testing.assert_array_equal(grid["num_modes"].isel(posterior=0), [4, 2, 1])


def test_density_is_that_of_unconstrained_space():
    x = counts(3)
    grid = grid_of(two_rates, {}, x)
    evidence = gamma_poisson_evidence(x[:, :1]) + gamma_poisson_evidence(x[:, 1:])
    np.testing.assert_allclose(grid["log_evidence"], evidence, atol=1e-5)
    panel = grid.isel(datapoint=2, posterior=0)
    rate = torch.as_tensor(points_of(panel)).exp()
    log_density = (dist.Gamma(CONCENTRATION + x[2], RATE + 1).log_prob(rate) + rate.log()).sum(-1)
    np.testing.assert_allclose(panel["density"], log_density.exp(), atol=1e-5)


def test_narrow_posterior_in_a_wide_prior():
    model = LinearGaussian([[1.0, 0.0], [0.3, 1.0]], 0.0, noise_scale=1e-3, prior_scale=100.0).double()
    x = torch.tensor([[150.0, -80.0], [0.0, 310.0]], dtype=torch.float64)
    np.testing.assert_allclose(grid_of(model, {}, x)["log_evidence"], model.log_evidence(x).detach(), atol=1e-5)


def test_model_without_a_plate_is_one_datapoint():
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True) + 0 * x, 1.0).to_event(1), obs=x)

    x = torch.tensor([0.3, 1.2, -0.5])
    grid = grid_of(model, {}, x, plate=False)
    exact = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 2.0).log_prob(x)
    np.testing.assert_allclose(grid["log_evidence"], [exact], atol=1e-4)
    assert "x" not in grid


# Guides


def test_window_holds_a_guide_that_misses_the_posterior():
    model = LinearGaussian(torch.eye(2, dtype=torch.float64))
    grid = grid_of(model, {"far": PointGuide([12.0, 0.0], 0.3)}, torch.zeros(1, 2, dtype=torch.float64))
    np.testing.assert_allclose(grid["mass"], 1, atol=1e-3)
    expected = 12**2 - 1 + 2 * 0.3**2 - 2 * math.log(0.3) - math.log(2)  # of N(0, I/2), in closed form
    np.testing.assert_allclose(grid["gap"].isel(posterior=1), expected, rtol=1e-3)


def test_gap_is_left_out_where_the_grid_cannot_resolve_the_guide():
    model = LinearGaussian(torch.eye(2, dtype=torch.float64))
    grid = grid_of(model, {"spike": PointGuide([0.01, 0.02], 1e-4)}, torch.zeros(1, 2, dtype=torch.float64))
    assert np.isnan(grid["gap"].isel(posterior=1)).all()
    np.testing.assert_array_equal(grid["gap"].isel(posterior=0), 0)


def test_guides_that_only_draw_are_shown_by_their_draws():
    model = LinearGaussian.random(6, 2)
    x, _ = draws_of(model, 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        guide = AmortizedAuxiliaryFlow(6, 2, hidden=(8,), flow_hidden=8)
    settings = pg.Refinement(num_steps=3)
    refined = pg.refine(model, AutoLocalAuxiliaryFlow, x, settings=settings)
    grid = grid_of(model, {"amortized": guide, "refined": refined}, x, num_points=80)
    assert np.isnan(grid["gap"].values[:, 1:]).all()
    np.testing.assert_allclose(grid["mass"], 1, atol=0.02)
    # Untrained, the flow moves nothing: its z is the Normal that it starts from.
    loc, raw = guide.encode(x).detach()[:, :4].chunk(2, -1)
    density = grid["density"].sel(posterior="amortized")
    weight = density / density.sum(("z_1", "z_2"))
    mean = (weight * grid["grid_1"]).sum(("z_1", "z_2"))
    np.testing.assert_allclose(mean, loc[:, 0], atol=0.05 * float(guide.positive(raw).max()))


def test_some_datapoints_of_many():
    model = anisotropic(5, 2)
    x, _ = draws_of(model, 70)
    guide = WrongEncoder(model)
    refined = pg.refine(model, guide, x, settings=pg.Refinement(num_steps=5))
    density = pg.GuideDensity(guide, x, model)
    some = grid_of(model, {"refined": refined, "density": density}, x, datapoints=[68, 3], num_points=30)
    assert list(some["datapoint"].values) == [68, 3]
    np.testing.assert_array_equal(some["x"], x[[68, 3]])
    alone = grid_of(model, {"density": guide}, x[[3]], num_points=30)
    np.testing.assert_allclose(some["log_evidence"][1], alone["log_evidence"][0])
    np.testing.assert_allclose(some["gap"][1, 2], alone["gap"][0, 1], rtol=1e-3)


def test_global_state_and_seed():
    model = anisotropic(5, 2)
    x, _ = draws_of(model, 1)
    before = torch.get_rng_state()
    first, second = (grid_of(model, {"wrong": WrongEncoder(model)}, x, num_points=20, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(first["density"], second["density"])


# Modes


def test_modes_are_peaks_apart():
    axis = np.linspace(-4, 4, 81)
    first, second = np.meshgrid(axis, axis, indexing="ij")

    def bump(a, b, height=1.0):
        return height * np.exp(-0.5 * ((first - a) ** 2 + (second - b) ** 2) / 0.3)

    assert count_modes(bump(0, 0)) == 1
    assert count_modes(bump(-2, 0) + bump(2, 0)) == 2
    assert count_modes(bump(-2, 0) + bump(2, 0, 0.3) + bump(0, 3, 0.1)) == 3
    assert count_modes(bump(-2, 0) + bump(2, 0, 0.02)) == 1
    assert count_modes(bump(-0.6, 0) + bump(0.6, 0)) == 1
    ripples = 1 + 0.1 * np.cos(8 * first)
    assert count_modes(ripples * bump(0, 0)) == 1
    assert count_modes(np.zeros((5, 5))) == 0


# Refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"guides": {"true posterior": WrongEncoder(anisotropic(5, 2))}}, "Choose another"),
        ({"guides": [1]}, "guides: must be a mapping, callable or a Posterior, got"),
        ({"datapoints": [0, 9]}, r"expected indices from 0 to 3, got \[9\]"),
        ({"datapoints": []}, "got none"),
        ({"num_points": 3}, "at least 10"),
    ],
)
def test_bad_arguments(options, said):
    model = anisotropic(5, 2)
    x, _ = draws_of(model, 4)
    with pytest.raises(pg.InputError, match=said):
        grid_of(model, **{"guides": {}, "x": x, **options})


def test_other_dimensions_are_refused():
    model = anisotropic(5, 3)
    x, _ = draws_of(model, 4)
    with pytest.raises(pg.InputError, match=r"two latent dimensions, but this model has 3 \(sites: 'z' 3\)"):
        grid_of(model, {}, x)


def test_posterior_of_other_data_is_refused():
    model = anisotropic(5, 2)
    x, _ = draws_of(model, 4)
    density = pg.GuideDensity(WrongEncoder(model), x[:3], model)
    with pytest.raises(pg.InputError, match="'q' is a posterior of 3 datapoints, but the data have 4"):
        grid_of(model, {"q": density}, x)


def test_density_without_an_end_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.factor("x", 0.5 * (z**2).sum(-1) + 0 * x)

    with pytest.raises(pg.InputError, match=r"datapoint 0: .*does not decay"):
        grid_of(model, {}, torch.zeros(2))


def test_density_that_is_nan_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.factor("x", (z.sum(-1) + 2.5).sqrt() + x)

    with pytest.raises(pg.InputError, match=r"datapoint 0: log p.x, z. is NaN"):
        grid_of(model, {}, torch.zeros(2))
