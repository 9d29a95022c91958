"""Bridge sampling: exact evidence, its stated error against the spread of replicates, and a ledger made with it."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.eval import main
from pyrogaps.evidence.bridge import BridgeEstimate, bridged
from pyrogaps.run import Run
from pyrogaps.streams import seeded
from tests.references import (
    RaggedWalk,
    WrongEncoder,
    anisotropic,
    draws_of,
    gamma_poisson,
    gamma_poisson_evidence,
    parabola,
    parabola_evidence,
)

REPLICATES = 200
BRIEF = pg.Refinement(num_steps=20, num_particles=4, num_selection=8)
# A model, its guide, one datapoint `(1, *)` and the evidence of it.
Exact = tuple[Any, Any, Tensor, Tensor]


def correlated_gaussian() -> Exact:
    """z ~ N(0, P^-1) in 6 dimensions with condition number 100, seen under unit noise."""
    dim = 6
    with seeded(0, "rotation"):
        axes, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))
        x = torch.randn(1, dim, dtype=torch.float64)
    precision = axes * torch.logspace(-2, 0, dim, dtype=torch.float64) @ axes.T
    precision = 0.5 * (precision + precision.T)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(x.new_zeros(dim), precision_matrix=precision))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    covariance = torch.linalg.inv(precision) + torch.eye(dim, dtype=torch.float64)
    return model, None, x, dist.MultivariateNormal(x.new_zeros(dim), covariance).log_prob(x)


def gamma_in_log_space() -> Exact:
    """Counts of 1 and 0: the posterior's logarithm is skewed."""
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    return gamma_poisson, None, x, gamma_poisson_evidence(x)


