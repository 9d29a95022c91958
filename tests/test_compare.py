"""Comparisons of ledgers: exact differences, errors that cover, verdicts only where there is one, refusals by name."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.gaps.differences import LARGER, OPEN, SAME, SMALLER, UNTRUSTED, Pair
from tests.references import STANDARD_ERRORS, WrongEncoder, anisotropic, draws_of

SETTINGS: dict[str, Any] = {"num_particles": 400, "progress": False, "refinement": pg.Refinement(num_steps=300)}
ROUGH: dict[str, Any] = {
    "num_particles": 20,
    "progress": False,
    "refinement": pg.Refinement(num_steps=3, num_selection=8),
    "evidence": pg.AIS(num_chains=2, num_temperatures=3, num_pilot_temperatures=3),
    "referee": False,
}
NUMBER, REPEATS = 40, 200
MODEL = anisotropic(6, 2)
OTHER = anisotropic(6, 2, decades=0.5, seed=3)
X = draws_of(MODEL, NUMBER)[0]


def worse(model: Any = MODEL) -> WrongEncoder:
    return WrongEncoder(model, shrink=0.8, shift=0.3, width=1.4)


def better(model: Any = MODEL) -> WrongEncoder:
    return WrongEncoder(model, shrink=0.95, shift=0.1, width=1.1)


@pytest.fixture(scope="module")
def ledgers() -> dict[str, pg.GapLedger]:
    return {
        "worse": pg.decompose(MODEL, worse(), X, **SETTINGS),
        "better": pg.decompose(MODEL, better(), X, seed=1, **SETTINGS),
        "other model": pg.decompose(OTHER, better(OTHER), X, seed=2, **SETTINGS),
    }


def exact_elbo(guide: WrongEncoder, model: Any = MODEL) -> np.ndarray:
    mean, scale = guide.parameters_of(X)
    return model.elbo(X, mean, scale=scale).detach().numpy()  # type: ignore[no-any-return]


def row(comparison: pg.Comparison, quantity: str, other: str | None = None) -> xr.Dataset:
    return comparison.differences.sel(other=other or comparison.names[1], quantity=quantity)


def assert_near(comparison: pg.Comparison, quantity: str, exact: np.ndarray) -> None:
    """Every datapoint's difference, and their mean, within four of their Monte Carlo errors of the truth."""
    data = comparison.per_datapoint.isel(other=0)
    value, error = data[quantity].values, data[f"{quantity}_mcse"].values
    assert 0 < error.max() < 1
    assert (np.abs(value - exact) < STANDARD_ERRORS * error + 1e-6).all()
    found = row(comparison, quantity)
    assert abs(float(found["mean"]) - exact.mean()) < STANDARD_ERRORS * float(found["mcse"]) + 1e-6
    assert float(found["standard_error"]) == pytest.approx(value.std(ddof=1) / NUMBER**0.5)


# Exact


def test_two_guides_of_one_model(ledgers: dict[str, pg.GapLedger]) -> None:
    comparison = pg.compare(ledgers["worse"], ledgers["better"])
    elbo = exact_elbo(worse()) - exact_elbo(better())
    assert comparison.provenance["one_model"] == {"b": True}
    assert_near(comparison, "elbo", elbo)
    assert_near(comparison, "inference_gap", -elbo)
    assert_near(comparison, "amortization_gap", -elbo)
    assert_near(comparison, "approximation_gap", np.zeros(NUMBER))
    verdicts = {
        name: str(row(comparison, name)["verdict"].item()) for name in comparison.differences["quantity"].values
    }
    assert verdicts["elbo"] == SMALLER and verdicts["inference_gap"] == verdicts["amortization_gap"] == LARGER
    assert verdicts["approximation_gap"] == SAME
    assert "log p(x)" not in comparison.verdict()
    assert comparison.verdict().startswith("Inference gap is larger in 'a' than in 'b', by ")
    assert "Parts that differ, 'a' less 'b': amortization gap (" in comparison.verdict()


def _split(ledger: pg.GapLedger) -> pg.GapLedger:
    """With a part of the amortization gap that, as those of a split, has no values per datapoint."""
    part = ledger.gaps.sel(gap=["amortization_gap"]).assign_coords(gap=["capacity_gap"])
    part["parent"], part["label"] = ("gap", ["amortization_gap"]), ("gap", ["capacity gap"])
    return replace(ledger, gaps=xr.concat([ledger.gaps, part], "gap"))


