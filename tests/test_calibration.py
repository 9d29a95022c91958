"""Simulation-based calibration against closed forms: what is right passes, what is wrong is told how, both at the
rates that are stated.
"""

import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from arviz_stats.ecdf_utils import simulate_confidence_bands
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from pyro.infer.autoguide import AutoNormal
from scipy import stats
from torch import Tensor, nn

from pyrogaps import IndexedData, InputError, JointDensity, Refinement, refine
from pyrogaps.calibration import Calibration, calibrate
from pyrogaps.calibration.ranks import rank_chunk
from pyrogaps.calibration.statistics import holm, marginal, proportion
from pyrogaps.calibration.summary import LOG_JOINT, TESTS, summarise
from pyrogaps.calibration.uniformity import POINTS, UniformityTest
from pyrogaps.guides.auxiliary_flows import AmortizedAuxiliaryFlow
from pyrogaps.guides.local import AutoLocalMultivariateNormal
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.models.sequences import sequence_mask
from pyrogaps.plots.calibration import MAX_HIGHLIGHTED, plot_calibration
from pyrogaps.run import Run
from pyrogaps.streams import Chunk
from tests.references import STANDARD_ERRORS, NearPosterior, RaggedWalk, WrongEncoder, anisotropic

NUMBER, LATENT_DIM = 512, 3
PROBABILITIES = (0.5, 0.8, 0.95)
SHAPE = torch.zeros(4, 6, dtype=torch.float64)


def guide_of(model: LinearGaussian, *, shift: float = 0.0, width: float = 1.0) -> NearPosterior:
    """The exact posterior, moved by `shift` of its standard deviations and `width` times as wide."""
    return NearPosterior(model, shift=shift, width=width)


def normal_coverage(probability: float, *, shift: float = 0.0, width: float | np.ndarray = 1.0) -> np.ndarray:
    """How often the central interval of N(shift, width^2) holds a draw from N(0, 1)."""
    half = np.asarray(width) * stats.norm.ppf((1 + probability) / 2)
    return stats.norm.cdf(shift + half) - stats.norm.cdf(shift - half)


def assert_covers(calibration: Calibration, exact: dict[float, np.ndarray]) -> None:
    """Each dimension's coverage within four binomial standard errors of the truth."""
    found = calibration.coverage(list(exact))
    for probability, share in exact.items():
        error = np.sqrt(share * (1 - share) / len(calibration.ranks))
        # The ends of intervals, between draws, are uncertain by one part in L.
        slack = 5 / calibration.num_draws
        off = np.abs(found["coverage"].sel(probability=probability).values - share)
        assert (off < STANDARD_ERRORS * error + slack).all(), (probability, off / error)


# --- Right and wrong posteriors --------------------------------------------------------------------------------------


def test_the_exact_posterior_is_calibrated() -> None:
    model = anisotropic(6, LATENT_DIM)
    found = calibrate(model, guide_of(model), SHAPE)
    assert found.ranks.shape == (NUMBER, LATENT_DIM) and found.num_draws == 1000
    assert float(found.ranks.min()) >= 0 and float(found.ranks.max()) <= 1000
    assert_covers(found, {p: np.full(LATENT_DIM, p) for p in PROBABILITIES})
    summary = found.summary()
    assert (summary["finding"] == "").all() and float(summary[TESTS].min().min()) > 0.05
    latents = summary.drop(LOG_JOINT)
    assert (np.abs(latents["mean_rank"] - 0.5) < STANDARD_ERRORS * latents["mean_rank_error"]).all()
    assert (np.abs(latents["shift"]) < STANDARD_ERRORS * latents["shift_error"]).all()
    assert (np.abs(latents["spread"] - 1) < STANDARD_ERRORS * latents["spread_error"]).all()
    np.testing.assert_allclose(latents["mean_rank_error"], 1 / math.sqrt(12 * NUMBER), rtol=0.1)
    overall = found.coverage(PROBABILITIES)
    off = (overall["overall"] - overall["probability"]) / overall["overall_error"]
    assert float(np.abs(off).max()) < STANDARD_ERRORS
    assert "3 latent dimensions: no significant deviation" in str(found)


