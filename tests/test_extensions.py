"""What a user adds in one place: an evidence of their own, and a gap of their own."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure
from torch import Tensor

import pyrogaps as pg
from pyrogaps.density.draws import Posterior
from pyrogaps.eval import main
from pyrogaps.gaps import Columns, Values, values_of
from pyrogaps.refine import Refiner
from pyrogaps.run import Run
from pyrogaps.streams import Chunk
from tests.pages import ROOT, blocks
from tests.references import WrongEncoder, anisotropic, draws_of

OPTIONS: dict[str, Any] = {"refinement": pg.Refinement(num_steps=60), "num_particles": 200, "progress": False}


@dataclass(frozen=True)
class Quadrature(pg.Evidence):
    """log p(x) of one latent dimension by the trapezoidal rule."""

    width: float = 12.0
    num_points: int = 4001

    def prepare(self, problem: pg.Problem, run: Run, refine: Refiner | None = None) -> "QuadratureMeasurement":
        if problem.dim != 1:
            raise pg.InputError(f"evidence: quadrature takes one latent dimension, and here are {problem.dim}")
        return QuadratureMeasurement(self, problem, run)


@dataclass(frozen=True)
class QuadratureMeasurement(pg.Measurement):
    evidence: Quadrature
    direction = "exact"

    def measure(self, chunk: Chunk, refined: Posterior | None = None) -> pg.Measured:
        z = torch.linspace(-self.evidence.width, self.evidence.width, self.evidence.num_points).to(
            self.problem.joint.dtype
        )
        with torch.no_grad():
            log_joint = self.problem.joint(z[:, None, None].expand(-1, len(chunk), 1), chunk.indices).double()
        value = log_joint.logsumexp(0) + math.log(2 * self.evidence.width / (self.evidence.num_points - 1))
        return pg.Measured({"log_evidence": value, "log_evidence_mcse": torch.zeros_like(value)})

    def notes(self, columns: Any) -> list[str]:
        return [f"log p(x) by quadrature at {self.evidence.num_points} points"]

    def cautions(self, columns: Any) -> list[str]:
        return ["quadrature was asked for"]


def pair(latent_dim: int = 1, number: int = 70) -> tuple[Any, Any, Tensor]:
    model = anisotropic(4, latent_dim)
    return model, WrongEncoder(model), draws_of(model, number)[0]


@pytest.fixture(scope="module")
def ledger() -> pg.GapLedger:
    return pg.decompose(*pair(), evidence=Quadrature(), certificate=pg.Certificate(8, 4), **OPTIONS)


def test_an_evidence_of_ones_own_is_measured_printed_drawn_saved_and_diagnosed(
    ledger: pg.GapLedger, tmp_path: Path
) -> None:
    model, _, x = pair()
    np.testing.assert_allclose(ledger.per_datapoint["log_evidence"], model.log_evidence(x).detach(), atol=1e-6)
    table = str(ledger)
    assert "exact: Quadrature" in table and "not examined" not in table
    assert "log p(x) by quadrature at 4001 points" in str(ledger.table("full"))
    assert "Warning: quadrature was asked for." in str(ledger.diagnose())
    pg.plot_ledger(ledger, Figure(figsize=(10, 10)))
    assert ledger.certificate is not None and float(ledger.certificate["lower_mcse"].max()) == 0.0
    ledger.to_datatree().to_netcdf(tmp_path / "ledger.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "ledger.nc", engine="h5netcdf") as tree:
        back = pg.GapLedger.from_datatree(tree.load())
    assert str(back) == table
    assert str(back.diagnose()) == str(ledger.diagnose())


def test_log_evidence_takes_it() -> None:
    model, guide, x = pair()
    estimate = pg.log_evidence(model, guide, x, evidence=Quadrature())
    torch.testing.assert_close(estimate.value, model.log_evidence(x).detach(), atol=1e-6, rtol=0)
    with pytest.raises(pg.InputError, match="quadrature takes one latent dimension, and here are 2"):
        pg.log_evidence(*pair(2), evidence=Quadrature())


def test_a_recipe_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    program = Path("linear.py")
    program.write_text(
        "from tests.references import WrongEncoder, anisotropic, draws_of\n"
        "class Data:\n"
        "    test = draws_of(anisotropic(4, 1), 5)[0]\n"
        "def model():\n"
        "    return anisotropic(4, 1)\n"
        "def guide():\n"
        "    return WrongEncoder(anisotropic(4, 1))\n"
        "class Pair:\n"
        "    model, guide = anisotropic(4, 1), WrongEncoder(anisotropic(4, 1))\n"
    )
    Path("recipe.yml").write_text(
        "data: linear.Data\npair: linear.Pair\ntraining: null\nnum_particles: 50\nrefinement: {num_steps: 5}\n"
        "evidence: {class_path: tests.test_extensions.Quadrature, init_args: {num_points: 2001}}\n"
    )
    assert main(["recipe.yml", "--out", "run", "--quiet"]) == 0
    assert "exact: Quadrature" in capsys.readouterr().out
    assert main(["recipe.yml", "--out", "other", "--quiet", "--evidence.num_points", "1.5"]) == 2
    assert "evidence.init_args.num_points: must be a whole number, got 1.5" in capsys.readouterr().err
    assert not Path("other").exists()


def _looseness(columns: Columns) -> Values:
    data = columns.per_datapoint
    return values_of(data, "iwae").minus(values_of(data, "elbo"))


LOOSENESS = pg.Term(
    "looseness",
    "looseness gap",
    "inference_gap",
    "IWAE - L[q]",
    "lower bound of the gap",
    _looseness,
    cause="one draw is not enough",
    remedy="take more draws",
    colour="#123456",
)


def test_a_gap_of_ones_own_is_one_term(tmp_path: Path) -> None:
    ledger = pg.decompose(*pair(), evidence=Quadrature(), terms=(*pg.TERMS, LOOSENESS), **OPTIONS)
    expected = ledger.per_datapoint["iwae"] - ledger.per_datapoint["elbo"]
    np.testing.assert_allclose(ledger.per_datapoint["looseness"], expected)
    row: pd.Series = ledger.summary().loc["looseness"]
    assert row["mean"] == pytest.approx(float(expected.mean()))
    row = next(line for line in str(ledger).splitlines() if line.startswith("└─ looseness gap"))
    assert row.endswith("one draw is not enough")
    assert "looseness gap" in str(ledger.diagnose()) and "take more draws" in str(ledger.diagnose())
    ledger.to_datatree().to_netcdf(tmp_path / "ledger.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "ledger.nc", engine="h5netcdf") as tree:
        back = pg.GapLedger.from_datatree(tree.load())
    assert str(back) == str(ledger)
    for source in (ledger, back, back.to_datatree()):
        axes = pg.plot_gaps(source, Figure().add_subplot())
        assert "looseness" in [label.get_text().strip() for label in axes.get_yticklabels()]


def test_children_of_every_term_of_a_ledger_sum_to_it(ledger: pg.GapLedger) -> None:
    for parent in set(ledger.gaps["parent"].values) - {""}:
        children = ledger.gaps["mean"].where(ledger.gaps["parent"] == parent, drop=True)
        assert float(children.sum()) == pytest.approx(float(ledger.gaps["mean"].sel(gap=parent)), abs=1e-9)


def test_where_nothing_is_amortized_no_one_network_is_blamed() -> None:
    """An autoguide, one datapoint, and the whole data set as one datapoint have an optimization gap."""
    from pyro.infer.autoguide import AutoNormal

    model, guide, x = pair()
    own = AutoNormal(model)
    own(x)
    quick = {**OPTIONS, "evidence": Quadrature()}
    for ledger in (pg.decompose(model, own, x, **quick), pg.decompose(model, guide, x[:1], **quick)):
        words = f"{ledger}\n{ledger.diagnose()}"
        assert "└─ optimization gap" in words
        assert "amortization" not in words and "network" not in words
        whole = ledger.gaps["mean"].sel(gap="inference_gap")
        parts = ledger.gaps["mean"].sel(gap=["approximation_gap", "guide_optimization_gap"])
        assert float(parts.sum()) == pytest.approx(float(whole), abs=1e-9)


def test_the_examples_of_the_page_on_extending_run() -> None:
    """All of them in one ledger, as they stand."""
    names: dict[str, Any] = {"__name__": "extend"}
    for block in blocks(ROOT / "docs/howto/extend.md", "python"):
        exec(block, names)
    options = {**OPTIONS, "families": {"Laplace": names["AutoLocalLaplace"]}, "terms": (*pg.TERMS, names["looseness"])}
    model, guide, x = pair()
    ledger = pg.decompose(model, guide, x, evidence=names["Quadrature"](), **options)
    np.testing.assert_allclose(ledger.per_datapoint["log_evidence"], model.log_evidence(x).detach(), atol=1e-5)
    assert ledger.families == ["own", "Laplace"]
    assert "looseness gap" in str(ledger)


def test_the_page_s_importance_sampling_is_right_in_unconstrained_space() -> None:
    """A Poisson count with a Gamma rate, whose log p(x) is a negative binomial's: the Jacobian is in the joint."""
    names: dict[str, Any] = {"__name__": "extend"}
    for block in blocks(ROOT / "docs/howto/extend.md", "python")[:2]:
        exec(block, names)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    x = torch.tensor([0.0, 1.0, 4.0])
    exact = dist.NegativeBinomial(2.0, torch.tensor(0.5)).log_prob(x).double()
    torch.testing.assert_close(
        pg.log_evidence(model, None, x, evidence=names["Quadrature"]()).value, exact, atol=1e-5, rtol=0
    )
    estimate = pg.log_evidence(model, None, x, evidence=names["FromNormal"]())
    assert float(estimate.mcse.max()) < 0.03
    assert bool(((estimate.value - exact).abs() <= 4 * estimate.mcse).all())