def test_a_gap_whose_parts_cannot_be_compared_is_itself_a_part(ledgers: dict[str, pg.GapLedger]) -> None:
    """So that the verdict of two split ledgers names the amortization gap."""
    comparison = pg.compare(_split(ledgers["worse"]), _split(ledgers["better"]))
    assert comparison.verdict() == pg.compare(ledgers["worse"], ledgers["better"]).verdict()
    assert comparison.provenance["without"] == {"b": ["capacity gap"]}


def test_differences_of_parts_sum_to_that_of_the_whole(ledgers: dict[str, pg.GapLedger]) -> None:
    for comparison in (pg.compare(ledgers), pg.compare(ledgers, reference="better")):
        means = comparison.differences["mean"]
        parts = means.sel(quantity="approximation_gap") + means.sel(quantity="amortization_gap")
        np.testing.assert_allclose(parts, means.sel(quantity="inference_gap"), atol=1e-9)


def test_log_evidence_of_one_model_cancels(ledgers: dict[str, pg.GapLedger]) -> None:
    """A wrong log p(x) of one of the ledgers changes no difference of gaps, and is warned of."""
    columns = ledgers["better"].per_datapoint.copy(deep=True)
    for name in ("log_evidence", "inference_gap", "approximation_gap"):
        columns[name] -= 3.0
    columns["log_evidence_upper"] -= 3.0
    wrong = replace(ledgers["better"], per_datapoint=columns)
    before, after = pg.compare(ledgers["worse"], ledgers["better"]), pg.compare(ledgers["worse"], wrong)
    for name in ("inference_gap", "approximation_gap", "amortization_gap"):
        xr.testing.assert_equal(before.per_datapoint[name], after.per_datapoint[name])
        # Both columns have the higher log p(x), which is the right one.
        for column in ("reference", "value"):
            off = row(after, name)[column] - row(before, name)[column]
            assert abs(float(off)) < STANDARD_ERRORS * float(columns["log_evidence_mcse"].max())
    warning = re.search(r"log p\(x\) of one model differs by ([\d.]+) ± .* that of 'b' is too low", str(after))
    assert warning is not None and float(warning[1]) == pytest.approx(3.0, abs=0.1)
    assert "of one model differs" not in str(before)


def assert_columns_subtract(comparison: pg.Comparison, other: str) -> None:
    """In every row: the first column less the second is the difference."""
    rows = comparison.differences.sel(other=other)
    np.testing.assert_allclose(rows["reference"] - rows["value"], rows["mean"], atol=1e-9)


def test_columns_of_one_model_subtract_and_add_up(ledgers: dict[str, pg.GapLedger]) -> None:
    """Also where the two ledgers' own log p(x) differ, and in a family's rows."""
    pair = [pg.decompose(MODEL, guide, X, families={"m": AutoNormal}, seed=seed, **ROUGH)
            for seed, guide in enumerate((worse(), better()))]  # fmt: skip
    for given in ((ledgers["worse"], ledgers["better"]), pair):
        comparison = pg.compare(*given)
        assert_columns_subtract(comparison, "b")
        for column in ("reference", "value"):
            means = comparison.differences[column].sel(other="b")
            one = comparison.provenance["log_evidence"]["b"]
            assert float(means.sel(quantity="inference_gap") + means.sel(quantity="elbo")) == pytest.approx(one)
            parts = means.sel(quantity="approximation_gap") + means.sel(quantity="amortization_gap")
            assert float(parts) == pytest.approx(float(means.sel(quantity="inference_gap")))
        assert f"measured from one log p(x), −{abs(one):.3f} on average" in str(comparison)
    assert "approximation_gap[m]" in comparison.differences["quantity"]


def one_evidence(ledgers: dict[str, pg.GapLedger], *changes: dict[str, Any]) -> np.ndarray:
    """log p(x) in both columns, of two ledgers of one model with columns of their own."""
    first, second = (_with(ledgers["better"], **change) for change in changes)
    return Pair(first, replace(second, provenance={**second.provenance, "seed": 8})).evidence


