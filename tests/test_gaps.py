"""The ledger: exact gaps, sums, summary, files, provenance, and continuing where a run stopped."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyrogaps import AIS, GapLedger, InputError, Problem, Refinement, chunk_cache, decompose
from pyrogaps.gaps.decomposition import QUANTITIES
from pyrogaps.guides.local import AutoLocalMultivariateNormal
from pyrogaps.models.linear_gaussian import LinearGaussian
from tests.references import MCSE, STANDARD_ERRORS, WrongEncoder, anisotropic, draws_of

FAMILIES: dict[str, Callable[..., Any]] = {"mean-field": AutoNormal, "full": AutoLocalMultivariateNormal}


def assert_variable(ledger: GapLedger, name: str, exact: Tensor, family: str | None = None) -> None:
    """Every datapoint's value within four of its standard errors of the truth, and these below 0.05 nats."""
    chosen = ledger.per_datapoint if family is None else ledger.per_datapoint.sel(family=family)
    error = chosen[f"{name}_mcse"].values
    assert error.max() < MCSE
    assert (np.abs(chosen[name].values - exact.detach().numpy()) < STANDARD_ERRORS * error + 1e-9).all()


@pytest.fixture(scope="module")
def pair() -> tuple[LinearGaussian, WrongEncoder, Tensor]:
    model = anisotropic(8, 3)
    return model, WrongEncoder(model, shrink=0.9, shift=0.2, width=1.2), draws_of(model, 6)[0]


@pytest.fixture(scope="module")
def ledger(pair: tuple[LinearGaussian, WrongEncoder, Tensor]) -> GapLedger:
    evidence = AIS(num_chains=128)
    return decompose(*pair, families=FAMILIES, evidence=evidence, num_particles=6000, progress=False)


def test_every_number_is_the_exact_one(pair: Any, ledger: GapLedger) -> None:
    model, guide, x = pair
    mean, scale = guide.parameters_of(x)
    log_evidence, approximation = model.log_evidence(x), model.approximation_gap().expand(len(x))
    amortization = model.amortization_gap(x, mean, scale)
    assert_variable(ledger, "log_evidence", log_evidence)
    assert_variable(ledger, "elbo", model.elbo(x, mean, scale=scale))
    assert_variable(ledger, "iwae", log_evidence)
    assert_variable(ledger, "approximation_gap", approximation)
    assert_variable(ledger, "amortization_gap", amortization)
    assert_variable(ledger, "inference_gap", approximation + amortization)
    for family, gap in (("own", approximation), ("mean-field", approximation), ("full", torch.zeros(len(x)))):
        assert_variable(ledger, "elbo_refined", log_evidence - gap, family)
        assert_variable(ledger, "family_approximation_gap", gap, family)
    assert float(approximation.detach()[0]) > 3 * float(ledger.per_datapoint["approximation_gap_mcse"].max())
    assert float(amortization.detach().min()) > STANDARD_ERRORS * float(
        ledger.per_datapoint["amortization_gap_mcse"].max()
    )
    assert bool(ledger.per_datapoint["converged"].all())


def test_children_sum_to_their_parents(ledger: GapLedger) -> None:
    data = ledger.per_datapoint
    total = data["approximation_gap"] + data["amortization_gap"]
    assert float(np.abs(total - data["inference_gap"]).max()) < 1e-5
    own = data["family_approximation_gap"].sel(family="own")
    assert float(np.abs(own - data["approximation_gap"]).max()) < 1e-5


def test_errors_add_in_squares(ledger: GapLedger) -> None:
    data = ledger.per_datapoint
    for gap, of, less in (
        ("inference_gap", data["log_evidence_mcse"], data["elbo_mcse"]),
        ("approximation_gap", data["log_evidence_mcse"], data["elbo_refined_mcse"].sel(family="own")),
        ("amortization_gap", data["elbo_refined_mcse"].sel(family="own"), data["elbo_mcse"]),
    ):
        np.testing.assert_allclose(data[f"{gap}_mcse"], np.sqrt(of**2 + less**2), rtol=1e-12)