@dataclass(frozen=True)
class Mistaken(pg.Evidence):
    """Returns `RETURNED[kind]`."""

    kind: int

    def prepare(self, problem: pg.Problem, run: Run, refine: Refiner | None = None) -> "MistakenMeasurement":
        return MistakenMeasurement(self, problem, run)


@dataclass(frozen=True)
class MistakenMeasurement(pg.Measurement):
    def measure(self, chunk: Chunk, refined: Posterior | None = None) -> Any:
        return RETURNED[self.evidence.kind]


RETURNED = (
    torch.zeros(5),
    pg.Measured({"log_evidence": torch.zeros(5)}),
    pg.Measured({"log_evidence": torch.zeros(5), "log_evidence_mcse": torch.zeros(())}),
    pg.Measured({"log_evidence": torch.full((5,), -50.0), "log_evidence_mcse": torch.zeros(5)}),
)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (0, r"^evidence: measure of Mistaken returns a Tensor\. Return pyrogaps\.Measured"),
        (1, r"returns no column 'log_evidence_mcse'"),
        (2, r"returns 'log_evidence_mcse' of shape \(\) for 5 datapoints\. Return shape \(5,\)"),
    ],
)
def test_what_an_evidence_returns_is_checked(kind: int, said: str) -> None:
    model = anisotropic(3, 1)
    guide, x = WrongEncoder(model), draws_of(model, 5)[0]
    for measure in (pg.decompose, pg.log_evidence):
        options = OPTIONS if measure is pg.decompose else {}
        with pytest.raises(pg.InputError, match=said):
            measure(model, guide, x, evidence=Mistaken(kind), referee=False, **options)