def test_one_log_evidence_of_two_ledgers(ledgers: dict[str, pg.GapLedger]) -> None:
    """Weighted by precision; of a reliable ledger alone; the higher where errors do not explain the difference."""
    low, high = np.full(NUMBER, -10.0), np.full(NUMBER, -9.9)
    errors = [{"log_evidence_mcse": np.full(NUMBER, error)} for error in (0.1, 0.2, 0.001, 0.0)]
    one, two = {"log_evidence": low} | errors[0], {"log_evidence": high} | errors[1]
    weighted = (low / 0.01 + high / 0.04) / (1 / 0.01 + 1 / 0.04)
    np.testing.assert_allclose(one_evidence(ledgers, one, two), weighted)
    np.testing.assert_allclose(one_evidence(ledgers, two, one), weighted)
    reliable = np.arange(NUMBER) < 10
    doubtful = one | {"log_evidence_reliable": reliable}
    np.testing.assert_allclose(one_evidence(ledgers, doubtful, two), np.where(reliable, weighted, high))
    np.testing.assert_allclose(one_evidence(ledgers, two, doubtful), np.where(reliable, weighted, high))
    assert (one_evidence(ledgers, {"log_evidence": low} | errors[2], {"log_evidence": high} | errors[2]) == high).all()
    for pair in ((low, high), (high, low)):  # an exact value has no error
        given = [{"log_evidence": value} | errors[place] for value, place in zip(pair, (3, 0), strict=True)]
        assert (one_evidence(ledgers, *given) == pair[0]).all()
    assert (one_evidence(ledgers, {"log_evidence": low} | errors[3], {"log_evidence": low} | errors[3]) == low).all()


def test_weights_by_precision_are_better_than_either_ledger(ledgers: dict[str, pg.GapLedger]) -> None:
    """Over repeats: the error of the mean of independent estimates is that of their precisions, added."""
    truth = MODEL.log_evidence(X).detach().numpy()
    generator, scores = np.random.default_rng(0), []
    errors = [np.full(NUMBER, error) for error in (0.02, 0.05)]
    for _ in range(REPEATS):
        drawn = [{"log_evidence": truth + generator.normal(0, error), "log_evidence_mcse": error} for error in errors]
        scores.append((one_evidence(ledgers, *drawn) - truth) / (errors[0] ** -2 + errors[1] ** -2) ** -0.5)
    assert abs(np.mean(scores)) < STANDARD_ERRORS / (REPEATS * NUMBER) ** 0.5
    # Where they differ by more than four errors, once in 16,000, the higher one is taken.
    assert abs(np.std(scores) - 1) < STANDARD_ERRORS / (2 * REPEATS * NUMBER) ** 0.5


def test_one_log_evidence_does_not_lean_to_values_with_small_errors(ledgers: dict[str, pg.GapLedger]) -> None:
    """Few draws of uneven weights are low and look certain at once; weights by each datapoint's own error are low."""
    truth, generator = MODEL.log_evidence(X).detach().numpy(), np.random.default_rng(0)
    means, leaning = [], []
    for _ in range(REPEATS):
        drawn = []
        for _ in range(2):
            weights = np.exp(1.5 * generator.standard_normal((20, NUMBER)) - 1.5**2 / 2)
            mean, error = weights.mean(0), weights.std(0, ddof=1) / 20**0.5
            drawn.append({"log_evidence": truth + np.log(mean), "log_evidence_mcse": error / mean})
        one, two = (draw["log_evidence"].mean() for draw in drawn)
        found = one_evidence(ledgers, *drawn).mean()
        assert min(one, two) - 1e-9 <= found
        means.append(found - (one + two) / 2)
        own = [draw["log_evidence_mcse"] ** -2 for draw in drawn]
        leaning.append(
            (sum(w * draw["log_evidence"] for w, draw in zip(own, drawn, strict=True)) / sum(own)).mean()
            - (one + two) / 2
        )
    assert np.mean(leaning) < -0.02 and np.mean(means) > -0.005, (np.mean(leaning), np.mean(means))


