"""Ledgers of a hierarchy: local gaps given draws of the shared latents, and the global gap, in closed form."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyrogaps as pg
from tests.shared import hierarchies
from tests.shared.hierarchies import NOISE, Structured, X, auto_list, hierarchy

QUICK: dict[str, Any] = {"refinement": pg.Refinement(num_steps=30), "num_particles": 200, "progress": False}


@pytest.fixture(scope="module")
def ledger() -> pg.GapLedger:
    return pg.decompose(hierarchy, Structured(), X, progress=False, shared=pg.Shared(max_draws=1024))


def test_local_and_global_gaps_are_exact(ledger: pg.GapLedger) -> None:
    """The normal hierarchy, and the guide q(m) prod q(z_n | m)."""
    gaps, number = ledger.gaps, len(X)
    exact_local, exact_global = hierarchies.local_gap(0.1, 0.6), hierarchies.global_gap(0.5, 0.22)
    shared = ledger.shared
    assert shared is not None
    # Per datapoint, by the errors of the draws' means and of the values themselves.
    local = gaps.sel(gap="inference_gap")
    assert float(local["mcse"]) < 0.05
    assert abs(float(local["mean"]) - exact_local) < 4 * float(local["mcse"])
    per_datapoint = ledger.per_datapoint
    assert np.all(np.abs(per_datapoint.inference_gap - exact_local) < 5 * per_datapoint.inference_gap_mcse)
    # Of the data set.
    assert float(shared.global_gap_mcse) < 0.06
    assert abs(float(shared.global_gap) - exact_global) < 4 * float(shared.global_gap_mcse)
    low, high = float(shared.global_gap_lower), float(shared.global_gap_upper)
    assert shared.attrs["bounded"] and high - low <= 0.1
    root = gaps.sel(gap="data_set_gap")
    exact = exact_global + number * exact_local
    assert abs(float(root["total"]) - exact) < 4 * number * float(root["mcse"])
    for name, truth in (("inference_gap", number * exact_local), ("global_gap", exact_global), ("data_set_gap", exact)):
        row = gaps.sel(gap=name)
        width = float(row["total_high"] - row["total_low"])
        assert 0 < width < 1
        assert float(row["total_low"]) - width / 2 < truth < float(row["total_high"]) + width / 2
    family = gaps.sel(gap="approximation_gap")  # Normals hold the posteriors given m
    assert abs(float(family["mean"])) < 4 * float(family["mcse"]) + 0.002


def test_children_sum_to_their_parents(ledger: pg.GapLedger) -> None:
    means = ledger.gaps["mean"].to_series()
    parents = ledger.gaps["parent"].to_series()
    for name in ("data_set_gap", "inference_gap"):
        np.testing.assert_allclose(means[parents == name].sum(), means[name], atol=1e-9)
    assert parents["inference_gap"] == parents["global_gap"] == "data_set_gap"
    total = ledger.gaps["total"].to_series()
    np.testing.assert_allclose(total, len(X) * means)


def test_errors_are_those_of_the_draws(ledger: pg.GapLedger) -> None:
    """Never of the datapoints in quadrature: all have the same draws of m."""
    shared, summary = ledger.shared, ledger.summary()
    assert shared is not None
    for name in ("log_evidence", "elbo"):
        draws = shared[name].values
        assert draws.shape == (8,)
        np.testing.assert_allclose(summary["mcse"][name], draws.std(ddof=1) / 8**0.5)
        np.testing.assert_allclose(summary["mean"][name], draws.mean(), atol=1e-9)
        assert summary["total"][name] == pytest.approx(len(X) * summary["mean"][name])


def test_printed_with_totals_and_what_it_is_of(ledger: pg.GapLedger) -> None:
    text, full = str(ledger), str(ledger.table("full"))
    assert "given 8 draws of m; totals of the data set" in full.splitlines()[0]
    assert "  total  " in full.splitlines()[2] and "total between" in full
    assert "over datapoints and 8 draws of m" in text.splitlines()[0]
    assert "data set [95% interval]" in text.splitlines()[2]
    for printed in (text, full):
        assert "├─ global gap" in printed and "└─ local gap" in printed and "   ├─ approximation gap" in printed
        assert "log p(x|theta)" in printed
        assert "Gaps per datapoint are given 'm': means over 8 draws" in printed
    row = next(line for line in text.splitlines() if line.startswith("├─ global gap"))
    total, low, high = (float(word) for word in re.findall(r"([\d.]+) \[([\d.]+), ([\d.]+)\]", row)[0])
    gap = ledger.gaps.sel(gap="global_gap")
    np.testing.assert_allclose([total, low, high], [gap["total"], gap["total_low"], gap["total_high"]], atol=0.00501)
    diagnosis = ledger.diagnose()
    assert {finding.gap for finding in diagnosis.findings} >= {"global_gap", "approximation_gap"}
    assert "Split" not in str(diagnosis)
    pg.plot_gaps(ledger)
    pg.plot_datapoints(ledger)
    assert str(pg.GapLedger.from_datatree(ledger.to_datatree())) == text


def test_an_autoguide_with_the_same_numbers_from_a_cache(tmp_path: Path) -> None:
    """Twice, the second time from the draws' finished chunks."""
    guide = auto_list()
    guide(X)
    small = {**QUICK, "shared": pg.Shared(num_draws=2, max_draws=128), "referee": False}
    first = pg.decompose(hierarchy, guide, X, cache=tmp_path, **small)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draw-0", "draw-1"]
    again = pg.decompose(hierarchy, guide, X, cache=tmp_path, **small)
    assert first.per_datapoint.identical(again.per_datapoint)
    assert first.gaps.identical(again.gaps)
    assert "guide_optimization_gap" in first.gaps["gap"]  # nothing is amortised