def test_variables_have_their_dimensions_and_units(ledger: GapLedger) -> None:
    data = ledger.per_datapoint
    by_family = {"elbo_refined", "family_approximation_gap", "converged", "kept_start", "khat_refined", "ess_refined"}
    for name in data.data_vars:
        family = str(name).removesuffix("_mcse") in by_family
        assert data[name].dims == (("datapoint", "family") if family else ("datapoint",)), name
    for name in (*QUANTITIES, "log_evidence"):
        assert data[name].attrs["units"] == data[f"{name}_mcse"].attrs["units"] == "nats"
        assert np.isfinite(data[name]).all() and (data[f"{name}_mcse"] >= 0).all()
    assert ledger.families == ["own", "mean-field", "full"]
    assert float(data["acceptance"].min()) > 0 and float(data["acceptance"].max()) <= 1
    assert float(data["ess"].max()) <= 6000 and float(data["log_evidence_ess"].max()) <= 128
    assert set(ledger.traces.data_vars) == {
        "refined_elbo", "acceptance_by_temperature", "ess_by_temperature", "inverse_temperature"
    }  # fmt: skip


def test_summary_is_of_means_over_datapoints(ledger: GapLedger) -> None:
    summary = ledger.summary()
    assert {"log_evidence", "elbo", "iwae", "inference_gap", "approximation_gap", "amortization_gap"} <= set(
        summary.index
    )
    assert {
        "elbo_refined[own]",
        "elbo_refined[full]",
        "approximation_gap[full]",
        "approximation_gap[mean-field]",
    } <= set(summary.index)
    values, errors = (ledger.per_datapoint[n].values for n in ("amortization_gap", "amortization_gap_mcse"))
    row = summary.loc["amortization_gap"]
    assert row["mean"] == pytest.approx(values.mean())
    assert row["standard_error"] == pytest.approx(values.std(ddof=1) / math.sqrt(6))
    assert row["mcse"] == pytest.approx(np.sqrt((errors**2).sum()) / 6)
    assert summary.loc["approximation_gap[full]", "mean"] == pytest.approx(
        float(ledger.per_datapoint["family_approximation_gap"].sel(family="full").mean())
    )


def test_directions_are_those_in_expectation(ledger: GapLedger) -> None:
    """log p(x) by AIS and L[q*] of a fitted q* fall short; differences of two that do can go either way."""
    directions = {name: how["direction"] for name, how in ledger.provenance["quantities"].items()}
    directions |= dict(zip(ledger.gaps["gap"].values, ledger.gaps["direction"].values, strict=True))
    assert directions == {
        "elbo": "unbiased",
        "iwae": "lower bound of log p(x)",
        "log_evidence": "lower bound of log p(x)",
        "elbo_refined": "lower bound of L[q*]",
        "approximation_gap": "estimate (either way)",
        "family_approximation_gap": "estimate (either way)",
        "amortization_gap": "lower bound of the gap",
        "inference_gap": "lower bound of the gap",
    }


def test_the_table(ledger: GapLedger) -> None:
    assert repr(ledger) == str(ledger)
    table = str(ledger.table("full"))
    assert "6 datapoints, latent dimension 3" in table
    for label in (
        "log p(x)",
        "L[q]",
        "L[q*]",
        "L[q*] full",
        "inference gap",
        "├─ approximation gap",
        "└─ amortization gap",
    ):
        assert any(line.startswith(label) for line in table.splitlines()), label
    row = next(line for line in table.splitlines() if line.startswith("└─ amortization gap"))
    assert f"{float(ledger.per_datapoint['amortization_gap'].mean()):.2f}" in row
    assert "IWAE-6000[q]" in table and "Refinement converged: own family 100%" in table