def test_log_evidence_of_two_models_lies_between_bounds(ledgers: dict[str, pg.GapLedger]) -> None:
    comparison = pg.compare(ledgers["better"], ledgers["other model"])
    exact = (MODEL.log_evidence(X) - OTHER.log_evidence(X)).detach().numpy()
    data = comparison.per_datapoint.isel(other=0)
    assert comparison.provenance["one_model"] == {"b": False}
    for name, truth in (
        ("log_evidence", exact),
        ("inference_gap", exact - exact_elbo(better()) + exact_elbo(better(OTHER), OTHER)),
    ):
        low, high = (data[f"{name}_{end}"].values for end in ("low", "high"))
        errors = [data[f"{name}_{end}_mcse"].values for end in ("low", "high")]
        assert (low <= high).all() and (low < high).any() and max(map(np.max, errors)) < 1
        assert (low - STANDARD_ERRORS * errors[0] < truth).all()
        assert (truth < high + STANDARD_ERRORS * errors[1]).all()
        found = row(comparison, name)
        assert float(found["low"]) - STANDARD_ERRORS * float(found["low_mcse"]) < truth.mean()
        assert truth.mean() < float(found["high"]) + STANDARD_ERRORS * float(found["high_mcse"])
    lower = [ledgers[name].per_datapoint["log_evidence"].values for name in ("better", "other model")]
    upper = [ledgers[name].per_datapoint["log_evidence_upper"].values for name in ("better", "other model")]
    upper = [np.maximum(above, below) for above, below in zip(upper, lower, strict=True)]
    np.testing.assert_allclose(data["log_evidence_low"], lower[0] - upper[1])
    np.testing.assert_allclose(data["log_evidence_high"], upper[0] - lower[1])
    assert comparison.verdict().startswith("log p(x) is larger in 'a' than in 'b', by ")


# Errors


@pytest.fixture(scope="module")
def estimates(ledgers: dict[str, pg.GapLedger]) -> Callable[[str, int], pg.GapLedger]:
    """A ledger with the ELBO estimated anew, by a seed of its own."""
    problems = {"worse": pg.Problem.of(MODEL, worse(), X), "better": pg.Problem.of(MODEL, better(), X)}

    def measured(name: str, seed: int) -> pg.GapLedger:
        found = pg.elbo(problems[name], num_particles=50, seed=seed)
        columns = {"elbo": found.value.numpy(), "elbo_mcse": found.mcse.numpy()}
        data = ledgers[name].per_datapoint.assign({key: ("datapoint", value) for key, value in columns.items()})
        return replace(ledgers[name], per_datapoint=data, provenance={**ledgers[name].provenance, "seed": seed})

    return measured


def test_monte_carlo_errors_cover(estimates: Callable[[str, int], pg.GapLedger]) -> None:
    """95% intervals of independent seeds hold the truth that often, those of one seed no less, over repeats."""
    exact = exact_elbo(better()).mean() - exact_elbo(worse()).mean()
    scores: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(REPEATS):
        for same, seed in ((False, 1000 + repeat), (True, repeat)):
            pair = Pair(estimates("worse", repeat), estimates("better", seed))
            assert pair.one_seed == same
            mean = pair._difference("inference_gap", "").mean
            scores[same].append((mean.mean - exact) / mean.mcse)
    binomial = STANDARD_ERRORS * (0.95 * 0.05 / REPEATS) ** 0.5
    covered = {same: float((np.abs(values) < 1.96).mean()) for same, values in scores.items()}
    assert abs(covered[False] - 0.95) < binomial and covered[True] > 0.95 - binomial, covered
    assert abs(np.std(scores[False]) - 1) < STANDARD_ERRORS / (2 * REPEATS) ** 0.5
    assert np.std(scores[True]) < 1 + STANDARD_ERRORS / (2 * REPEATS) ** 0.5


def test_errors_over_datapoints_cover(ledgers: dict[str, pg.GapLedger]) -> None:
    """Over repeats with other data: the mean of all datapoints lies within the interval of those at hand."""
    data = draws_of(MODEL, NUMBER * REPEATS, seed=5)[0]
    values = []
    for guide in (worse(), better()):
        mean, scale = guide.parameters_of(data)
        values.append(MODEL.elbo(data, mean, scale=scale).detach().numpy())
    truth, number = float((values[0] - values[1]).mean()), 0
    for repeat in range(REPEATS):
        rows = slice(repeat * NUMBER, (repeat + 1) * NUMBER)
        pair = Pair(
            *(_with(ledgers[name], elbo=of[rows]) for name, of in zip(("worse", "better"), values, strict=True))
        )
        low, high = pair._difference("elbo", "").ends
        assert low == high
        number += abs(low.mean - truth) < 2.02 * low.standard_error  # Student's t of 39 degrees of freedom
    assert abs(number / REPEATS - 0.95) < STANDARD_ERRORS * (0.95 * 0.05 / REPEATS) ** 0.5 + 0.02  # skewed differences


