"""`log_evidence_reliable` of every evidence: exact, judged by its evidence, not examined; and models that are exact."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.density.draws import Posterior
from pyrogaps.evidence.reliability import UNEXAMINED
from pyrogaps.log_weights import Estimate, log_mean_exp_estimate
from pyrogaps.refine import Refiner
from pyrogaps.report import page_of
from pyrogaps.report.columns import columns_of, flags_of
from pyrogaps.run import Run
from pyrogaps.streams import Chunk
from tests.references import STANDARD_ERRORS, WrongEncoder, anisotropic, draws_of
from tests.test_extensions import Quadrature

MODEL = anisotropic(4, 1)
X = draws_of(MODEL, 20)[0]
QUICK: dict[str, Any] = {"refinement": pg.Refinement(num_steps=60), "num_particles": 200, "progress": False}


@dataclass(frozen=True)
class Noisy(pg.Evidence):
    """The exact log p(x) with a stated error, which is judged at every second datapoint, or nowhere."""

    judged: bool = False

    def prepare(self, problem: pg.Problem, run: Run, refine: Refiner | None = None) -> "NoisyMeasurement":
        return NoisyMeasurement(self, problem, run)


@dataclass(frozen=True)
class NoisyMeasurement(pg.Measurement):
    evidence: Noisy

    def measure(self, chunk: Chunk, refined: Posterior | None = None) -> pg.Measured:
        value = MODEL.log_evidence(X[chunk.indices]).detach()
        columns = {"log_evidence": value, "log_evidence_mcse": torch.full_like(value, 0.01)}
        if self.evidence.judged:
            columns["log_evidence_reliable"] = chunk.indices % 2 == 0
        return pg.Measured(columns)


def measured(evidence: pg.Evidence, **options: Any) -> pg.GapLedger:
    return pg.decompose(MODEL, WrongEncoder(MODEL), X, evidence=evidence, **{**QUICK, **options})


@pytest.fixture(scope="module")
def exact() -> pg.GapLedger:
    return measured(Quadrature())


@pytest.fixture(scope="module")
def unexamined() -> pg.GapLedger:
    return measured(Noisy())


# An exact evidence


def test_an_exact_evidence_is_reliable_and_the_code_of_the_pages_runs(exact: pg.GapLedger, tmp_path: Path) -> None:
    data = exact.per_datapoint
    assert data.log_evidence_reliable.dtype == bool and bool(data.log_evidence_reliable.all())
    assert "log_evidence_reliable" in data.coords
    trusted = exact.sel(data.log_evidence_reliable.values)
    assert trusted.per_datapoint.sizes["datapoint"] == len(X) and "reliable" not in str(trusted)
    assert not any(exact.worst(3)["flags"].str.contains("log p"))
    assert exact.diagnose().warnings == ("quadrature was asked for",)
    assert exact.diagnose().dominant == "amortization_gap"
    comparison = pg.compare(exact, trusted)
    assert (comparison.differences["mean"] == 0).all()
    exact.report(tmp_path / "gaps.html", X)
    assert {flag.id for flag in flags_of(exact)} & {"unreliable", "unexamined"} == set()
    estimate = pg.log_evidence(MODEL, WrongEncoder(MODEL), X, evidence=Quadrature())
    assert estimate.examined and bool(estimate.reliable.all()) and repr(estimate).endswith("; exact; 20 reliable)")
    low, high = estimate.interval()
    assert torch.equal(low, estimate.value) and torch.equal(high, estimate.value)


def test_gaps_follow_the_direction_of_an_exact_log_evidence(exact: pg.GapLedger, unexamined: pg.GapLedger) -> None:
    """L[q] is unbiased, and L[q*] too low."""
    names = ["inference_gap", "approximation_gap", "amortization_gap"]
    directions = [str(exact.gaps["direction"].sel(gap=name).item()) for name in names]
    assert directions == ["unbiased", "upper bound of the gap", "lower bound of the gap"]
    directions = [str(unexamined.gaps["direction"].sel(gap=name).item()) for name in names]
    assert directions == ["lower bound of the gap", "estimate (either way)", "lower bound of the gap"]
    for ledger, direction in ((exact, "upper bound of the gap"), (unexamined, "estimate (either way)")):
        assert ledger.provenance["quantities"]["family_approximation_gap"]["direction"] == direction
    # The directions hold: of one dimension the family is that of the posterior, and its true gap is 0.
    data, truth = exact.per_datapoint, MODEL.log_evidence(X).detach().numpy()
    assert float(exact.gaps["mean"].sel(gap="approximation_gap")) > -STANDARD_ERRORS * float(
        exact.gaps["mcse"].sel(gap="approximation_gap")
    )
    np.testing.assert_allclose(data["log_evidence"], truth, atol=1e-6)


def test_an_exact_value_that_is_not_finite_is_not_reliable() -> None:
    infinite = torch.tensor([-1.0, -math.inf, math.nan])
    parts = [pg.Measured({"log_evidence": infinite, "log_evidence_mcse": torch.zeros(3)})]
    measurement = Quadrature().prepare(pg.Problem.of(MODEL, None, X), Run(0))
    assert measurement.estimate(parts).reliable.tolist() == [True, False, False]


# An evidence that says nothing of its reliability


def test_what_was_not_examined_is_called_that(unexamined: pg.GapLedger) -> None:
    data = unexamined.per_datapoint
    assert not bool(data.log_evidence_reliable.any())
    for text in (str(unexamined), unexamined._repr_html_(), unexamined.to_markdown()):
        assert "reliability of log p(x) was not examined" in text and "is reliable for" not in text
        assert "log p(x) not examined" in text and "log p(x) reliable" not in text
    assert f"Note: {UNEXAMINED}." in str(unexamined.diagnose())
    assert unexamined.diagnose().dominant == "amortization_gap" and not unexamined.diagnose().doubts
    assert {*unexamined.worst(3)["flags"]} == {"log p(x) not examined"}
    (flag,) = [flag for flag in flags_of(unexamined) if "log p(x)" in flag.label]
    assert flag.id == "unexamined" and not flag.serious and flag.holds.all()
    assert "log p(x) unreliable" not in page_of(unexamined)
    part = unexamined.sel([3, 4])
    for text in (str(part), str(part.table("full"))):
        assert text.count("was not examined") == 1 and "cannot be trusted" not in text
    back = pg.GapLedger.from_datatree(unexamined.to_datatree())
    assert str(back) == str(unexamined) and str(back.diagnose()) == str(unexamined.diagnose())
    estimate = pg.log_evidence(MODEL, None, X, evidence=Noisy())
    assert not estimate.examined and repr(estimate).endswith("; reliability not examined)")


def test_a_ledger_without_the_column_is_not_examined(unexamined: pg.GapLedger) -> None:
    """As an earlier version wrote it."""
    older = replace(unexamined, per_datapoint=unexamined.per_datapoint.drop_vars("log_evidence_reliable"))
    assert str(older.diagnose()) == str(unexamined.diagnose())
    assert older.worst(3).equals(unexamined.worst(3))
    assert [flag.id for flag in flags_of(older)] == [flag.id for flag in flags_of(unexamined)]


def test_an_evidence_that_judges_itself_is_believed() -> None:
    ledger = measured(Noisy(judged=True))
    even = np.arange(len(X)) % 2 == 0
    assert (ledger.per_datapoint.log_evidence_reliable.values == even).all()
    assert f"log p(x) is reliable for 10 of {len(X)} datapoints" in str(ledger.table("full"))
    assert f"log p(x) reliable 10/{len(X)}" in str(ledger)
    assert ledger.diagnose().verdict.startswith("No verdict: log p(x) is reliable for only 10 of 20 datapoints.")
    estimate = pg.log_evidence(MODEL, None, X, evidence=Noisy(judged=True))
    assert estimate.examined and (estimate.reliable.numpy() == even).all()


def test_modes_that_other_starts_find_are_doubted_where_nothing_was_examined() -> None:
    """Two modes, of which AIS from the guide's reaches one."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 3.0))
            pyro.sample("x", dist.Normal(z**2 / 4, 0.1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(2 * x.sqrt(), 0.1))

    x = torch.linspace(3.0, 5.0, 8)
    ais = pg.AIS(num_chains=4, num_temperatures=10, num_pilot_temperatures=5)
    ledger = pg.decompose(model, guide, x, evidence=ais, **QUICK)
    assert bool(ledger.per_datapoint["log_evidence_doubted"].all())
    assert "log p(x) is too low: other starts raise it at 8 of 8" in str(ledger.diagnose())
    assert {flag.id for flag in flags_of(ledger)} >= {"modes", "unexamined"}


def test_the_monitor_says_so_too() -> None:
    options: dict[str, Any] = {"evidence": Noisy(), "refinement": pg.Refinement(num_steps=4), "num_particles": 20}
    monitor = pg.GapMonitor(MODEL, WrongEncoder(MODEL), X, every=1, datapoints=None, **options)
    monitor(1)
    assert "log p(x) not examined" in str(monitor) and "unreliable" not in str(monitor)
    assert "reliable" not in monitor.history
    assert not monitor.records[0].doubtful or monitor.records[0].cautions or "not converged" in str(monitor)


def test_weights_too_few_to_judge_are_not_examined() -> None:
    """Fewer than 500 for which nothing vouches; a mean, and weights that are vouched for, are judged."""
    weights = torch.randn(600, 3, generator=torch.Generator().manual_seed(0)) * 0.1
    few, many = (log_mean_exp_estimate(weights[:number]) for number in (499, 600))
    assert (few.examined, many.examined) == (False, True) and not few.reliable.any()
    assert log_mean_exp_estimate(weights[:20], vouched=torch.zeros(3, dtype=torch.bool)).examined
    assert "reliability not examined" in repr(few) and "reliable)" in repr(many)
    assert not Estimate(torch.zeros(2), torch.zeros(2), "lower bound").examined


def test_chains_that_can_be_judged_are() -> None:
    """AIS of 500 chains or more says where its weights can be trusted, as `log_evidence` does."""
    settings = pg.AIS(num_chains=512, num_temperatures=4, num_pilot_temperatures=3)
    ledger = measured(settings, referee=False)
    estimate = pg.log_evidence(MODEL, WrongEncoder(MODEL), X, evidence=settings, referee=False)
    assert (ledger.per_datapoint.log_evidence_reliable.values == estimate.reliable.numpy()).all()
    assert "log p(x) reliable 20/20" in str(ledger)
    rough = pg.AIS(num_chains=500, num_temperatures=1, num_leapfrog=1, initial="prior", num_pilot_temperatures=2)
    poor = measured(rough, referee=False)
    assert not poor.per_datapoint.log_evidence_reliable.values.all()
    assert any("cannot be trusted for" in line and "of AIS" in line for line in poor.diagnose().warnings)


# Models whose latents are all discrete

WEIGHTS, LEVELS = (0.2, 0.3, 0.5), (-2.0, 0.0, 3.0)
DATA = torch.linspace(-4, 4, 9)


def discrete(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor(WEIGHTS)))
        pyro.sample("x", dist.Normal(torch.tensor(LEVELS)[k], 0.5), obs=x)


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=self.logits))


