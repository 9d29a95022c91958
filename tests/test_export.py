"""Exported posteriors against closed forms: draws, pointwise log-likelihoods, and leaving one out."""

import math
from pathlib import Path

import arviz_stats
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.linear_gaussian import LinearGaussian
from tests.references import STANDARD_ERRORS, anisotropic, draws_of

NUM_DRAWS = 2000
PRIOR_SCALE = 3.0


def normal_mean(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, PRIOR_SCALE))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def posterior_of_mean(x: Tensor) -> tuple[Tensor, float]:
    """Mean and variance of p(mean | x)."""
    variance = 1 / (PRIOR_SCALE**-2 + len(x))
    return variance * x.sum(), variance


def guide_of_mean(x: Tensor, *, width: float = 1.0, shift: float = 0.0):  # type: ignore[no-untyped-def]
    """The exact posterior, its scale multiplied by `width` and its mean moved by `shift` of its scales."""
    mean, variance = posterior_of_mean(x)

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Normal(mean + shift * variance**0.5, width * variance**0.5))

    return guide


def some_data(number: int = 15, seed: int = 0) -> Tensor:
    return 1.0 + torch.randn(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def elpd_of_mean(x: Tensor) -> float:
    """The sum of log p(x_n | x_-n), closed form."""
    total = 0.0
    for n in range(len(x)):
        mean, variance = posterior_of_mean(torch.cat([x[:n], x[n + 1 :]]))
        total += float(dist.Normal(mean, (1 + variance) ** 0.5).log_prob(x[n]))
    return total


def mcse_of_elpd(tree: xr.DataTree, name: str, *, corrected: bool = True) -> float:
    """Standard error of the sum of log ratio estimates, by the delta method over draws."""
    density = tree["log_likelihood"][name].values[0].reshape(tree.attrs["num_draws"], -1)
    log_ratios = -density
    if corrected:
        log_ratios = log_ratios + (tree["sample_stats"]["log_p"] - tree["sample_stats"]["log_q"]).values[0][:, None]
    weights = np.exp(log_ratios - log_ratios.max(0))
    weights /= weights.sum(0)
    density = np.exp(density)
    expected = (weights * density).sum(0)
    return float(np.sqrt(np.square((weights * (density - expected) / expected).sum(1)).sum()))


# --- Global latents --------------------------------------------------------------------------------------------------


def test_draws_and_densities_of_a_global_mean() -> None:
    x = some_data()
    tree = pg.to_datatree(normal_mean, guide_of_mean(x), x, num_draws=NUM_DRAWS)
    draws = tree["posterior"]["mean"]
    mean, variance = posterior_of_mean(x)
    assert draws.dims == ("chain", "draw") and draws.shape == (1, NUM_DRAWS)
    assert abs(float(draws.mean()) - mean) < STANDARD_ERRORS * math.sqrt(variance / NUM_DRAWS)
    assert abs(float(draws.var()) - variance) < STANDARD_ERRORS * variance * math.sqrt(2 / NUM_DRAWS)
    at = torch.as_tensor(draws.values)[..., None]
    pointwise = tree["log_likelihood"]["x"]
    assert pointwise.dims == ("chain", "draw", "datapoint")
    exact = dist.Normal(at, 1.0).log_prob(x)
    np.testing.assert_allclose(pointwise, exact, rtol=1e-12)
    log_prior = dist.Normal(0.0, PRIOR_SCALE).log_prob(at[..., 0])
    np.testing.assert_allclose(tree["sample_stats"]["log_p"], exact.sum(-1) + log_prior, rtol=1e-12)
    log_q = dist.Normal(mean, variance**0.5).log_prob(at[..., 0])
    np.testing.assert_allclose(tree["sample_stats"]["log_q"], log_q, rtol=1e-9)
    np.testing.assert_array_equal(tree["observed_data"]["x"], x)
    assert tree["observed_data"]["x"].dims == ("datapoint",)
    assert "constant_data" not in tree.children
    assert tree.attrs["latents"] == "global" and tree.attrs["data_plate"] == "data"
    assert tree["posterior"].attrs["inference_library"] == "pyro"


@pytest.mark.parametrize(("width", "shift"), [(1.0, 0.0), (1.6, 0.0), (0.8, 0.0), (1.3, 1.0)])
def test_loo_is_exact_for_any_guide_that_covers_the_posterior(width: float, shift: float) -> None:
    x = some_data()
    tree = pg.to_datatree(normal_mean, guide_of_mean(x, width=width, shift=shift), x, num_draws=NUM_DRAWS)
    result = pg.loo(tree, pointwise=True)
    exact, error = elpd_of_mean(x), mcse_of_elpd(tree, "x")
    assert error < 0.2
    assert abs(result.elpd - exact) < STANDARD_ERRORS * error, (result.elpd, exact, error)
    assert float(result.pareto_k.max()) < result.good_k
    assert result.approx_posterior and result.elpd_i.dims == ("datapoint",)
    if (width, shift) != (1.0, 0.0):  # the guide's draws taken for the posterior's
        wrong = arviz_stats.loo(tree, reff=1.0).elpd
        wrong_error = mcse_of_elpd(tree, "x", corrected=False)
        assert abs(wrong - exact) > STANDARD_ERRORS * wrong_error, (wrong, exact, wrong_error)


def test_a_guide_that_misses_the_posterior_is_told_by_khat() -> None:
    x = some_data()
    tree = pg.to_datatree(normal_mean, guide_of_mean(x, width=0.4), x)
    with pytest.warns(UserWarning, match="Pareto"):
        result = pg.loo(tree, pointwise=True)
    assert result.warning and float(result.pareto_k.max()) > 0.7


def regression(inputs: Tensor, y: Tensor) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(inputs.shape[1]), 2.0).to_event(1))
    bias = pyro.sample("bias", dist.Normal(0.0, 2.0))
    mean = (inputs * weight).sum(-1) + bias
    with pyro.plate("data", len(y)):
        fit = pyro.deterministic("fit", mean)
        pyro.sample("y", dist.Normal(fit, 0.5), obs=y)