def heavy_tails() -> Exact:
    """Three independent Student's t with three degrees of freedom, seen under noise that hides little of the tails."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(3 * x.new_ones(3), 0.0, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 2.0).to_event(1), obs=x)

    x = torch.tensor([[0.3, -2.0, 4.0]], dtype=torch.float64)
    z = torch.linspace(-400, 400, 400_001, dtype=torch.float64)[:, None]
    log_joint = dist.StudentT(z.new_tensor(3.0)).log_prob(z) + dist.Normal(z, 2.0).log_prob(x)
    return model, None, x, (log_joint.logsumexp(0) + math.log(800 / 400_000)).sum()[None]


def linear_gaussian() -> Exact:
    model = anisotropic(4, 2)
    x, _ = draws_of(model, 1, seed=3)
    return model, WrongEncoder(model), x, model.log_evidence(x).detach()


def logistic() -> Exact:
    """Logistic regression on five points in two dimensions, by quadrature on a grid."""
    rows = torch.tensor([[1.0, 0.5], [2.0, -1.0], [-1.0, 1.5], [0.5, 2.0], [3.0, 1.0]], dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 2.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ rows.T).to_event(1), obs=x)

    x = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    axis = torch.linspace(-16, 16, 801, dtype=torch.float64)
    z = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
    log_joint = dist.Normal(0.0, 2.0).log_prob(z).sum(-1) + dist.Bernoulli(logits=z @ rows.T).log_prob(x[0]).sum(-1)
    return model, None, x, (log_joint.flatten().logsumexp(0) + 2 * math.log(32 / 800))[None]


def replicates(problem: Exact, evidence: pg.Bridge, number: int = REPLICATES) -> tuple[BridgeEstimate, Tensor]:
    """Estimates from datapoints that are alike, which differ by their noise alone."""
    model, guide, x, exact = problem
    estimate = pg.log_evidence(model, guide, x.expand(number, -1).clone(), evidence=evidence, referee=False)
    assert isinstance(estimate, BridgeEstimate)
    return estimate, estimate.value - exact


def long_tails() -> Exact:
    """No counts in 8 Poissons whose rates have Gamma(1/2) priors: log rates have long tails to the left."""

    def model(x: Tensor) -> None:
        half = x.new_full((x.shape[1],), 0.5)
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(half, half).to_event(1))
            pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)

    x = torch.zeros(1, 8, dtype=torch.float64)
    return model, None, x, x.new_tensor([-0.5 * 8 * math.log(3.0)])  # E[exp(-rate)] = (1 + 1 / 0.5)^-0.5


PROBLEMS = (correlated_gaussian, gamma_in_log_space, heavy_tails, linear_gaussian, logistic)
# By default the Gaussian's draws decide the error; with few of them and short chains, their weights do.
SETTINGS = {
    "default": pg.Bridge(),
    "short chains": pg.Bridge(num_draws=64, num_chains=64, num_temperatures=2),
    "many chains": pg.Bridge(num_draws=128, num_chains=512, num_temperatures=4),
}


def check_stated_error(problem: Callable[[], Exact], evidence: pg.Bridge, number: int) -> str:
    estimate, errors = replicates(problem(), evidence, number)
    stated, spread = float(estimate.mcse.square().mean().sqrt()), float(errors.std())
    low, high = estimate.interval()
    covered = float(((low <= estimate.value - errors) & (estimate.value - errors <= high)).double().mean())
    assert 0.8 <= stated / spread <= 1.25
    assert abs(float(errors.mean())) < 4 * spread / math.sqrt(number)
    assert float(estimate.reliable.double().mean()) >= 0.95
    assert covered >= 0.93 - 2 * math.sqrt(0.93 * 0.07 / number)
    return f"spread {spread:.4f}, stated {stated:.4f}, ratio {stated / spread:.2f}, covered {covered:.3f}"


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.__name__)
def test_stated_error_is_the_spread_of_replicates(problem: Callable[[], Exact]) -> None:
    check_stated_error(problem, SETTINGS["default"], REPLICATES)


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.__name__)
def test_stated_error_of_other_settings(problem: Callable[[], Exact], settings: str) -> None:
    print(check_stated_error(problem, SETTINGS[settings], 1024))


def test_tails_that_no_draw_has_reached_are_not_trusted() -> None:
    """There the bridge is low by more than its error says, and so would be AIS of as many temperatures."""
    estimate, errors = replicates(long_tails(), pg.Bridge())
    assert float(errors.mean()) < -4 * float(errors.std()) / math.sqrt(REPLICATES)
    assert not estimate.reliable.any()


def test_ends_count_by_their_weights() -> None:
    """Draws of a law that is not the target's bias the bridge unless they are weighted."""
    drawn, ends, log_weights = gaussians(2.0)
    weighted, alike = bridged(drawn, ends, log_weights), bridged(drawn, ends, torch.zeros_like(ends))
    assert float(((weighted.value - 2.0) / weighted.mcse).abs().max()) < 4
    assert float(((alike.value - 2.0) / alike.mcse).abs().min()) > 5


def gaussians(shift: float, number: int = 2000) -> tuple[Tensor, Tensor, Tensor]:
    """Log ratios of N(shift, 1) times e^2 to N(0, 1.5^2): at draws of the latter, and at others that are weighted."""
    torch.manual_seed(3)
    target, start = dist.Normal(torch.tensor(shift).double(), 1.0), dist.Normal(torch.tensor(0.0).double(), 1.5)
    middle = dist.Normal(torch.tensor(0.7 * shift).double(), 1.2)
    drawn, ends = start.sample((number, 3)), middle.sample((number, 3))

    def ratio(z: Tensor) -> Tensor:
        return target.log_prob(z) - start.log_prob(z) + 2.0

    return ratio(drawn), ratio(ends), target.log_prob(ends) - middle.log_prob(ends)


def test_it_is_the_fixed_point_of_meng_and_wong() -> None:
    drawn, ends, log_weights = gaussians(2.0)
    found = bridged(drawn, ends, log_weights)
    assert float(((found.value - 2.0) / found.mcse).abs().max()) < 4
    weights, ess = torch.softmax(log_weights, 0), found.ess
    first, second = len(drawn) / (len(drawn) + ess), ess / (len(drawn) + ess)
    value = torch.zeros(3).double().exp()
    for _ in range(1000):
        upper = (drawn.exp() / (second * drawn.exp() + first * value)).mean(0)
        lower = (weights / (second * ends.exp() + first * value)).sum(0)
        value = upper / lower
    torch.testing.assert_close(found.value, value.log(), atol=1e-9, rtol=0)