@pytest.mark.parametrize(
    ("shift", "width", "finding", "log_joint"),
    [
        (0.0, 0.5, "too narrow", "too high"),
        (0.0, 2.0, "too wide", "too low"),
        (0.6, 1.0, "too high", "too low"),
        (-0.6, 1.0, "too low", "too low"),
        (-0.6, 0.5, "too low, too narrow", None),
    ],
)
def test_what_is_wrong_is_told_how(shift: float, width: float, finding: str, log_joint: str | None) -> None:
    model = anisotropic(6, LATENT_DIM)
    found = calibrate(model, guide_of(model, shift=shift, width=width), SHAPE)
    assert_covers(found, {p: np.full(LATENT_DIM, normal_coverage(p, shift=shift, width=width)) for p in PROBABILITIES})
    summary = found.summary()
    latents = summary.drop(LOG_JOINT)
    assert (latents["finding"] == finding).all()
    if log_joint is not None:
        assert summary["finding"][LOG_JOINT] == log_joint
    if width >= 1:  # draws resolve these
        assert (np.abs(latents["shift"] + shift / width) < STANDARD_ERRORS * latents["shift_error"]).all()
        assert (np.abs(latents["spread"] - 1 / width) < STANDARD_ERRORS * latents["spread_error"] + 0.005).all()
    report = str(found)
    assert report.count(finding) >= LATENT_DIM and "3 of 3 latent dimensions deviate" in report


def test_one_wrong_coordinate_is_named() -> None:
    model = LinearGaussian(torch.eye(4, dtype=torch.float64)[:, :3])
    right = guide_of(model)
    with torch.no_grad():
        right.scale_tril[1, 1] *= 1.5
    found = calibrate(model, right, SHAPE[:, :4])
    assert found.summary()["finding"].to_dict() | {LOG_JOINT: ""} == {
        "z[0]": "", "z[1]": "too wide", "z[2]": "", LOG_JOINT: "",
    }  # fmt: skip
    assert "1 of 3 latent dimensions deviates" in str(found)


def test_a_mean_field_posterior_is_too_narrow_by_as_much_as_it_must_be() -> None:
    """The best factorised Normal has variances 1 / precision_ii: coverage in closed form."""
    model = anisotropic(6, LATENT_DIM)
    scale = model.precision.diagonal().rsqrt().detach()
    true_scale = model.posterior(SHAPE)[1].diagonal().sqrt().detach()
    ratio = (scale / true_scale).numpy()
    assert ratio.min() < 0.8
    found = calibrate(
        model, WrongEncoder(model), SHAPE, posterior="refined", refinement=Refinement(num_steps=120), num_simulated=256
    )
    assert_covers(found, {p: normal_coverage(p, width=ratio) for p in PROBABILITIES})
    assert float(found.per_simulated["converged"].mean()) > 0.9
    assert "refined posterior (WrongEncoder)" in str(found) and "refinement converged: " in str(found)


def test_refinement_mends_a_broken_amortized_guide() -> None:
    """In a model whose posterior factorises the guide's own family holds it."""
    model = LinearGaussian(torch.diag(torch.tensor([0.5, 2.0], dtype=torch.float64)), [1.0, -1.0], [0.7, 1.3])
    guide, shape = WrongEncoder(model), SHAPE[:, :2]
    amortized = calibrate(model, guide, shape)
    assert (amortized.summary()["finding"] != "").all()
    refined = calibrate(
        model, guide, shape, posterior="refined", refinement=Refinement(num_steps=150), num_simulated=192
    )
    assert (refined.summary()["finding"] == "").all()
    assert_covers(refined, {p: np.full(2, p) for p in PROBABILITIES})