def elpd_of_regression(inputs: Tensor, y: Tensor) -> float:
    design = torch.cat([inputs, torch.ones(len(y), 1)], 1)
    total = 0.0
    for n in range(len(y)):
        keep = torch.arange(len(y)) != n
        precision = design[keep].T @ design[keep] / 0.25 + torch.eye(design.shape[1]) / 4
        mean = torch.linalg.solve(precision, design[keep].T @ y[keep] / 0.25)
        variance = 0.25 + design[n] @ torch.linalg.solve(precision, design[n])
        total += float(dist.Normal(design[n] @ mean, variance.sqrt()).log_prob(y[n]))
    return total


def test_a_regression_trained_with_an_autoguide() -> None:
    torch.set_default_dtype(torch.float64)
    inputs = torch.randn(25, 2)
    y = inputs @ torch.tensor([1.0, -0.5]) + 0.3 + 0.5 * torch.randn(25)
    guide = AutoMultivariateNormal(regression, init_scale=0.1)
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(120):
        svi.step(inputs, y)
    tree = pg.to_datatree(regression, guide, (inputs, y), num_draws=NUM_DRAWS)
    assert {name: tree["posterior"][name].dims[2:] for name in tree["posterior"].data_vars} == {
        "weight": ("weight_dim_0",),
        "bias": (),
        "fit": ("datapoint",),
    }
    weight, bias = (torch.as_tensor(tree["posterior"][name].values) for name in ("weight", "bias"))
    fit = weight @ inputs.T + bias[..., None]
    np.testing.assert_allclose(tree["posterior"]["fit"], fit, rtol=1e-9)
    np.testing.assert_allclose(tree["log_likelihood"]["y"], dist.Normal(fit, 0.5).log_prob(y), rtol=1e-9)
    assert tree["constant_data"]["inputs"].dims == ("datapoint", "inputs_dim_0")
    np.testing.assert_array_equal(tree["constant_data"]["inputs"], inputs)
    result, exact, error = pg.loo(tree), elpd_of_regression(inputs, y), mcse_of_elpd(tree, "y")
    assert error < 0.2 and not result.warning
    assert abs(result.elpd - exact) < STANDARD_ERRORS * error, (result.elpd, exact, error)