def test_round_trip_through_a_file(ledger: GapLedger, tmp_path: Path) -> None:
    ledger.to_datatree().to_netcdf(tmp_path / "ledger.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "ledger.nc", engine="h5netcdf") as tree:
        provenance = json.loads(tree.attrs["pyrogaps"])
        back = GapLedger.from_datatree(tree.load())
    xr.testing.assert_identical(back.per_datapoint, ledger.per_datapoint)
    xr.testing.assert_identical(back.traces, ledger.traces)
    xr.testing.assert_identical(back.observed, ledger.observed)
    assert provenance == back.provenance == ledger.provenance
    assert str(back) == str(ledger)


def test_provenance_says_what_was_done(ledger: GapLedger) -> None:
    provenance = ledger.provenance
    assert json.loads(json.dumps(provenance)) == provenance
    assert provenance["evidence"]["num_chains"] == 128
    assert provenance["refinement"]["num_steps"] == 1000
    assert provenance["num_particles"] == 6000 and provenance["num_datapoints"] == 6 and provenance["dim"] == 3
    assert provenance["own_family"] == "freed" and provenance["plate"] == "data" and provenance["seed"] == 0
    assert provenance["families"] == {"mean-field": "AutoNormal", "full": "AutoLocalMultivariateNormal"}
    assert provenance["versions"]["torch"] and provenance["versions"]["pyro-ppl"] and provenance["dtype"] == "float64"


def test_something_else_is_not_a_ledger() -> None:
    with pytest.raises(InputError, match="not a tree written by GapLedger"):
        GapLedger.from_datatree(xr.DataTree())


# ------------------------------------------------------------------------------------------------------- going on again

RECORDED: dict[str, Any] = {
    "evidence": AIS(num_chains=4, num_temperatures=3, num_pilot_temperatures=3),
    "refinement": Refinement(num_steps=5, num_selection=16),
    "num_particles": 20,
    "batch_size": 64,
    "progress": False,
}


def eagerly(model: LinearGaussian, guide: WrongEncoder, x: Tensor, **options: Any) -> GapLedger:
    """`decompose` without a record of the density, which takes longer than these few evaluations."""
    return decompose(Problem.of(model, guide, x, mode="eager"), **{**RECORDED, **options})


@pytest.fixture
def chunked(brief_check: None) -> tuple[LinearGaussian, WrongEncoder, Tensor]:
    """Data of three chunks."""
    model = anisotropic(4, 2)
    return model, WrongEncoder(model), draws_of(model, 150)[0]


def test_batches_and_seeds(chunked: Any) -> None:
    whole, batched = (decompose(*chunked, **{**RECORDED, "batch_size": size}) for size in (64, 256))
    xr.testing.assert_allclose(batched.per_datapoint, whole.per_datapoint, rtol=1e-8, atol=1e-8)
    other = decompose(*chunked, seed=1, **RECORDED)
    assert float(np.abs(other.per_datapoint["elbo"] - whole.per_datapoint["elbo"]).min()) > 0


def test_a_stopped_run_goes_on(chunked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its third chunk, taken up again: nothing done twice, and the same ledger as unbroken."""
    from pyrogaps.gaps.measure import Measure

    unbroken = decompose(*chunked, **RECORDED)
    measured: list[int] = []
    original = Measure.__call__

    def measure(self: Any, chunk: Any, run: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(chunk.start)
        return original(self, chunk, run)

    monkeypatch.setattr(Measure, "__call__", measure)
    with pytest.raises(KeyboardInterrupt):
        decompose(*chunked, cache=tmp_path, **RECORDED)
    assert measured == [0, 64]
    again: list[int] = []

    def counted(self: Any, chunk: Any, run: Any) -> Any:
        again.append(chunk.start)
        return original(self, chunk, run)

    monkeypatch.setattr(Measure, "__call__", counted)
    resumed = decompose(*chunked, cache=tmp_path, **RECORDED)
    assert again == [128]
    xr.testing.assert_identical(resumed.per_datapoint, unbroken.per_datapoint)
    xr.testing.assert_identical(resumed.traces, unbroken.traces)


def changed_model(model: LinearGaussian, guide: WrongEncoder, x: Tensor) -> None:
    with torch.no_grad():
        model.weight.mul_(1.001)


def changed_guide(model: LinearGaussian, guide: WrongEncoder, x: Tensor) -> None:
    with torch.no_grad():
        guide.log_scale.add_(1e-4)


def changed_data(model: LinearGaussian, guide: WrongEncoder, x: Tensor) -> None:
    x[:64] += 1e-3


@pytest.mark.parametrize(("change", "redone"), [(None, 0), (changed_model, 3), (changed_guide, 3), (changed_data, 1)])
def test_only_what_still_holds_is_taken_up(
    chunked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, redone: int
) -> None:
    from pyrogaps.gaps.measure import Measure

    eagerly(*chunked, cache=tmp_path)
    if change is not None:
        change(*chunked)
    fresh = eagerly(*chunked)
    count, original = [0], Measure.__call__

    def measure(self: Any, chunk: Any, run: Any) -> Any:
        count[0] += 1
        return original(self, chunk, run)

    monkeypatch.setattr(Measure, "__call__", measure)
    cached = eagerly(*chunked, cache=tmp_path)
    assert count[0] == redone
    xr.testing.assert_identical(cached.per_datapoint, fresh.per_datapoint)


@pytest.mark.parametrize(
    "setting", [{"seed": 1}, {"num_particles": 21}, {"evidence": AIS(num_chains=5, num_temperatures=3)}]
)
def test_other_settings_begin_anew(chunked: Any, tmp_path: Path, setting: dict[str, Any]) -> None:
    eagerly(*chunked, cache=tmp_path)
    cached = eagerly(*chunked, cache=tmp_path, **setting)
    xr.testing.assert_identical(cached.per_datapoint, eagerly(*chunked, **setting).per_datapoint)


def test_a_torn_part_is_done_again(chunked: Any, tmp_path: Path) -> None:
    whole = eagerly(*chunked, cache=tmp_path)
    part = sorted(tmp_path.glob("*.npz"))[1]
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=f"{part.name} is damaged, so its datapoints are measured again") as warned:
        again = eagerly(*chunked, cache=tmp_path)
    assert [warning.filename for warning in warned] == [__file__]  # of the user's call, wherever the library warns
    xr.testing.assert_identical(again.per_datapoint, whole.per_datapoint)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".npz"]
    assert chunk_cache._read(part) is not None


# ------------------------------------------------------------------------------------------------------------ bad input


def test_bad_arguments_are_named(chunked: Any) -> None:
    with pytest.raises(InputError, match="families: 'own' is the name of the guide's own family"):
        decompose(*chunked, families={"own": AutoNormal}, **RECORDED)
    with pytest.raises(InputError, match=r"families\.flow: must be callable"):
        decompose(*chunked, families={"flow": "AutoNormal"}, **RECORDED)  # type: ignore[dict-item]
    with pytest.raises(InputError, match="num_particles: must be a whole number of at least 2, got 1"):
        decompose(*chunked, **{**RECORDED, "num_particles": 1})


@pytest.mark.parametrize("initial", ["prior", "guide"])
def test_other_starts_of_the_evidence(initial: str) -> None:
    model = anisotropic(4, 2)
    x, _ = draws_of(model, 5)
    evidence = AIS(num_chains=512, num_temperatures=100, initial=initial)  # type: ignore[arg-type]
    ledger = decompose(
        model, WrongEncoder(model), x, evidence=evidence, refinement=Refinement(num_steps=20), progress=False
    )
    assert_variable(ledger, "log_evidence", model.log_evidence(x))
    assert initial in ledger.provenance["quantities"]["log_evidence"]["estimator"]