def test_draws_outside_of_the_support() -> None:
    """They count as zeros. Without any inside, log p(x) is -infinity, and its error is unknown."""
    drawn, ends, log_weights = gaussians(0.5)
    value = bridged(drawn, ends, log_weights).value
    half = torch.cat([drawn, torch.full_like(drawn, -torch.inf)])
    assert float((bridged(half, ends, log_weights).value - (value - math.log(2))).abs().max()) < 0.02
    nothing = bridged(torch.full_like(drawn, -torch.inf), ends, log_weights)
    assert (nothing.value == -torch.inf).all() and nothing.mcse.isnan().all()
    lost = bridged(drawn, ends, torch.full_like(ends, -torch.inf))
    assert (lost.value == -torch.inf).all() and lost.mcse.isnan().all()


def test_one_chain_with_all_the_weight_gives_no_estimate() -> None:
    """Its log ratio may be anything, in single precision far above log p(x) too."""
    drawn, ends, log_weights = gaussians(0.5)
    log_weights = torch.where(torch.arange(len(ends))[:, None] == 0, 0.0, -2000.0).double().expand_as(ends)
    nothing = bridged(drawn, ends, log_weights)
    assert (nothing.value == -torch.inf).all() and nothing.mcse.isnan().all()


def test_exact_evidence_of_many_datapoints_and_of_ragged_sequences() -> None:
    model = anisotropic(5, 3)
    x, _ = draws_of(model, 100, seed=1)
    estimate = pg.log_evidence(model, WrongEncoder(model), x, evidence=pg.Bridge())
    scores = (estimate.value - model.log_evidence(x).detach()) / estimate.mcse
    assert float(scores.abs().max()) < 4.5
    lengths, walk = torch.tensor([1, 3, 4, 2]), RaggedWalk()
    with seeded(3, "sequences"):
        sequences = torch.randn(4, 4, 1).double()
    estimate = pg.log_evidence(walk, None, (sequences, lengths), evidence=pg.Bridge())
    scores = (estimate.value - walk.log_evidence(sequences, lengths)) / estimate.mcse
    assert float(scores.abs().max()) < 4


class OneMode(nn.Module):
    """A guide for `parabola` at the positive root."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-1.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.clamp(min=0.1).sqrt(), self.log_scale.exp()))


def test_a_mode_that_other_starts_find_takes_the_trust_away() -> None:
    """Of two modes the bridge has one, and is low by log 2; the ladder's referee tells of the other."""
    x = torch.linspace(5, 9, 16, dtype=torch.float64)
    estimate = pg.log_evidence(parabola, OneMode(), x, evidence=pg.Bridge())
    low = parabola_evidence(x) - estimate.value
    assert float((low - math.log(2)).abs().max()) < 0.1
    assert not estimate.reliable.any()
    options = {"refinement": BRIEF, "num_particles": 50, "progress": False}
    ledger = pg.decompose(parabola, OneMode(), x, evidence=pg.Bridge(), **options)
    assert not ledger.per_datapoint["log_evidence_reliable"].any()
    assert "other starts raise it at 16 of 16 examined datapoints" in str(ledger.diagnose())


def test_batches_and_seeds() -> None:
    model = anisotropic(5, 3)
    x, _ = draws_of(model, 100, seed=1)
    quick = pg.Bridge(num_draws=64, num_chains=16, num_temperatures=2)
    small, large, other = (
        pg.log_evidence(model, WrongEncoder(model), x, evidence=quick, batch_size=size, seed=seed)
        for size, seed in ((64, 0), (128, 0), (64, 1))
    )
    torch.testing.assert_close(small.value, large.value)
    assert not torch.equal(small.value, other.value)