def _with(ledger: pg.GapLedger, **columns: Any) -> pg.GapLedger:
    """A ledger with other columns over datapoints."""
    data = ledger.per_datapoint
    flags = {name: ("datapoint", value) for name, value in columns.items() if np.asarray(value).dtype == bool}
    numbers = {name: ("datapoint", value) for name, value in columns.items() if name not in flags}
    return replace(ledger, per_datapoint=data.assign(numbers).assign_coords(flags))


def test_one_seed_is_said_and_its_errors_are_added(ledgers: dict[str, pg.GapLedger]) -> None:
    same = replace(ledgers["better"], provenance={**ledgers["better"].provenance, "seed": 0})
    apart, together = pg.compare(ledgers["worse"], ledgers["better"]), pg.compare(ledgers["worse"], same)
    errors = [ledgers[name].per_datapoint["elbo_mcse"].values for name in ("worse", "better")]
    np.testing.assert_allclose(apart.per_datapoint["elbo_mcse"][0], np.hypot(*errors))
    np.testing.assert_allclose(together.per_datapoint["elbo_mcse"][0], sum(errors))
    assert "The seeds differ, so Monte Carlo errors are independent." in str(apart)
    assert "measured with one seed, so their Monte Carlo errors may be correlated" in str(together)


# Verdicts


def widened(ledger: pg.GapLedger, width: Any, **columns: Any) -> pg.GapLedger:
    """A ledger whose upper bound of log p(x) lies `width` above the lower one."""
    upper = ledger.per_datapoint["log_evidence"].values + width
    return _with(ledger, log_evidence_upper=upper, **columns)


def test_no_verdict_within_the_bounds(ledgers: dict[str, pg.GapLedger]) -> None:
    better, other = ledgers["better"], ledgers["other model"]
    distance = float((better.per_datapoint["log_evidence"] - other.per_datapoint["log_evidence"]).mean())
    wide = pg.compare(widened(better, 0.0), widened(other, distance + 5.0))
    found = row(wide, "log_evidence")
    assert float(found["low"]) == pytest.approx(-5.0) and float(found["high"]) == pytest.approx(distance)
    assert str(found["verdict"].item()) == OPEN and "no verdict, the difference lies between −5.00 ± " in wide.verdict()
    narrow = pg.compare(widened(better, 0.0), widened(other, 0.01))
    assert str(row(narrow, "log_evidence")["verdict"].item()) == LARGER
    assert str(row(wide, "inference_gap")["verdict"].item()) == OPEN
    assert "…" in str(wide)


def test_no_verdict_on_datapoints_that_cannot_be_trusted(ledgers: dict[str, pg.GapLedger]) -> None:
    better, other = ledgers["better"], ledgers["other model"]
    for number, verdict in ((3, LARGER), (4, LARGER), (5, UNTRUSTED), (NUMBER, UNTRUSTED)):
        reliable = np.arange(NUMBER) >= number
        shifted = other.per_datapoint["log_evidence"].values + 1000.0 * ~reliable  # what is not trusted has no part
        doubtful = _with(other, log_evidence=shifted, log_evidence_reliable=reliable)
        comparison = pg.compare(better, widened(doubtful, 0.01))
        found = row(comparison, "log_evidence")
        assert str(found["verdict"].item()) == verdict and int(found["num_trusted"]) == NUMBER - number
        assert comparison.per_datapoint["log_evidence_trusted"].values[0].tolist() == reliable.tolist()
        if verdict == UNTRUSTED:
            assert f"no verdict, because only {NUMBER - number} of 40 datapoints can be trusted" in comparison.verdict()
        else:
            assert f"on the {NUMBER - number} of 40 datapoints that can be trusted" in comparison.verdict()