def test_families_and_autoguides_are_fitted_anew() -> None:
    model, settings = anisotropic(6, 2), Refinement(num_steps=20)
    trained = AutoNormal(model)
    trained(SHAPE)
    for guide in (AutoLocalMultivariateNormal, trained):
        found = calibrate(model, guide, SHAPE, posterior="refined", refinement=settings, num_simulated=8, num_draws=100)
        assert found.ranks.shape == (8, 2)


class PriorWalk(nn.Module):
    """The prior of `RaggedWalk` as its guide: later latents drawn given earlier ones."""

    def __init__(self, model: RaggedWalk) -> None:
        super().__init__()
        self.model = [model]

    def forward(self, x: Tensor, lengths: Tensor) -> None:
        (model,) = self.model
        with pyro.plate("data", len(x)):
            keep = sequence_mask("PriorWalk", x, lengths, 1)
            list(model._states(x, keep, lambda z, t: model.transition(z)))


def test_masked_coordinates_do_not_count_and_the_prior_is_found_out() -> None:
    """The prior passes in every coordinate; the rank of log p(x, z) says that it has not looked at the data."""
    model, lengths = RaggedWalk(), torch.tensor([4, 1, 3, 2])
    found = calibrate(model, PriorWalk(model), (torch.zeros(4, 4, 1).double(), lengths), num_simulated=300)
    active = np.arange(4) < np.resize(lengths.numpy(), 300)[:, None]
    np.testing.assert_array_equal(np.isfinite(found.ranks.values), active)
    summary = found.summary()
    assert list(summary.index) == ["z_1[0]", "z_2[0]", "z_3[0]", "z_4[0]", LOG_JOINT]
    assert summary["count"].tolist() == [300, 225, 150, 75, 300]
    assert (summary["finding"][:-1] == "").all() and summary["finding"][LOG_JOINT] == "too low"
    share = found.coverage(0.5)["coverage"].values[0]
    assert (np.abs(share - 0.5) < STANDARD_ERRORS * 0.5 / np.sqrt([300, 225, 150, 75])).all()
    assert "the posterior puts mass where the model has little" in str(found)


# --- Shapes, draws and seeds -----------------------------------------------------------------------------------------


def test_dimensions_are_labelled_by_site_and_element() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            share = pyro.sample("share", dist.Dirichlet(x.new_ones(3)))
            scale = pyro.sample("scale", dist.LogNormal(x.new_tensor(0.0), 0.3))
            grid = pyro.sample("grid", dist.Normal(x.new_zeros(2, 2), 1.0).to_event(2))
            mean = (share * x.new_tensor([0.0, 1.0, 2.0])).sum(-1) + grid.sum((-1, -2))
            pyro.sample("x", dist.Normal(mean, scale), obs=x)

    def prior(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("grid", dist.Normal(x.new_zeros(2, 2), 1.0).to_event(2))
            pyro.sample("scale", dist.LogNormal(x.new_tensor(0.0), 0.3))
            pyro.sample("share", dist.Dirichlet(x.new_ones(3)))

    found = calibrate(model, prior, torch.zeros(5), num_simulated=200)
    grid = [f"grid[{i},{j}]" for i in (0, 1) for j in (0, 1)]
    assert found.ranks["latent"].values.tolist() == ["share[0]", "share[1]", "scale", *grid]
    assert found.ranks["site"].values.tolist() == ["share"] * 2 + ["scale"] + ["grid"] * 4
    assert (found.summary()["finding"][:-1] == "").all()
    tree = found.to_datatree()["prior_sbc"]
    assert tree["grid"].shape == (1, 200, 2, 2) and tree["scale"].shape == (1, 200)
    np.testing.assert_array_equal(tree["grid"].values[0, :, 1, 0], found.per_simulated["pit"].sel(latent="grid[1,0]"))


def test_data_that_are_not_drawn_are_those_at_hand() -> None:
    """Covariates of three datapoints serve eight simulated ones in turn; arguments need not be tensors."""
    inputs = torch.tensor([0.0, 10.0, 20.0], dtype=torch.float64)
    seen = []

    def model(x: Tensor, inputs: Tensor, scale: float) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(inputs, 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x: Tensor, inputs: Tensor, scale: float) -> None:
        seen.append(inputs)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((inputs * scale**2 + x) / (1 + scale**2), scale / (1 + scale**2) ** 0.5))

    data = IndexedData(3, lambda indices: (torch.zeros(3).double()[indices], inputs[indices], 0.5))
    found = calibrate(model, guide, data, num_simulated=8, num_draws=200)
    truth = found.per_simulated["truth"].values[:, 0]
    assert (np.abs(truth - np.resize(inputs.numpy(), 8)) < 6).all() and len(set(truth)) == 8
    fewer = calibrate(model, guide, data, num_simulated=2, num_draws=100)
    assert (np.abs(fewer.per_simulated["truth"].values[:, 0] - [0, 20]) < 6).all()
    many = calibrate(model, guide, data, num_simulated=400, num_draws=200)
    assert (many.summary()["finding"] == "").all()