@pytest.fixture(scope="module")
def ledger() -> pg.GapLedger:
    model = anisotropic(4, 2)
    return pg.decompose(
        model,
        WrongEncoder(model),
        draws_of(model, 40, seed=3)[0],
        evidence=pg.Bridge(),
        refinement=pg.Refinement(num_steps=100),
        certificate=pg.Certificate(8, 4, 2),
        num_particles=200,
        progress=False,
    )


def test_a_ledger_calls_it_an_estimate_and_no_bound(ledger: pg.GapLedger) -> None:
    """Nor is the inference gap then bounded by it."""
    model, data, table = anisotropic(4, 2), ledger.per_datapoint, str(ledger.table("full"))
    error = data["log_evidence"].values - model.log_evidence(draws_of(model, 40, seed=3)[0]).detach().numpy()
    assert np.abs(error / data["log_evidence_mcse"].values).max() < 4.5
    assert (data["log_evidence_low"] < data["log_evidence"]).all()
    assert data["log_evidence_reliable"].all()
    summary = ledger.summary()
    assert summary.loc["log_evidence", "direction"] == "estimate of log p(x) (either way)"
    assert summary.loc["inference_gap", "direction"] == "estimate (either way)"
    assert summary.loc["amortization_gap", "direction"] == "lower bound of the gap"
    assert re.search("^log p\\(x\\) .* estimate of log p\\(x\\) \\(either way\\)  bridge sampling", table, re.MULTILINE)
    assert "log p(x) by bridge sampling, an estimate and not a bound" in table
    assert "estimate (either way): bridge sampling" in str(ledger)
    assert not re.search("lower bound[^.;]*bridge", f"{table}{ledger}")
    back = pg.GapLedger.from_datatree(ledger.to_datatree())
    assert (
        str(back) == str(ledger) and str(back.table("full")) == table and str(back.diagnose()) == str(ledger.diagnose())
    )
    pg.plot_ledger(back)


def test_what_cannot_be_trusted_is_a_caution() -> None:
    model = anisotropic(4, 2)
    problem = pg.Problem.of(model, WrongEncoder(model), draws_of(model, 8)[0], None)
    measurement = pg.Bridge().prepare(problem, Run())
    columns = {"log_evidence": np.zeros(20), "log_evidence_reliable": np.arange(20) > 2}
    (caution,) = measurement.cautions(columns)
    assert caution.startswith("log p(x), and the gaps measured from it, cannot be trusted for 3 of 20 datapoints")
    assert measurement.cautions({**columns, "log_evidence_reliable": np.arange(20) > 1}) == []


def test_a_recipe_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bridge_pair.py").write_text(
        "from tests.references import WrongEncoder, anisotropic, draws_of\n"
        "class Data:\n"
        "    test = draws_of(anisotropic(4, 1), 5)[0]\n"
        "class Pair:\n"
        "    model, guide = anisotropic(4, 1), WrongEncoder(anisotropic(4, 1))\n"
    )
    Path("recipe.yml").write_text(
        "data: bridge_pair.Data\npair: bridge_pair.Pair\ntraining: null\nnum_particles: 50\n"
        "refinement: {num_steps: 5}\nevidence: {class_path: pyrogaps.Bridge, init_args: {num_draws: 64}}\n"
    )
    assert main(["recipe.yml", "--out", "run", "--quiet"]) == 0
    assert "bridge sampling" in capsys.readouterr().out.splitlines()[2]
    assert main(["recipe.yml", "--out", "other", "--quiet", "--evidence.num_chains", "8"]) == 2
    assert "evidence.init_args.num_chains: must be a whole number" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["num_draws", "num_chains", "num_temperatures", "num_leapfrog"])
def test_settings_out_of_range(name: str) -> None:
    with pytest.raises(pg.InputError, match=f"evidence.{name}"):
        pg.Bridge(**{name: 0})