def test_no_verdict_without_an_upper_bound(ledgers: dict[str, pg.GapLedger]) -> None:
    data = ledgers["other model"].per_datapoint.drop_vars(["log_evidence_upper", "log_evidence_upper_mcse"])
    comparison = pg.compare(ledgers["better"], replace(ledgers["other model"], per_datapoint=data))
    assert str(row(comparison, "log_evidence")["verdict"].item()) == UNTRUSTED and "not bounded" in str(comparison)
    pg.plot_comparison(comparison)
    quantities = {**ledgers["other model"].provenance["quantities"]}
    quantities["log_evidence"] = {**quantities["log_evidence"], "direction": "consistent estimate"}
    estimated = {**ledgers["other model"].provenance, "quantities": quantities}
    comparison = pg.compare(ledgers["better"], replace(ledgers["other model"], provenance=estimated))
    assert str(row(comparison, "log_evidence")["verdict"].item()) == UNTRUSTED


def test_no_verdict_on_refinements_that_have_not_converged(ledgers: dict[str, pg.GapLedger]) -> None:
    data = ledgers["better"].per_datapoint.copy(deep=True)
    data["converged"][:10] = False
    comparison = pg.compare(ledgers["worse"], replace(ledgers["better"], per_datapoint=data))
    verdicts = {
        name: str(row(comparison, name)["verdict"].item()) for name in comparison.differences["quantity"].values
    }
    assert verdicts["approximation_gap"] == verdicts["amortization_gap"] == UNTRUSTED
    assert verdicts["inference_gap"] == LARGER  # which rests on no refinement
    assert "b: refinement had not converged for 25% of the datapoints" in str(comparison)


def test_a_ledger_beside_itself(ledgers: dict[str, pg.GapLedger]) -> None:
    comparison = pg.compare(ledgers["worse"], ledgers["worse"])
    assert (comparison.differences["mean"] == 0).all() and {*comparison.differences["verdict"].values[0]} == {SAME}
    assert "No part of it differs by more than its error." in comparison.verdict()


# Several, saved ones, and some datapoints


def test_several_ledgers_and_their_names(ledgers: dict[str, pg.GapLedger], tmp_path: Path) -> None:
    comparison = pg.compare(ledgers, reference="better")
    assert comparison.names == ("better", "worse", "other model") and comparison.reference == "better"
    assert [*comparison.summary().index.get_level_values("other").unique()] == ["worse", "other model"]
    assert str(comparison).count("Comparison of 'better' with '") == 2
    paths = [tmp_path / "runs" / "first" / "ledger.nc", tmp_path / "second.nc"]
    for path, name in zip(paths, ("worse", "better"), strict=True):
        ledgers[name].save(path)
    loaded = pg.compare(paths[0].parent, str(paths[1]))
    assert loaded.names == ("first", "second")
    given = pg.compare(ledgers["worse"], ledgers["better"])
    np.testing.assert_array_equal(loaded.differences["mean"], given.differences["mean"])
    assert pg.compare(*paths, ledgers["other model"]).names == ("first", "second", "a")
    assert pg.compare({"x": paths[0], "y": ledgers["better"].to_datatree()}).names == ("x", "y")


def test_further_families_that_both_have() -> None:
    pair = [pg.decompose(MODEL, worse(), X, families=families, seed=seed, **ROUGH)
            for seed, families in enumerate(({"n": AutoNormal, "m": AutoNormal}, {"m": AutoNormal}))]  # fmt: skip
    comparison = pg.compare(*pair)
    names = [*comparison.differences["quantity"].values]
    assert "approximation_gap[m]" in names and "elbo_refined[m]" in names and "approximation_gap[n]" not in names
    three = pg.compare(pair[0], pair[1], replace(pair[0], provenance={**pair[0].provenance, "seed": 5}))
    order = [*three.differences["quantity"].values]
    assert order[: len(names)] == names and "approximation_gap[n]" in order
    assert np.isnan(float(row(three, "approximation_gap[n]", "b")["mean"]))
    assert "approximation gap, n" not in str(three).split("Comparison of")[1]
    pg.plot_comparison(three)