def test_a_subsampled_plate_is_exported_whole() -> None:
    x = some_data()

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, PRIOR_SCALE))
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[rows])

    guide = AutoNormal(model)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x)
    trees = [pg.to_datatree(model, guide, x, num_draws=10, plate=plate) for plate in (None, "data", False)]
    at = torch.as_tensor(trees[0]["posterior"]["mean"].values)[..., None]
    exact = dist.Normal(at, 1.0).log_prob(x)
    for tree in trees:
        np.testing.assert_allclose(tree["log_likelihood"]["x"], exact, rtol=1e-6)
        log_prior = dist.Normal(0.0, PRIOR_SCALE).log_prob(at[..., 0])
        np.testing.assert_allclose(tree["sample_stats"]["log_p"], exact.sum(-1) + log_prior, rtol=1e-6)
        assert tree.attrs["latents"] == "global"


def test_draws_are_read_one_at_a_time_where_the_model_asks_for_it() -> None:
    class Network(PyroModule):  # type: ignore[misc]
        """A Bayesian network's layer, which multiplies by one weight matrix only."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = PyroModule[nn.Linear](2, 1)
            self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))

        def forward(self, inputs: Tensor, y: Tensor) -> Tensor:
            mean: Tensor = self.layer(inputs)[:, 0]
            pyro.deterministic("first", mean[0])
            with pyro.plate("data", len(inputs)):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
            return mean

    inputs, y = torch.randn(6, 2), torch.randn(6)
    model = Network()
    guide = AutoNormal(model)
    guide(inputs, y)
    tree = pg.to_datatree(model, guide, (inputs, y), num_draws=5)
    weight = torch.as_tensor(tree["posterior"]["layer.weight"].values)[0, :, 0]
    mean = weight @ inputs.T + model.layer.bias.detach()
    np.testing.assert_allclose(tree["log_likelihood"]["y"][0], dist.Normal(mean, 1.0).log_prob(y), rtol=1e-4)
    np.testing.assert_allclose(tree["posterior"]["first"][0], mean[:, 0], rtol=1e-4)


def test_a_deterministic_site_that_mixes_draws_is_read_one_at_a_time() -> None:
    """log p of draws side by side is right; the site, which takes the first of its axis, would not be."""

    def model(x: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.deterministic("first", weight[0])
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(weight.sum(-1), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("weight", dist.Normal(torch.ones(3), 1.0).to_event(1))

    tree = pg.to_datatree(model, guide, torch.randn(4), num_draws=7)
    np.testing.assert_array_equal(tree["posterior"]["first"], tree["posterior"]["weight"][..., 0])


def test_plates_and_events_name_the_dimensions() -> None:
    def model(x: Tensor, group: Tensor) -> None:
        with pyro.plate("groups", 3):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(x), dim=-2), pyro.plate("x", 4, dim=-1):
            at, width = mean[..., group, :].unsqueeze(-2).unsqueeze(-2), scale[..., group].unsqueeze(-1).unsqueeze(-1)
            # A draw has an axis of its own left of the plates: neither indexing above nor events are in its way.
            pyro.sample("x", dist.Normal(at.reshape(*at.shape[:-4], len(x), 1, 2), width).to_event(1), obs=x)

    def guide(x: Tensor, group: Tensor) -> None:
        with pyro.plate("groups", 3):
            pyro.sample("scale", dist.LogNormal(0.0, 0.1))
            pyro.sample("mean", dist.Normal(torch.zeros(2), pyro.param("s", torch.ones(()))).to_event(1))

    x, group = torch.randn(5, 4, 2), torch.tensor([0, 1, 2, 0, 1])
    tree = pg.to_datatree(model, guide, (x, group), num_draws=6, plate="rows")
    assert tree["posterior"]["scale"].dims == ("chain", "draw", "groups")
    assert tree["posterior"]["mean"].dims == ("chain", "draw", "groups", "mean_dim_0")
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "datapoint", "x_plate")
    assert tree["observed_data"]["x"].dims == ("datapoint", "x_plate", "x_dim_0")
    assert tree["constant_data"]["group"].dims == ("datapoint",)
    at = torch.as_tensor(tree["posterior"]["mean"].values)[0][:, group, None]
    width = torch.as_tensor(tree["posterior"]["scale"].values)[0][:, group, None, None]
    np.testing.assert_allclose(tree["log_likelihood"]["x"][0], dist.Normal(at, width).log_prob(x).sum(-1), rtol=1e-4)
    assert tree.attrs["latents"] == "global"


def test_masked_observations_are_no_observations() -> None:
    x = some_data(8)
    seen = torch.tensor([True] * 6 + [False] * 2)

    def model(x: Tensor, seen: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, PRIOR_SCALE))
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    exact = guide_of_mean(x[:6])
    masked = pg.to_datatree(model, lambda x, seen: exact(x), (x, seen), num_draws=200)
    plain = pg.to_datatree(normal_mean, exact, x[:6], num_draws=200)
    assert masked["log_likelihood"]["x"].isnull().all(["chain", "draw"]).values.tolist() == [False] * 6 + [True] * 2
    assert pg.loo(masked).n_data_points == 6
    assert pg.loo(masked).elpd == pytest.approx(pg.loo(plain).elpd, abs=1e-9)
    assert masked["constant_data"]["seen"].dims == ("datapoint",)


# --- Local latents ---------------------------------------------------------------------------------------------------


def test_local_latents_have_datapoints() -> None:
    model = anisotropic(5, 2)
    x, _ = draws_of(model, 70)
    guide = AmortizedNormal(5, 2, hidden=(8,)).double()
    tree = pg.to_datatree(model, guide, x, num_draws=300)
    z = tree["posterior"]["z"]
    assert z.dims == ("chain", "draw", "datapoint", "z_dim_0") and z.shape == (1, 300, 70, 2)
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "datapoint")
    at = torch.as_tensor(z.values)
    expected = dist.Normal(at @ model.weight.T + model.bias, model.noise_scale).log_prob(x).sum(-1).detach()
    np.testing.assert_allclose(tree["log_likelihood"]["x"], expected, rtol=1e-9)
    np.testing.assert_array_equal(tree["observed_data"]["x"], x)
    mean, scale = (part.detach() for part in guide.parameters_of(x))
    log_q = dist.Normal(mean, scale).log_prob(at).sum(-1)
    np.testing.assert_allclose(tree["sample_stats"]["log_q"], log_q, rtol=1e-9)
    log_weights = torch.as_tensor((tree["sample_stats"]["log_p"] - tree["sample_stats"]["log_q"]).values)[0]
    off = (log_weights.mean(0) - model.elbo(x, mean, scale=scale).detach()) / (log_weights.std(0) / 300**0.5)
    assert float(off.abs().max()) < STANDARD_ERRORS + 0.5  # of 70
    assert tree.attrs["latents"] == "local" and tree.attrs["local_latents"] == "z"


def test_loo_is_refused_for_local_latents() -> None:
    model = LinearGaussian.random(3, 2)
    x, _ = draws_of(model, 5)
    guide = AmortizedNormal(3, 2, hidden=(4,))
    for plate in (None, False):
        with pytest.raises(pg.InputError, match=r"own \(z\).*infinite variance.*log p\(x\)") as caught:
            pg.loo(pg.to_datatree(model, guide, x, num_draws=5, plate=plate))
        assert "\n" not in str(caught.value)


def eight_schools(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    with pyro.plate("school", len(y)):
        effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(effect, 1.0), obs=y)


def test_local_latents_beside_global_ones() -> None:
    y = torch.randn(8)
    guide = AutoNormal(eight_schools)
    guide(y)
    tree = pg.to_datatree(eight_schools, guide, y, num_draws=5)
    assert tree["posterior"]["effect"].dims == ("chain", "draw", "datapoint")
    assert tree["posterior"]["mean"].dims == ("chain", "draw")
    assert tree.attrs["latents"] == "global and local"
    with pytest.raises(pg.InputError, match=r"own \(effect\)"):
        pg.loo(tree)


def test_a_refined_guide_and_an_autoguide_of_local_latents() -> None:
    model = anisotropic(3, 2)
    x, _ = draws_of(model, 6)
    autoguide = AutoNormal(model)
    autoguide(x)
    refined = pg.refine(model, AmortizedNormal(3, 2, hidden=(4,)).double(), x, settings=pg.Refinement(num_steps=3))
    for guide in (autoguide, refined):
        tree = pg.to_datatree(model, guide, x, num_draws=4)
        assert tree["posterior"]["z"].shape == (1, 4, 6, 2)


def test_sites_of_a_datapoint_in_further_plates() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", 3, dim=-1):
                pyro.sample("x", dist.Normal(pyro.deterministic("twice", 2 * z, event_dim=0), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), 1.0))

    x = torch.randn(4, 3)
    tree = pg.to_datatree(model, guide, x, num_draws=5, plate="data")
    z = torch.as_tensor(tree["posterior"]["z"].values)
    assert tree["posterior"]["z"].dims == tree["posterior"]["twice"].dims == ("chain", "draw", "datapoint")
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "datapoint", "pixels")
    np.testing.assert_allclose(tree["log_likelihood"]["x"], dist.Normal(2 * z[..., None], 1.0).log_prob(x), rtol=1e-5)


def test_deterministic_sites_of_a_datapoint_are_told_from_constants() -> None:
    x = torch.randn(3)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("both", torch.stack([z, -z], -1))
            pyro.deterministic("constant", torch.ones(3))  # as long as there are datapoints
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoNormal(model)
    guide(x)
    posterior = pg.to_datatree(model, guide, x, num_draws=4)["posterior"]
    assert set(posterior.data_vars) == {"z", "both"}
    assert posterior["both"].dims == ("chain", "draw", "datapoint", "both_dim_0")
    np.testing.assert_array_equal(posterior["both"][..., 1], -posterior["z"])


def test_no_plate_and_a_guide_whose_sites_depend_on_each_other() -> None:
    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        mean = pyro.sample("mean", dist.Normal(0.0, scale))
        for n in range(2):
            pyro.sample(f"x_{n}", dist.Normal(mean, 1.0), obs=x[n])

    def guide(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(pyro.param("loc", torch.tensor(0.1)), 0.2))
        pyro.sample("mean", dist.Normal(0.0, scale))

    x = torch.randn(2)
    tree = pg.to_datatree(model, guide, x, num_draws=6)
    scale, mean = (torch.as_tensor(tree["posterior"][name].values) for name in ("scale", "mean"))
    np.testing.assert_allclose(tree["log_likelihood"]["x_1"], dist.Normal(mean, 1.0).log_prob(x[1]), rtol=1e-4)
    ratio = dist.Normal(mean, 1.0).log_prob(x[0]) + dist.Normal(mean, 1.0).log_prob(x[1])
    ratio += dist.LogNormal(0.0, 1.0).log_prob(scale) - dist.LogNormal(0.1, 0.2).log_prob(scale)
    np.testing.assert_allclose(tree["sample_stats"]["log_p"] - tree["sample_stats"]["log_q"], ratio, rtol=1e-3)
    assert tree.attrs["latents"] == "global" and tree.attrs["data_plate"] == "none"


# --- ArviZ, files, and the caller's state ----------------------------------------------------------------------------


def test_the_tree_is_used_by_arviz_and_saved(tmp_path: Path) -> None:
    x = some_data()
    tree = pg.to_datatree(normal_mean, guide_of_mean(x, width=1.3), x, num_draws=100)
    summary = arviz_stats.summary(tree)
    assert float(summary.loc["mean", "mean"]) == pytest.approx(float(tree["posterior"]["mean"].mean()), abs=0.1)
    tree.to_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "posterior.nc", engine="h5netcdf") as saved:
        loaded = saved.load()
    xr.testing.assert_identical(loaded, tree)
    assert pg.loo(loaded).elpd == pg.loo(tree).elpd


def test_the_callers_state_is_as_before() -> None:
    model = LinearGaussian.random(3, 2)
    x, _ = draws_of(model, 5)
    guide = AmortizedNormal(3, 2, hidden=(4,))
    model.train()
    guide.eval()
    pyro.param("kept", torch.ones(2))
    before = torch.get_rng_state()
    first, second = (pg.to_datatree(model, guide, x, num_draws=3, seed=4) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and not guide.training
    assert list(pyro.get_param_store()) == ["kept"]
    xr.testing.assert_equal(first, second)
    other = pg.to_datatree(model, guide, x, num_draws=3, seed=5)
    assert not first["posterior"].equals(other["posterior"])


def test_bad_input_is_named_in_one_line() -> None:
    x = some_data(4)
    guide = guide_of_mean(x)

    def refused(match: str, *args: object, **settings: object) -> None:
        with pytest.raises(pg.InputError, match=match) as caught:
            pg.to_datatree(*args, **settings)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    refused("num_draws: .* 2, got 1", normal_mean, guide, x, num_draws=1)
    refused("argument 0 contains NaN", normal_mean, guide, torch.full((4,), torch.nan))
    refused("site 'mean'.*missing from the guide", normal_mean, lambda x: None, x)
    refused("data: expected a tensor", normal_mean, guide, "x")
    refused("no plate named 'rows'", normal_mean, guide, x, plate="rows")

    def reserved(x: Tensor) -> None:
        draw = pyro.sample("draw", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(draw, 1.0), obs=x)

    refused("site 'draw'", reserved, lambda x: pyro.sample("draw", dist.Normal(0.0, 1.0)), x)


def test_loo_says_what_it_cannot_use() -> None:
    x = some_data(4)

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(mean, 1.0), obs=x)
            pyro.sample("b", dist.Normal(mean, 2.0), obs=x)
        pyro.sample("whole", dist.Normal(mean, 1.0).expand([len(x)]).to_event(1), obs=x)

    tree = pg.to_datatree(model, guide_of_mean(x), x, num_draws=100)
    assert pg.loo(tree, var_name="b").n_data_points == 4
    with pytest.raises(pg.InputError, match="several observed sites"):
        pg.loo(tree)
    with pytest.raises(pg.InputError, match="no observed site 'c'"):
        pg.loo(tree, var_name="c")
    with pytest.raises(pg.InputError, match=r"site .whole.*leave-one-out needs several"):
        pg.loo(tree, var_name="whole")
    with pytest.raises(pg.InputError, match="at least 25 draws, but it has 24"):
        pg.loo(pg.to_datatree(normal_mean, guide_of_mean(x), x, num_draws=24))
    with pytest.warns(UserWarning, match="Pareto"):
        assert math.isfinite(pg.loo(pg.to_datatree(normal_mean, guide_of_mean(x), x, num_draws=25)).elpd)
    with pytest.raises(pg.InputError, match="not a result of"):
        pg.loo(xr.DataTree())

    def bounded(x: Tensor) -> None:
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Uniform(0.0, top), obs=x)

    below = pg.to_datatree(
        bounded, lambda x: pyro.sample("top", dist.LogNormal(0.0, 1.0)), 0.1 * torch.arange(1, 5), num_draws=100
    )
    with pytest.raises(pg.InputError, match="infinite"):
        pg.loo(below)