def test_values_are_handed_over_by_to_data() -> None:
    def model(pair: Tensor) -> None:
        with pyro.plate("data", len(pair)):
            z = pyro.sample("z", dist.Normal(pair.new_zeros(len(pair)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=pair.sum(-1))

    def guide(pair: Tensor) -> None:
        with pyro.plate("data", len(pair)):
            pyro.sample("z", dist.Normal(pair.sum(-1) / 2, 0.5**0.5))

    shape = torch.arange(6.0).reshape(3, 2).double()
    with pytest.raises(InputError, match=r"site 'x'.*to_data"):
        calibrate(model, guide, shape)

    def to_data(values: dict[str, Tensor]) -> Tensor:
        return torch.stack([values["x"] - 1, torch.ones_like(values["x"])], -1)

    assert (calibrate(model, guide, shape, to_data=to_data).summary()["finding"] == "").all()


def test_a_guide_with_auxiliary_variables_is_ranked_in_the_models_coordinates() -> None:
    model = anisotropic(6, 2)
    found = calibrate(model, AmortizedAuxiliaryFlow(6, 2, hidden=(8,)).double(), SHAPE, num_simulated=20, num_draws=100)
    assert found.ranks["latent"].values.tolist() == ["z[0]", "z[1]"]


def test_neither_batches_nor_the_callers_seed_change_anything() -> None:
    model = anisotropic(6, 2)
    guide = guide_of(model, shift=0.2)
    arguments = {"num_simulated": 150, "num_draws": 200}
    state = torch.get_rng_state()
    first = calibrate(model, guide, SHAPE, **arguments)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    again = calibrate(model, guide, SHAPE, batch_size=1000, **arguments)  # type: ignore[arg-type]
    xr.testing.assert_allclose(first.per_simulated, again.per_simulated, rtol=1e-9)
    other = calibrate(model, guide, SHAPE, seed=1, **arguments)  # type: ignore[arg-type]
    assert float(np.abs(other.per_simulated["pit"] - first.per_simulated["pit"]).mean()) > 0.1


def test_refinement_does_not_hang_on_batches() -> None:
    model, settings = anisotropic(6, 2), Refinement(num_steps=10)
    one, other = (
        calibrate(
            model, WrongEncoder(model), SHAPE, posterior="refined", refinement=settings, num_simulated=80,
            num_draws=100, batch_size=size,
        )
        for size in (64, 128)
    )  # fmt: skip
    np.testing.assert_array_equal(one.ranks, other.ranks)


class Stub:
    """A posterior whose draws are given, `(S, N, dim)`, again and again."""

    def __init__(self, joint: JointDensity, draws: Tensor) -> None:
        self.joint, self.draws = joint, draws

    def at(self, indices: Tensor) -> SimpleNamespace:
        def sample(number: int, antithetic: bool = False) -> tuple[Tensor, Tensor]:
            z = self.draws[:, indices].expand(number, -1, -1)
            return z, torch.zeros(z.shape[:2])

        return SimpleNamespace(joint=self.joint, sample=sample)


def test_ties_are_broken_evenly() -> None:
    model = anisotropic(6, 2)
    truth = torch.randn(400, 2).double()
    joint = JointDensity(model, torch.zeros(400, 6).double())
    ranks = rank_chunk(joint, Stub(joint, truth[None]), Chunk(0, 400), truth, 100, Run(0))
    for column in (*ranks.pit.T, ranks.log_joint):
        assert marginal(column.numpy()).p_uniform > 0.01
    assert set(ranks.rank.flatten().tolist()) <= set(range(101)) and float(ranks.rank.std()) > 25


def test_draws_that_are_not_finite_are_refused() -> None:
    joint = JointDensity(anisotropic(6, 2), torch.zeros(80, 6).double())
    draws = torch.zeros(1, 80, 2).double()
    draws[0, 70, 1] = torch.nan
    with pytest.raises(InputError, match="NaN or infinite at simulated datapoints 70"):
        rank_chunk(joint, Stub(joint, draws), Chunk(64, 80), torch.zeros(80, 2).double(), 100, Run(0))


# --- The statistics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 30, 400])
def test_the_uniformity_test_is_exact(number: int) -> None:
    test, generator = UniformityTest(number), np.random.default_rng(0)
    p_values = np.array([test.p_value(generator.uniform(size=number)) for _ in range(1000)])
    for level in (0.02, 0.1, 0.5):  # a discrete p-value falls below a level no more often than that
        rejected = float((p_values <= level).mean())
        assert rejected < level + STANDARD_ERRORS * math.sqrt(level * (1 - level) / 1000), (level, rejected)
        if number == 400:
            assert rejected > level - STANDARD_ERRORS * math.sqrt(level * (1 - level) / 1000) - 0.02
    low, high = test.band(0.9)
    samples = np.sort(generator.uniform(size=(1000, number)), 1)
    ecdf = np.stack([np.searchsorted(sample, POINTS, side="right") for sample in samples]) / number
    within_band = ((ecdf > low - 1e-9) & (ecdf < high + 1e-9)).all(1).mean()
    assert within_band > 0.9 - STANDARD_ERRORS * 0.0095
    assert test.inside(0.0) == pytest.approx(1, abs=1e-9)


def test_the_uniformity_test_agrees_with_simulation() -> None:
    """ArviZ simulates the pointwise probability that makes a band simultaneous; here it is computed."""
    number, simulations, levels = 200, 4000, np.array([0.5, 0.9, 0.99])
    generator = np.random.default_rng(1)
    pointwise = simulate_confidence_bands(number, 1, POINTS, levels, simulations, generator)
    test = UniformityTest(number)
    for level, probability in zip(levels, pointwise, strict=True):
        error = math.sqrt(level * (1 - level) / simulations)
        assert abs(test.inside((1 - probability) / 2) - level) < STANDARD_ERRORS * error + 0.005


def test_no_more_findings_than_stated_where_all_is_well() -> None:
    generator, repeats = np.random.default_rng(2), 300
    least = []
    for _ in range(repeats):
        pit = generator.uniform(size=(120, 4))
        pit[:, 3] = pit[:, 0]  # tests that depend on one another
        least.append(float(summarise(list("abcd"), pit, generator.uniform(size=120))[TESTS].min().min()))
    for level in (0.01, 0.2):
        share = float((np.array(least) < level).mean())
        assert share <= level + STANDARD_ERRORS * math.sqrt(level * (1 - level) / repeats), (level, share)
    assert share > 0.05


def test_a_spread_is_not_taken_for_a_shift() -> None:
    scores = 3 * np.random.default_rng(7).normal(size=(500, 100))
    p_values = np.array([marginal(stats.norm.cdf(row)).p_shift for row in scores])
    for level in (0.01, 0.1):
        share = float((p_values < level).mean())
        assert abs(share - level) < STANDARD_ERRORS * math.sqrt(level * (1 - level) / len(p_values))


def test_holm() -> None:
    adjusted = holm(np.array([[0.01, 0.04], [0.03, np.nan]]))
    np.testing.assert_allclose(adjusted, [[0.03, 0.06], [0.06, np.nan]])


def test_errors_of_shares_are_over_datapoints() -> None:
    generator = np.random.default_rng(3)
    hits = generator.uniform(size=2000) < 0.7
    one, error = proportion(hits, np.ones(2000, dtype=bool))
    assert float(error) == pytest.approx(math.sqrt(0.7 * 0.3 / 2000), rel=0.05)
    five = np.repeat(hits[:, None], 5, 1)
    same, same_error = proportion(five.sum(1), np.full(2000, 5))
    assert float(same) == float(one) and float(same_error) == pytest.approx(float(error), rel=1e-9)
    _, certain = proportion(np.ones(50), np.ones(50))
    assert 0 < float(certain) < 0.05
    ragged = generator.integers(1, 6, 4000)
    shares = [proportion(generator.binomial(ragged, 0.4), ragged) for _ in range(200)]
    spread = np.std([float(share) for share, _ in shares])
    assert float(np.mean([error for _, error in shares])) == pytest.approx(spread, rel=STANDARD_ERRORS / 20)
    assert np.isnan(proportion(np.zeros((5, 1)), np.zeros((5, 1)))).all()


def test_a_misshapen_posterior_is_called_that() -> None:
    """Scores of mean 0 and variance 1, half of them at -1 and half at 1."""
    u = stats.norm.cdf(np.repeat([-1.0, 1.0], 200) + 0.01 * np.random.default_rng(4).normal(size=400))
    found = summarise(["a"], u[:, None], np.linspace(0.001, 0.999, 400))
    assert found["finding"].tolist() == ["misshapen", ""]


def test_a_dimension_that_is_never_active_says_nothing() -> None:
    generator = np.random.default_rng(5)
    pit = generator.uniform(size=(200, 2))
    pit[:, 1] = np.nan
    found = summarise(["a", "b"], pit, generator.uniform(size=200))
    assert found["count"].tolist() == [200, 0, 200] and found["finding"].tolist() == ["", "", ""]
    assert found.loc["b"].drop(["count", "finding"]).isna().all()


# --- Report, tree and picture ----------------------------------------------------------------------------------------


def fabricate(dim: int, *, wrong: int = 0, number: int = 200) -> Calibration:
    """Uniform ranks, those of the first `wrong` dimensions of posteriors that are too narrow."""
    generator = np.random.default_rng(6)
    scores = generator.normal(size=(number, dim))
    scores[:, :wrong] *= np.linspace(6, 2, wrong)
    pit = stats.norm.cdf(scores)
    variables = {
        "rank": (("simulated", "latent"), np.floor(pit * 1001)),
        "pit": (("simulated", "latent"), pit),
        "truth": (("simulated", "latent"), scores),
        "log_joint_pit": ("simulated", generator.uniform(size=number)),
    }
    coordinates = {"latent": [f"z[{k}]" for k in range(dim)], "site": ("latent", ["z"] * dim)}
    provenance = {"posterior": "amortized", "guide": "Guide", "num_draws": 1000, "shapes": {"z": [dim]}, "seed": 0}
    return Calibration(xr.Dataset(variables, coordinates), provenance)


def test_the_report_is_short() -> None:
    report = str(fabricate(50, wrong=20))
    lines = report.splitlines()
    assert len(lines) <= 20 and max(map(len, lines)) <= 130
    assert "20 of 50 latent dimensions deviate significantly (family-wise error rate 1%)" in report
    assert lines[7].startswith("z[0] ") and "and 15 more too narrow" in report
    assert repr(fabricate(50, wrong=20)) == report


def test_the_tree_is_read_by_arviz_and_back(tmp_path: Path) -> None:
    model, lengths = RaggedWalk(), torch.tensor([2, 1])
    found = calibrate(
        model, PriorWalk(model), (torch.zeros(2, 2, 1).double(), lengths), num_simulated=60, num_draws=100
    )
    tree = found.to_datatree()
    tree.to_netcdf(tmp_path / "calibration.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "calibration.nc", engine="h5netcdf") as saved:
        loaded = saved.load()
    xr.testing.assert_identical(loaded, tree)
    again = Calibration.from_datatree(loaded)
    assert str(again) == str(found) and again.provenance == found.provenance
    with pytest.raises(InputError, match="not a tree"):
        Calibration.from_datatree(xr.DataTree())
    changed = loaded.copy(deep=True)
    changed["calibration"]["rank"].values[0, 0] += 1
    with pytest.raises(InputError, match="calibration: its values are not those that to_datatree wrote"):
        Calibration.from_datatree(changed)
    pit = loaded["prior_sbc"].to_dataset()
    assert pit["z_2"].dims == ("chain", "draw", "z_2_dim_0")
    assert pit.azstats.ecdf(dim=["chain", "draw"], pit=True)["z_2"].notnull().all()


def test_a_file_and_a_notebook(tmp_path: Path) -> None:
    found = fabricate(50, wrong=20)
    found.save(tmp_path / "calibration.nc")
    assert str(Calibration.load(tmp_path / "calibration.nc")) == str(found)
    (tmp_path / "calibration.nc").write_bytes((tmp_path / "calibration.nc").read_bytes()[:-50])
    with pytest.raises(InputError, match=r"calibration .*calibration\.nc: the file is damaged, or something else"):
        Calibration.load(tmp_path / "calibration.nc")
    for calibration, lines in ((found, 20), (fabricate(5, wrong=0), 8)):
        text = "".join(ElementTree.fromstring(f"<body>{calibration._repr_html_()}</body>").itertext())
        printed = str(calibration)
        assert printed.splitlines()[0] in text and len(printed.splitlines()) <= lines
        for figure in re.findall(r"-?[\d.]+ ± [\d.]+%?", printed):
            assert figure in text
        for line in printed.splitlines()[-3:]:
            assert line.removesuffix(":") in text


def test_arviz_plots_the_tree() -> None:
    try:
        from arviz_plots import plot_ecdf_pit
    except AttributeError:  # arviz-plots 0.8 beside matplotlib 3.11, which a fresh install does not put together
        pytest.skip("this arviz-plots cannot be imported beside this matplotlib")
    for coverage in (False, True):
        plot_ecdf_pit(fabricate(3).to_datatree(), coverage=coverage, backend="none")


def drawn(figure: Figure) -> Figure:
    FigureCanvasAgg(figure)
    figure.canvas.draw()
    return figure


def test_the_picture_shows_the_worst_in_colour() -> None:
    figure = drawn(plot_calibration(fabricate(50, wrong=20), Figure(figsize=(10, 4), layout="constrained")))  # type: ignore[arg-type]
    left, right = figure.axes
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [text for text in legend if text.startswith("z[")] == [f"z[{k}]: too narrow" for k in range(MAX_HIGHLIGHTED)]
    assert {"99% band", "other deviating dimensions", "no significant deviation", LOG_JOINT + " of the draws"} <= {
        *legend
    }
    assert len(right.lines) == 51 and len(left.lines) == 52
    coloured = [line for line in right.lines if len(set(to_rgba(line.get_color())[:3])) > 1]
    assert len(coloured) == MAX_HIGHLIGHTED
    assert len({str(line.get_linestyle()) for line in coloured}) == MAX_HIGHLIGHTED
    worst = coloured[0]
    at = int(np.argmin(np.abs(np.asarray(worst.get_xdata()) - 0.95)))
    share = float(fabricate(50, wrong=20).coverage(0.95)["coverage"][0, 0])
    assert np.asarray(worst.get_ydata())[at] == pytest.approx(100 * (share - 0.95), abs=1e-6)


def test_the_picture_of_a_calibrated_posterior_stays_within_its_band() -> None:
    calibration = fabricate(5, number=400)
    figure = plot_calibration(calibration.to_datatree(), Figure(figsize=(10, 4), layout="constrained"))
    for ax in figure.axes:
        (band,) = ax.collections
        (outline,) = band.get_paths()
        scale = 1 if ax is figure.axes[0] else 100
        for line in ax.lines:
            if len(line.get_xdata()) > 2:
                points = np.column_stack([line.get_xdata(), line.get_ydata()])[np.isin(line.get_xdata(), POINTS)]
                assert outline.contains_points(points, radius=0.005 * scale).all()


def test_masks_draw_a_second_band(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = fabricate(3)
    calibration.per_simulated["pit"][50:, 2] = np.nan
    calibration.per_simulated["pit"][:, 1] = np.nan
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    figure = drawn(plot_calibration(calibration, Figure(figsize=(10, 4))))  # type: ignore[arg-type]
    assert [len(ax.collections) for ax in figure.axes] == [2, 2]


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"posterior": "exact"}, "posterior: must be one of amortized, refined, got 'exact'"),
        ({"num_simulated": 1}, "num_simulated: must be a whole number of at least 2, got 1"),
        ({"num_draws": 99}, "num_draws: must be a whole number of at least 100, got 99"),
        ({"num_draws": 200.0}, "num_draws: must be a whole number"),
        ({"refinement": Refinement()}, "refinement: the amortized posterior is not refined"),
        ({"plate": False}, "plate: calibrate needs a data plate"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, object], message: str) -> None:
    model = anisotropic(6, 2)
    with pytest.raises(InputError, match=message) as caught:
        calibrate(model, guide_of(model), SHAPE, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_guides_that_have_no_answer_to_new_data() -> None:
    model = anisotropic(6, 2)
    trained = AutoNormal(model)
    trained(SHAPE)
    refined = refine(model, WrongEncoder(model), SHAPE, settings=Refinement(num_steps=2))

    def bound(x: Tensor) -> None:
        with pyro.plate("data", 4):
            loc = pyro.param("loc", torch.zeros(4, 2).double(), event_dim=1)
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    for guide, posterior, message in (
        (trained, "amortized", "AutoNormal has no parameters for simulated datapoints.*posterior='refined'"),
        (AutoNormal, "amortized", "AutoNormal is a family.*posterior='refined'"),
        (refined, "amortized", "a refined guide fits only the data"),
        (bound, "amortized", "its plate 'data' has the size of the data set"),
        (bound, "refined", "its plate 'data' has the size of the data set"),
    ):
        with pytest.raises(InputError, match="guide: .*" + message) as caught:
            calibrate(model, guide, SHAPE, posterior=posterior)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_models_that_cannot_be_simulated() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.factor("likelihood", -((x - z) ** 2))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(InputError, match=r"site 'likelihood': a pyro\.factor cannot be simulated"):
        calibrate(model, guide, torch.zeros(4))


def test_probabilities_out_of_range() -> None:
    with pytest.raises(InputError, match=r"probabilities\[1\]: must be a number above 0 and below 1"):
        fabricate(2).coverage([0.5, 1.0])


def test_a_site_with_the_name_of_a_dimension() -> None:
    calibration = fabricate(1)
    calibration.provenance["shapes"] = {"draw": [1]}
    with pytest.raises(InputError, match="site 'draw'"):
        calibration.to_datatree()