def test_datapoints_are_paired_by_their_numbers(ledgers: dict[str, pg.GapLedger]) -> None:
    part = ledgers["worse"].sel([7, 3, 11])
    comparison = pg.compare(part, ledgers["better"])
    assert sorted(comparison.per_datapoint["datapoint"].values) == [3, 7, 11]
    whole = pg.compare(ledgers["worse"], ledgers["better"]).per_datapoint
    xr.testing.assert_allclose(
        comparison.per_datapoint["elbo"].sortby("datapoint"), whole["elbo"].sel(datapoint=[3, 7, 11])
    )
    assert "Left out: 37 datapoints" in str(comparison) and "over 3 datapoints" in str(comparison)
    one = pg.compare(part.sel([3]), ledgers["better"])
    assert "over 1 datapoint, paired" in str(one)


def test_datapoints_without_finite_bounds_are_left_out(ledgers: dict[str, pg.GapLedger]) -> None:
    elbo = ledgers["better"].per_datapoint["elbo"].values.copy()
    elbo[4] = -np.inf
    infinite = {**ledgers["better"].provenance, "infinite": [{"datapoint": 4, "bounds": ["L[q]"], "sites": []}]}
    comparison = pg.compare(ledgers["worse"], replace(_with(ledgers["better"], elbo=elbo), provenance=infinite))
    assert int(row(comparison, "elbo")["num_datapoints"]) == NUMBER - 1 and "Left out: 1 datapoint" in str(comparison)
    assert np.isfinite(comparison.differences["mean"]).all() and "b: 1 of 40 datapoints has no finite" in str(
        comparison
    )
    elbo[:] = -np.inf
    with pytest.raises(pg.InputError, match="ledgers 'a' and 'b': no datapoint has finite bounds in both"):
        pg.compare(ledgers["worse"], replace(_with(ledgers["better"], elbo=elbo), provenance=infinite))


# Refusals