def test_other_families_beside_the_own() -> None:
    small = {**QUICK, "shared": pg.Shared(num_draws=2, max_draws=128), "referee": False}
    ledger = pg.decompose(hierarchy, Structured(), X, families={"normal": AutoNormal}, **small)
    row = ledger.summary().loc["approximation_gap[normal]"]
    assert abs(row["mean"]) < 0.05 and np.isfinite(row["mcse"])


@pytest.mark.parametrize("option", [{"certificate": pg.Certificate()}, {"split": pg.Split(X)}])
def test_what_needs_other_data_is_refused(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(pg.InputError, match=f"^{name}: not available where datapoints share latents .'m'.. Leave"):
        pg.decompose(hierarchy, Structured(), X, **option, **QUICK)


def test_the_elbo_of_the_data_set_is_pyros(ledger: pg.GapLedger) -> None:
    line = next(line for line in str(ledger).splitlines() if "The data set: log p(x) between" in line)
    elbo, error = (float(word) for word in re.findall(r"ELBO (-[\d.]+) \(± ([\d.]+)\) nats", line)[0])
    pyros = -Trace_ELBO(num_particles=1000, vectorize_particles=False).loss(hierarchy, Structured(), X)
    exact = hierarchies.log_evidence() - hierarchies.global_gap(0.5, 0.22) - len(X) * hierarchies.local_gap(0.1, 0.6)
    assert abs(pyros - exact) < 0.15
    assert 0 < error < 0.1 and abs(elbo - exact) < 4 * error + 0.005
    low, high = (float(word) for word in re.findall(r"between (-[\d.]+) and (-[\d.]+)", line)[0])
    assert low - 0.06 < hierarchies.log_evidence() < high + 0.06


def test_local_latents_that_ignore_the_shared_ones(ledger: pg.GapLedger) -> None:
    """No training makes an AutoNormal follow m: the ledger does not advise it first."""
    guide = AutoNormal(hierarchy)
    guide(X)
    small: dict[str, Any] = {**QUICK, "shared": pg.Shared(num_draws=2, max_draws=64), "referee": False}
    independent = pg.decompose(hierarchy, guide, X, **small)
    remark = "The guide draws 'z' independently of 'm': what that costs is in the optimization gap, and no training"
    assert remark in str(independent)
    (finding,) = [f for f in independent.diagnose().findings if f.gap == "guide_optimization_gap"]
    assert "independently of the shared ones" in finding.cause and "depend on the shared ones" in finding.remedy
    assert "independently" not in str(ledger) and "independently" not in str(ledger.diagnose())


def cliff(x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.factor("cliff", torch.where((x > 1.5) & (m > 0.53), -torch.inf, 0.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def test_datapoints_without_finite_bounds_at_some_draws_alone() -> None:
    """Not at the first, whose provenance the ledger has."""
    small: dict[str, Any] = {"evidence": pg.AIS(num_chains=4, num_temperatures=4), "referee": False, **QUICK}
    ledger = pg.decompose(cliff, Structured(), X, shared=pg.Shared(num_draws=2, max_draws=64, tolerance=1.0), **small)
    assert ledger.shared is not None and np.isfinite(ledger.shared["log_evidence"].values).all()
    bad = (X > 1.5).numpy()
    assert bad.any() and not bad.all()
    assert (np.isinf(ledger.per_datapoint["elbo"].values) == bad).all()
    text = str(ledger)
    assert f"{bad.sum()} of 12 datapoints" in text and "site 'cliff' has density 0" in text
    assert "total at least 0.000 nats, not bounded above" in str(ledger.table("full"))
    row = next(line for line in text.splitlines() if line.startswith("├─ global gap"))
    assert "at least 0.00 " in row
