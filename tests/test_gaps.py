"""The ledger: its sums, its figures, its provenance, its file, and runs that continue."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from pyro.infer.autoguide import AutoNormal

from pyrogaps import AIS, GapLedger, Refinement, decompose
from pyrogaps.errors import InputError
from pyrogaps.gaps import parts
from pyrogaps.guides.local import AutoLocalMultivariateNormal
from tests.references import WrongEncoder, anisotropic, draws_of

FAST = {"evidence": AIS(num_chains=8, num_temperatures=5), "refinement": Refinement(num_steps=60), "progress": False}


@pytest.fixture(scope="module")
def ledger() -> GapLedger:
    model = anisotropic(6, 2)
    x, _ = draws_of(model, 70)
    families = {"mean-field": AutoNormal, "full": AutoLocalMultivariateNormal}
    return decompose(model, WrongEncoder(model), x, families=families, num_particles=200, **FAST)


def test_children_sum_to_their_parent(ledger: GapLedger) -> None:
    p = ledger.per_datapoint
    children = p["approximation_gap"] + p["amortization_gap"]
    np.testing.assert_allclose(children, p["inference_gap"], atol=1e-5)
    np.testing.assert_allclose(p["log_evidence"] - p["elbo"], p["inference_gap"], atol=1e-5)
    np.testing.assert_allclose(p["family_approximation_gap"].sel(family="own"), p["approximation_gap"], atol=1e-12)
    summary = ledger.summary()["mean"]
    assert summary["inference_gap"] == pytest.approx(summary["approximation_gap"] + summary["amortization_gap"], abs=1e-5)


def test_every_quantity_has_its_error_and_its_provenance(ledger: GapLedger) -> None:
    p, quantities = ledger.per_datapoint, ledger.provenance["quantities"]
    for name, how in quantities.items():
        assert f"{name}_mcse" in p
        assert how["estimator"] and how["direction"]
        assert p[name].attrs["units"] == "nats"
    assert ledger.provenance["seed"] == 0
    assert ledger.provenance["evidence"]["num_temperatures"] == 5
    assert {"torch", "pyro-ppl", "pyrogaps"} <= set(ledger.provenance["versions"])


def test_errors_combine_as_independent_estimates(ledger: GapLedger) -> None:
    p = ledger.per_datapoint
    own = p["elbo_refined_mcse"].sel(family="own")
    np.testing.assert_allclose(p["approximation_gap_mcse"], np.hypot(p["log_evidence_mcse"], own))
    np.testing.assert_allclose(p["amortization_gap_mcse"], np.hypot(own, p["elbo_mcse"]))


def test_summary_is_the_mean_and_its_two_errors(ledger: GapLedger) -> None:
    row, values = ledger.summary().loc["elbo"], ledger.per_datapoint["elbo"].values
    assert row["mean"] == pytest.approx(values.mean())
    assert row["standard_error"] == pytest.approx(values.std(ddof=1) / 70**0.5)
    assert row["mcse"] == pytest.approx(np.sqrt((ledger.per_datapoint["elbo_mcse"].values ** 2).sum()) / 70)


def test_the_table_shows_every_quantity(ledger: GapLedger) -> None:
    table = str(ledger)
    for label in ("70 datapoints", "log p(x)", "L[q]", "├─ approximation gap", "└─ amortization gap", "full", "nats"):
        assert label in table
    assert f"{ledger.summary()['mean']['inference_gap']:.3f}" in table


def test_round_trip_through_a_file(ledger: GapLedger, tmp_path: Path) -> None:
    ledger.to_datatree().to_netcdf(tmp_path / "ledger.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "ledger.nc", engine="h5netcdf") as tree:
        again = GapLedger.from_datatree(tree.load())
    xr.testing.assert_equal(again.per_datapoint, ledger.per_datapoint)
    xr.testing.assert_equal(again.traces, ledger.traces)
    assert again.provenance == ledger.provenance
    assert str(again) == str(ledger)
    assert json.loads(ledger.to_datatree().attrs["pyrogaps"]) == ledger.provenance


def test_a_tree_that_is_no_ledger_is_refused() -> None:
    with pytest.raises(InputError, match="not a tree written by GapLedger"):
        GapLedger.from_datatree(xr.DataTree())


class Interrupted(Exception):
    pass


def test_an_interrupted_run_continues_and_equals_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = anisotropic(6, 2)
    x, _ = draws_of(model, 150)
    guide = WrongEncoder(model)
    unbroken = decompose(model, guide, x, num_particles=100, **FAST)
    computed: list[int] = []
    get = parts.Parts.get

    def counting(self, chunk, joint, density, compute):  # type: ignore[no-untyped-def]
        def once():  # type: ignore[no-untyped-def]
            if len(computed) == 2:
                raise Interrupted
            computed.append(chunk.start)
            return compute()

        return get(self, chunk, joint, density, once)

    monkeypatch.setattr(parts.Parts, "get", counting)
    with pytest.raises(Interrupted):
        decompose(model, guide, x, num_particles=100, cache=tmp_path, **FAST)
    assert computed == [0, 64]
    computed[:] = [-1]
    continued = decompose(model, guide, x, num_particles=100, cache=tmp_path, **FAST)
    assert computed == [-1, 128]
    xr.testing.assert_equal(continued.per_datapoint, unbroken.per_datapoint)
    xr.testing.assert_equal(continued.traces, unbroken.traces)


@pytest.mark.parametrize("change", ["parameters", "data", "settings", "seed", "part"])
def test_finished_chunks_count_only_for_what_they_were(change: str, tmp_path: Path) -> None:
    model = anisotropic(6, 2)
    x, _ = draws_of(model, 10)
    guide = WrongEncoder(model)
    arguments = {"num_particles": 100, **FAST}
    decompose(model, guide, x, cache=tmp_path, **arguments)
    if change == "parameters":
        with torch.no_grad():
            guide.bias += 0.1
    elif change == "data":
        x[3] += 0.1
    elif change == "settings":
        arguments["num_particles"] = 101
    elif change == "seed":
        arguments["seed"] = 1
    else:
        (part,) = tmp_path.glob("*.npz")
        part.write_bytes(part.read_bytes()[:100])
    fresh = decompose(model, guide, x, **arguments)
    xr.testing.assert_equal(decompose(model, guide, x, cache=tmp_path, **arguments).per_datapoint, fresh.per_datapoint)


def test_bad_arguments_are_one_line() -> None:
    model = anisotropic(6, 2)
    x, _ = draws_of(model, 4)
    with pytest.raises(InputError, match="'own' is the name of the guide's own family"):
        decompose(model, WrongEncoder(model), x, families={"own": AutoNormal}, **FAST)
    with pytest.raises(InputError, match="num_particles: must be at least 2"):
        decompose(model, WrongEncoder(model), x, num_particles=1, **FAST)
    with pytest.raises(InputError, match="families: 'x' must be a callable"):
        decompose(model, WrongEncoder(model), x, families={"x": 3}, **FAST)  # type: ignore[dict-item]