def test_a_gap_beside_the_tree_is_not_ranked() -> None:
    """A gap that overlaps others would be the largest, and be taken for the cause."""
    words = {"estimator": "IWAE - L[q]", "direction": "lower bound of the gap", "cause": "a cause", "remedy": "help"}
    beside = pg.Term(id="beside", label="gap beside", parent=None, value=_looseness, **words)
    model = anisotropic(3, 1)
    guide, x = WrongEncoder(model), draws_of(model, 5)[0]
    terms = (*pg.TERMS, beside)
    ledger = pg.decompose(model, guide, x, referee=False, terms=terms, **OPTIONS)
    assert "gap beside" in str(ledger) and "gap beside" not in str(ledger.diagnose())


def test_a_negative_inference_gap_has_no_cause() -> None:
    """An evidence that calls itself exact, and is not."""
    model = anisotropic(3, 1)
    guide, x = WrongEncoder(model), draws_of(model, 5)[0]
    ledger = pg.decompose(model, guide, x, evidence=Mistaken(3), referee=False, **OPTIONS)
    diagnosis = ledger.diagnose()
    assert diagnosis.dominant is None and "negative, so log p(x) is measured too low" in diagnosis.verdict
    assert "Mostly" not in str(ledger) and "What usually helps" not in str(ledger)