def empty(x: Tensor) -> None:
    pass


@pytest.mark.parametrize("guide", [Draws(), empty], ids=["drawn", "summed out"])
@pytest.mark.parametrize("evidence", [None, pg.AIS(), pg.Bridge()], ids=["ladder", "AIS", "bridge"])
def test_enumeration_is_exact_and_nothing_else_is_said(guide: Any, evidence: pg.Evidence | None) -> None:
    parts = [math.log(w) + dist.Normal(m, 0.5).log_prob(DATA) for w, m in zip(WEIGHTS, LEVELS, strict=True)]
    truth = torch.stack(parts).logsumexp(0)
    ledger = pg.decompose(discrete, guide, DATA, evidence=evidence, certificate=None, **QUICK)
    np.testing.assert_allclose(ledger.per_datapoint["log_evidence"], truth, rtol=1e-5)
    assert bool(ledger.per_datapoint.log_evidence_reliable.all())
    for text in (str(ledger), page_of(ledger), ledger._repr_html_()):
        assert "enumeration" in text and "all latents discrete" in text
        for word in (
            "AIS",
            "lower bound of log p(x): importance sampling",
            "modes",
            "k-hat",
            "latent dimension",
            "tol",
        ):
            assert word not in text.split("<script")[0].split("Provenance")[0], word
    row = ledger.summary().loc["log_evidence"]
    assert (row["direction"], row["estimator"]) == ("exact", "enumeration")
    assert "log_evidence_upper" not in ledger.summary().index
    assert "khat" not in {column.id for column in columns_of(ledger)}
    assert str(ledger.gaps["direction"].sel(gap="inference_gap").item()) == "unbiased"
    part = ledger.sel([1, 2])
    assert "modes" not in str(part) and "k-hat" not in str(part)
    estimate = pg.log_evidence(discrete, None, DATA, evidence=evidence)
    assert estimate.direction == "exact" and repr(estimate).endswith("; exact; 9 reliable)")
    torch.testing.assert_close(estimate.value.to(truth), truth)


def test_two_exact_models_are_compared_without_an_interval() -> None:
    def other(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor(WEIGHTS)))
            pyro.sample("x", dist.Normal(torch.tensor(LEVELS)[k], 1.5), obs=x)

    comparison = pg.compare(*(pg.decompose(model, empty, DATA, **QUICK) for model in (discrete, other)))
    row = comparison.differences.sel(other="b", quantity="log_evidence")
    assert float(row["low"]) == float(row["high"]) == float(row["mean"])
    assert float(row["mean"]) == pytest.approx(float(row["reference"] - row["value"]))
    assert str(row["verdict"].item()) != "not trusted"


def test_a_certificate_of_what_is_exact_is_refused() -> None:
    with pytest.raises(pg.InputError, match=r"certificate: all latents are discrete.*Leave certificate out"):
        pg.decompose(discrete, empty, DATA, certificate=pg.Certificate(4, 4), **QUICK)