class Fixed(nn.Module):
    """A guide of one latent dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc.expand(len(x)), 1.0))


def likelihood(kind: Callable[[Tensor], Any], factor: float | None = None) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", kind(z[:, None].expand(x.shape)).to_event(1), obs=x)
            if factor is not None:
                pyro.factor("extra", factor * z)

    return model


COUNTS = torch.tensor([[0.0, 3.0], [1.0, 2.0], [4.0, 0.0], [2.0, 255.0]])


def rough(model: Any, x: Tensor = COUNTS) -> pg.GapLedger:
    return pg.decompose(model, Fixed(), x, **ROUGH)


def poisson(z: Tensor) -> Any:
    return dist.Poisson(z.exp())


def normal(z: Tensor) -> Any:
    return dist.Normal(z, 1.0)


def test_other_base_measures_are_refused() -> None:
    counts, densities, scaled = (
        rough(likelihood(poisson)),
        rough(likelihood(normal)),
        rough(likelihood(normal), COUNTS / 255),
    )
    kinds = [ledger.provenance["observed_sites"][0]["measure"] for ledger in (counts, densities, scaled)]
    assert kinds == ["discrete", "continuous", "continuous"]
    with pytest.raises(
        pg.InputError, match=r"different base measures.*'counts' observes discrete 'x'.*'pixels' observes cont"
    ):
        pg.compare({"counts": counts, "pixels": densities})
    with pytest.raises(pg.InputError, match=r"whole numbers from 0 to 255.*real numbers from 0 to 1\).*in other units"):
        pg.compare({"counts": densities, "pixels": scaled})
    with pytest.raises(pg.InputError, match="different base measures"):
        pg.compare(counts, scaled)
    # Other densities by volume, and other probabilities, may be compared.
    assert pg.compare(densities, rough(likelihood(lambda z: dist.Laplace(z, 1.0)))).provenance["one_model"] == {
        "b": False
    }
    assert pg.compare(counts, rough(likelihood(lambda z: dist.Geometric(logits=z)))).names == ("a", "b")


def test_factors_have_no_known_measure() -> None:
    pair = [rough(likelihood(normal, factor)) for factor in (0.1, 0.2)]
    with pytest.raises(pg.InputError, match="the base measure of the factor 'extra' is not known"):
        pg.compare(*pair)
    assert pg.compare(pair[0], pair[0]).provenance["one_model"] == {"b": True}
    with pytest.raises(pg.InputError, match="different base measures"):
        pg.compare(pair[0], rough(likelihood(normal)))


def test_other_data_are_refused_by_name() -> None:
    model = likelihood(normal)
    x = torch.randn(9, 2)
    changed = x.clone()
    changed[[2, 5], 1] += 0.01
    first = rough(model, x)
    with pytest.raises(
        pg.InputError, match="ledgers 'old' and 'new': the data differ at 2 datapoints, first at datapoint 2"
    ):
        pg.compare({"old": first, "new": rough(model, changed)})
    with pytest.raises(pg.InputError, match="the same, but in another order"):
        pg.compare(first, rough(model, x.flip(0)))
    with pytest.raises(pg.InputError, match="the data differ at 9 datapoints"):
        pg.compare(first, rough(model, torch.randn(9, 2)))
    with pytest.raises(pg.InputError, match="no datapoint is in both"):
        pg.compare(first.sel([0, 1]), first.sel([2, 3]))
    assert pg.compare(first, rough(model, x[:4])).per_datapoint.sizes["datapoint"] == 4


def test_what_cannot_be_compared_is_refused(ledgers: dict[str, pg.GapLedger], tmp_path: Path) -> None:
    first = ledgers["worse"]
    shared = replace(first, shared=xr.Dataset(), provenance={**first.provenance, "shared": {"names": "theta"}})
    older = replace(first, per_datapoint=first.per_datapoint.drop_vars("data_fingerprint"))
    for given, message in (
        ((), "^ledgers: there is nothing to compare"),
        ((first,), "^ledgers: there is nothing to compare"),
        ((first, 3), "^ledger 'b': must be a GapLedger or the path of a saved one, got a int"),
        ((first, tmp_path / "none.nc"), r"none\.nc: no such file"),
        ((first, tmp_path), r"ledger\.nc: no such file"),
        ((first, shared), "^ledger 'b': its datapoints share theta"),
        ((first, older), "^ledger 'b': it does not record which data it is of.*Measure it again"),
    ):
        with pytest.raises(pg.InputError, match=message):
            pg.compare(*given)
    with pytest.raises(pg.InputError, match=r"reference: there is no ledger 'wrose'\. Did you mean 'worse'\?"):
        pg.compare(ledgers, reference="wrose")
    with pytest.raises(pg.InputError, match=r"comparison: must be a Comparison, got 3\. Pass what compare returned"):
        pg.plot_comparison(3)  # type: ignore[arg-type]


# Forms


def test_tables_in_every_form(ledgers: dict[str, pg.GapLedger]) -> None:
    comparison = pg.compare({"<a>&": ledgers["worse"], "b_%": ledgers["better"], "c": ledgers["other model"]})
    html = "".join(ElementTree.fromstring(f"<body>{comparison._repr_html_()}</body>").itertext())
    for other in comparison.names[1:]:
        assert comparison.verdict(other) in html and comparison.verdict(other) in str(comparison)
    assert "<a>& − b_%" in html and r"\textless{}a\textgreater{}\&" in comparison.to_latex()
    assert r"\footnotesize s.e.: standard error of the paired difference over datapoints" in comparison.to_latex()
    assert comparison.to_latex(label="tab:c").count(r"\label{tab:c-") == 2
    assert comparison.to_markdown().count("| inference gap |") == 2
    frame = comparison.summary()
    assert {"mean", "standard_error", "mcse", "low", "high", "verdict"} <= {*frame.columns}
    assert frame["mean"].notna().all() and repr(comparison) == str(comparison)


def test_the_plot(ledgers: dict[str, pg.GapLedger]) -> None:
    comparison = pg.compare(ledgers)
    figure = pg.plot_comparison(comparison)
    assert isinstance(figure, Figure) and len(figure.axes) == 2
    for ax, other in zip(figure.axes, comparison.names[1:], strict=True):
        labels = [tick.get_text() for tick in ax.get_yticklabels()]
        place = labels.index("amortization gap")
        point = next(line for line in ax.lines if line.get_marker() == "o" and line.get_ydata()[0] == place)
        assert point.get_xdata()[0] == pytest.approx(float(row(comparison, "amortization_gap", other)["low"]))
        assert other in ax.get_title(loc="left")
