"""Datapoints without finite bounds are named, with the site that is to blame, and left out of the gaps alone."""

import math
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyrogaps as pg

mpl.use("Agg")
SMALL: dict[str, Any] = {
    "refinement": pg.Refinement(num_steps=20),
    "evidence": pg.AIS(num_chains=4, num_temperatures=5),
    "num_particles": 100,
    "progress": False,
}


class Guide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(1, 2)
        nn.init.zeros_(self.net.weight)
        nn.init.zeros_(self.net.bias)

    def forward(self, x: Tensor) -> None:
        loc, log_scale = self.net(x[:, None]).T
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))


def with_impossible_data(x: Tensor) -> None:
    """A Beta(exp(z) + 1, 1) has density zero at x = 0."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Beta(z.exp() + 1, 1.0), obs=x)


def with_impossible_latents(x: Tensor) -> None:
    """log p(x) is finite, but a guide that draws z below -1 has an ELBO of -infinity."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("cut", torch.where(z > -1, torch.zeros(()), torch.full((), -torch.inf)) - 0.5 * (x - z) ** 2)


def test_one_impossible_datapoint_is_named_and_the_others_are_measured() -> None:
    ledger = pg.decompose(with_impossible_data, Guide(), torch.tensor([0.5, 0.0, 0.9]), **SMALL)
    summary, others = ledger.summary(), ledger.per_datapoint.isel(datapoint=[0, 2])
    for name in ("log_evidence", "elbo"):
        assert summary["mean"][name] == -math.inf
        assert summary["finite_mean"][name] == pytest.approx(float(others[name].mean()))
    for name in ("inference_gap", "approximation_gap", "amortization_gap"):
        assert float(ledger.gaps["mean"].sel(gap=name)) == pytest.approx(float(others[name].mean()))
    assert ledger.provenance["infinite"][0]["sites"] == ["x"]
    line = next(line for line in str(ledger).splitlines() if line.startswith("Warning"))
    assert "1 of 3 datapoints" in line
    assert "datapoint 1: log p(x), L[q*], L[q] = -inf, site 'x' has density 0" in line
    assert "over the 2 with finite bounds" in str(ledger)
    assert "nan" not in str(ledger)
    diagnosis = str(ledger.diagnose())
    assert "as good as" not in diagnosis
    assert "datapoint 1" in diagnosis
    back = pg.GapLedger.from_datatree(ledger.to_datatree())
    assert str(back) == str(ledger)
    for plot in (pg.plot_gaps, pg.plot_datapoints, pg.plot_ledger, pg.plot_traces):
        plot(ledger)


class SharedGuide(Guide):
    def forward(self, x: Tensor) -> None:
        pyro.sample("m", dist.Normal(self.net.bias[0], 0.3))
        super().forward(x)


def test_an_impossible_datapoint_that_shares_latents() -> None:
    """log p(x) of the data set is -infinity, and so its global gap is none; the others have their gaps."""

    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 0.3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Beta(z.exp() + 1, 1.0), obs=x)

    few = {"shared": pg.Shared(num_draws=2), "num_particles": 8, "referee": False}
    ledger = pg.decompose(model, SharedGuide(), torch.tensor([0.5, 0.0, 0.9]), **SMALL | few)
    assert np.isfinite(ledger.gaps["mean"]).all() and "global_gap" not in ledger.gaps["gap"]
    text = str(ledger)
    assert "The global gap is not measured: log p(x) of the data set is -infinity" in text
    assert "1 of 3 datapoints" in text and "nan" not in text
    assert "datapoint 1" in str(ledger.diagnose())


def test_the_ladder_names_an_impossible_datapoint_and_measures_the_others() -> None:
    estimate = pg.log_evidence(with_impossible_data, Guide(), torch.tensor([0.5, 0.0, 0.9]))
    assert estimate.value[1] == -math.inf
    assert torch.isfinite(estimate.value[[0, 2]]).all()
    assert not estimate.reliable[1]


def test_a_guide_that_draws_the_impossible() -> None:
    ledger = pg.decompose(with_impossible_latents, Guide(), torch.tensor([0.5, 0.9]), **SMALL)
    assert np.isfinite(ledger.per_datapoint["log_evidence"]).all()
    assert (ledger.per_datapoint["inference_gap"] == math.inf).all()
    assert "the guide draws where site 'cut' has density 0" in str(ledger)
    assert "there are no gaps" in str(ledger)
    assert ledger.diagnose().dominant is None
    assert "not measured" in str(ledger.diagnose())


def test_naming_the_impossible_leaves_the_caller_s_random_state() -> None:
    guide, before = Guide(), torch.get_rng_state()
    pg.decompose(with_impossible_data, guide, torch.tensor([0.5, 0.0]), **SMALL)
    assert torch.equal(before, torch.get_rng_state())


def test_impossible_training_data_are_named() -> None:
    split = pg.Split(torch.tensor([0.4, 0.5, 0.0, 0.6, 0.9]), pg.Retraining(max_rounds=1, num_restarts=0))
    with pytest.raises(pg.InputError, match="training datapoint 2 is -inf"):
        pg.decompose(with_impossible_data, Guide(), torch.tensor([0.5, 0.9]), split=split, **SMALL)


def test_a_k_hat_that_is_not_known_is_no_nan() -> None:
    """Few draws have none, and equal weights neither."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    ledger = pg.decompose(model, Guide(), torch.tensor([0.5, 0.9]), **SMALL | {"num_particles": 16})
    line = next(line for line in str(ledger.table("full")).splitlines() if "k-hat" in line)
    assert "amortized guide k-hat -, effective sample size" in line and "nan" not in line


@dataclass(frozen=True)
class Broken(pg.Evidence):
    """log p(x) that is NaN for the second datapoint."""

    def prepare(self, problem: pg.Problem, run: Any, refine: Any = None) -> pg.Measurement:
        return BrokenMeasurement(self, problem, run)


@dataclass(frozen=True)
class BrokenMeasurement(pg.Measurement):
    def measure(self, chunk: Any, refined: Any = None) -> pg.Measured:
        return pg.Measured({"log_evidence": torch.tensor([0.0, math.nan]), "log_evidence_mcse": torch.zeros(2)})


def test_nan_is_an_error() -> None:
    with pytest.raises(pg.InputError, match=r"datapoint 1: log p\(x\) is NaN"):
        pg.decompose(with_impossible_data, Guide(), torch.tensor([0.5, 0.9]), **SMALL | {"evidence": Broken()})
