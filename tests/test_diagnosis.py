"""What a diagnosis says: the same verdict with a split, none on numbers that cannot be trusted, what families save."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import xarray as xr
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.evidence.reliability import enough_trusted
from pyrogaps.gaps.diagnose import Diagnosis, diagnosis
from pyrogaps.gaps.savings import Saving, savings_of
from pyrogaps.gaps.terms import Columns, Mean, leaves_below, measured_gaps, ranked
from pyrogaps.guides.amortized import AmortizedMultivariateNormal, AmortizedNormal
from pyrogaps.guides.flows import AmortizedFlow, AutoLocalFlow
from pyrogaps.guides.local import AutoLocalMultivariateNormal
from pyrogaps.guides.mixture import AutoLocalMixture
from pyrogaps.refine import own_family
from pyrogaps.refine.same import is_own_family
from pyrogaps.report.sections import verdict_of
from pyrogaps.run import Run
from tests.references import STANDARD_ERRORS, WrongEncoder, WrongFullEncoder, anisotropic, draws_of

MODEL = anisotropic(6, 3)
X = draws_of(MODEL, 30)[0]
FAMILIES = {"mean-field": AutoNormal, "full covariance": AutoLocalMultivariateNormal}
SETTINGS: dict[str, Any] = {"num_particles": 400, "progress": False, "refinement": pg.Refinement(num_steps=200)}


@pytest.fixture(scope="module")
def ledger() -> pg.GapLedger:
    return pg.decompose(MODEL, WrongEncoder(MODEL), X, families=FAMILIES, **SETTINGS)


# A split


def tree(parts: bool, **gaps: tuple[float, float]) -> xr.Dataset:
    """A tree of gaps with these means and standard errors; the inference gap is the sum of the top-level ones."""
    kept = {name: gap for name, gap in gaps.items() if parts or name not in PARTS}
    total = sum(mean for name, (mean, _) in gaps.items() if name not in PARTS)
    means = {name: Mean(*pair, 0.0) for name, pair in {"inference_gap": (total, 0.1), **kept}.items()}

    def given(mean: Mean, columns: Columns) -> Mean:
        return mean

    terms = [replace(term, value=partial(given, means[term.id])) for term in pg.TERMS if term.id in means]
    return measured_gaps(Columns(xr.Dataset()), [replace(term, applies=lambda columns: True) for term in terms])[0]


PARTS = ("capacity_gap", "optimization_gap", "generalization_gap")
SPLITS: list[tuple[dict[str, tuple[float, float]], str, str]] = [
    # No part is as large as the approximation gap, which is far smaller than their sum.
    (
        {
            "approximation_gap": (1.6, 0.1),
            "amortization_gap": (4.0, 0.2),
            "capacity_gap": (1.4, 0.1),
            "optimization_gap": (1.3, 0.1),
            "generalization_gap": (1.3, 0.1),
        },
        "Mostly the amortization gap.",
        "Within the amortization gap, no single cause: the capacity gap, the optimization gap and the generalization "
        "gap differ by less than two standard errors.",
    ),
    # Equal at the top; one part is all of it, and another is negative.
    (
        {
            "approximation_gap": (1.0, 0.1),
            "amortization_gap": (1.0, 0.1),
            "capacity_gap": (1.5, 0.1),
            "optimization_gap": (0.0, 0.1),
            "generalization_gap": (-0.5, 0.1),
        },
        "No single cause: the approximation gap and the amortization gap differ by less than two standard errors.",
        "Within the amortization gap, mostly the capacity gap.",
    ),
    (
        {
            "approximation_gap": (3.0, 0.1),
            "amortization_gap": (0.1, 0.1),
            "capacity_gap": (0.1, 0.2),
            "optimization_gap": (0.0, 0.2),
            "generalization_gap": (0.0, 0.2),
        },
        "Mostly the approximation gap.",
        "",
    ),
    (
        {
            "approximation_gap": (0.2, 0.1),
            "amortization_gap": (1.0, 0.1),
            "capacity_gap": (0.4, 0.3),
            "optimization_gap": (0.3, 0.3),
            "generalization_gap": (0.3, 0.3),
        },
        "Mostly the amortization gap.",
        "Within the amortization gap, no part exceeds its error.",
    ),
]


@pytest.mark.parametrize(("gaps", "first", "second"), SPLITS)
def test_a_split_does_not_change_the_verdict(gaps: dict[str, tuple[float, float]], first: str, second: str) -> None:
    whole, split = (diagnosis(tree(parts, **gaps), ()) for parts in (False, True))
    assert whole.verdict == first
    assert split.verdict == f"{first} {second}".strip()
    assert split.dominant == whole.dominant
    assert [finding.gap for finding in split.within()] == [finding.gap for finding in whole.within()]
    assert "split=Split(train_data)" not in str(split)


def test_parts_are_ranked_within_their_gap_in_text_and_html() -> None:
    found = diagnosis(tree(True, **SPLITS[1][0]), ())
    assert found.dominant is None and found.dominant_within("amortization_gap") == "capacity_gap"
    assert [finding.gap for finding in found.within("amortization_gap")] == list(PARTS)
    order = ["approximation_gap", "amortization_gap", *PARTS]
    assert [finding.gap for finding in found.findings] == order
    lines = found.ranking.splitlines()
    assert lines[1].startswith("1. approximation gap") and lines[2].startswith("2. amortization gap")
    assert [line[:17] for line in lines[3:]] == ["   - capacity gap", "   - optimization", "   - generalizati"]
    html = ElementTree.fromstring(found._repr_html_())
    assert [len(item.findall("ul/li")) for item in html.findall("ol/li")] == [0, 3]


def test_the_pages_first_rank_is_that_of_gaps_with_a_cause(ledger: pg.GapLedger) -> None:
    parts = tree(True, **SPLITS[0][0])
    assert ranked(parts) == ["approximation_gap", "amortization_gap"]
    assert leaves_below(parts, "amortization_gap") == list(PARTS) and not leaves_below(parts, "approximation_gap")
    page = verdict_of(replace(ledger, gaps=parts))
    assert [len(finding["parts"]) for finding in page["findings"]] == [3, 0]


# Numbers that cannot be trusted


def with_flags(ledger: pg.GapLedger, reliable: int, converged: int) -> pg.GapLedger:
    """The ledger with so many reliable datapoints, and so many whose refinement has converged."""
    data = ledger.per_datapoint.copy(deep=True)
    data["log_evidence_reliable"].values[:] = np.arange(len(X)) < reliable
    data["converged"].values[:, 0] = np.arange(len(X)) < converged
    return replace(ledger, per_datapoint=data)


@pytest.mark.parametrize(
    ("reliable", "converged", "doubts"),
    [
        (30, 30, []),
        (27, 27, []),
        (26, 30, ["log p(x) is reliable for only 26 of 30 datapoints"]),
        (0, 30, ["log p(x) is reliable for only 0 of 30 datapoints"]),
        (30, 26, ["refinement has converged for only 26 of 30 datapoints"]),
        (
            3,
            2,
            [
                "log p(x) is reliable for only 3 of 30 datapoints",
                "refinement has converged for only 2 of 30 datapoints",
            ],
        ),
    ],
)
def test_no_verdict_below_nine_in_ten(ledger: pg.GapLedger, reliable: int, converged: int, doubts: list[str]) -> None:
    found = with_flags(ledger, reliable, converged).diagnose()
    before = ledger.diagnose()
    assert [reason for reason, _ in found.doubts] == doubts
    if not doubts:
        assert found.verdict == before.verdict and found.dominant == before.dominant == "amortization_gap"
        return
    assert found.verdict.startswith(f"No verdict: {' and '.join(doubts)}. ")
    assert found.dominant is None and str(found).count("Mostly") == 0
    gaps = {finding.gap: finding for finding in found.findings}
    assert not gaps["approximation_gap"].certain and np.isnan(gaps["approximation_gap"].share)
    # The amortization gap has no part in log p(x): it is what it was, where refinement can be trusted.
    assert gaps["amortization_gap"].certain == (converged == 30)
    assert np.isnan(gaps["amortization_gap"].share) == (reliable < 27 or converged < 27)
    assert "The inference gap is" not in str(found)


def test_a_comparison_and_a_diagnosis_have_one_rule(ledger: pg.GapLedger) -> None:
    """They give a verdict on the approximation gap for the same numbers of converged refinements."""
    other = replace(ledger, provenance={**ledger.provenance, "seed": 5})
    for converged in (25, 26, 27, 28):
        doubtful = with_flags(ledger, 30, converged)
        row = pg.compare(doubtful, other).differences.sel(other="b", quantity="approximation_gap")
        assert (str(row["verdict"].item()) == "not trusted") == bool(doubtful.diagnose().doubts) == (converged < 27)


def test_the_rule_is_exact() -> None:
    for number in (*range(10, 2000, 10), 10**6, 10**9):
        assert enough_trusted(number - number // 10, number) and not enough_trusted(number - number // 10 - 1, number)
    assert not enough_trusted(0, 0) and not enough_trusted(0, 1) and enough_trusted(1, 1)


def test_every_form_of_the_ledger_has_the_verdict_on_it(ledger: pg.GapLedger) -> None:
    doubtful = with_flags(ledger, 0, 30)
    said = "No verdict: log p(x) is reliable for only 0 of 30 datapoints. Spend more on evidence."
    assert said in str(doubtful.diagnose()) and said in doubtful.diagnose()._repr_html_()
    assert verdict_of(doubtful)["verdict"] == said
    assert doubtful.sel([1, 2]).diagnose().verdict.startswith("No verdict: log p(x) is reliable for only 0 of 2")


# Further families


def test_what_a_family_saves_is_the_exact_difference_with_the_error_of_its_pairs(ledger: pg.GapLedger) -> None:
    """For a Gaussian posterior a full covariance saves the whole approximation gap, which has a closed form."""
    first, last = ledger.diagnose().savings
    assert (first.family, last.family) == ("full covariance", "mean-field")
    exact = float(MODEL.approximation_gap().detach())
    data = ledger.per_datapoint
    bounds = data["elbo_refined"]
    pairs = (bounds.sel(family="full covariance") - bounds.sel(family="own")).values
    errors = data["elbo_refined_mcse"].sel(family=["full covariance", "own"]).values
    mcse = np.sqrt((errors**2).sum()) / len(X)
    assert first.error == pytest.approx(np.hypot(pairs.std(ddof=1) / len(X) ** 0.5, mcse))
    assert exact > 10 * mcse
    assert abs(first.nats - exact) < STANDARD_ERRORS * mcse
    assert last.same and not first.same and first.certain and not last.certain
    # log p(x) has no part in it: the difference of both families' approximation gaps is the same.
    gaps = data["family_approximation_gap"]
    assert first.nats == pytest.approx(float((gaps.sel(family="own") - gaps.sel(family="full covariance")).mean()))
    text = str(ledger.diagnose())
    assert f"full covariance would save {first.nats:.3f} ± {first.error:.3f} nats of it" in text
    assert "mean-field is the guide's own family" in text
    assert "decompose(families=" not in text and "What usually helps: a richer family." in text


def test_families_are_advised_where_none_was_measured(ledger: pg.GapLedger) -> None:
    alone = ledger.per_datapoint.isel(family=[0])
    said = "decompose(families=...) measures how much it would gain"
    assert said in str(replace(ledger, per_datapoint=alone).diagnose())
    # The guide's own family is none.
    own = ledger.per_datapoint.sel(family=["own", "mean-field"])
    text = str(replace(ledger, per_datapoint=own).diagnose())
    assert said in text and "Measured: mean-field is the guide's own family." in text


def test_a_family_that_saves_nothing(ledger: pg.GapLedger) -> None:
    """The own family under another name, not known as such; one that is worse; one that has not converged."""
    data = ledger.per_datapoint.copy(deep=True)
    data["elbo_refined"].loc[{"family": "full covariance"}] = data["elbo_refined"].sel(family="own").values - 1.0
    data["converged"].loc[{"family": "full covariance"}] = np.arange(len(X)) < 20
    found = replace(ledger, per_datapoint=data, provenance={**ledger.provenance, "same_families": []}).diagnose()
    first, last = found.savings
    assert first.family == "mean-field" and not first.certain and first.unconverged == 0.0
    assert f"mean-field would save nothing beyond the error ({abs(first.nats):.3f}" in str(found).replace("(-", "(")
    assert last.nats == pytest.approx(-1.0) and last.unconverged == pytest.approx(1 / 3)
    assert "full covariance would save nothing, because its gap is 1.000 ± " in str(found)
    assert "or more: its refinement has not converged for 33% of the datapoints" in str(found)
    assert "What usually helps: a richer family than those measured." in str(found)


def test_savings_stand_where_log_evidence_cannot_be_trusted(ledger: pg.GapLedger) -> None:
    """They do not rest on it."""
    found = with_flags(ledger, 0, 30).diagnose()
    assert found.savings == ledger.diagnose().savings
    (line,) = [line for line in str(found).splitlines() if "approximation gap" in line]
    assert "no verdict, because log p(x) is reliable for only 0 of 30 datapoints. Measured: full covariance" in line


def test_savings_of_shared_latents_have_the_error_of_the_draws(ledger: pg.GapLedger) -> None:
    draws = np.array([[-1.0, -0.5], [-1.2, -0.9], [-0.9, -0.1]])
    shared = xr.Dataset({"elbo_refined": (("draw", "family"), draws)}, {"family": ["own", "full covariance"]})
    data = ledger.per_datapoint.sel(family=["own", "full covariance"])
    (saving,) = savings_of(data, shared)
    (alone,) = savings_of(data, None)
    pairs = (data["elbo_refined"].isel(family=1) - data["elbo_refined"].isel(family=0)).values
    expected = np.hypot(pairs.std(ddof=1) / len(X) ** 0.5, np.diff(draws)[:, 0].std(ddof=1) / 3**0.5)
    assert saving.nats == alone.nats and saving.error == pytest.approx(expected)


class FixedScale(WrongEncoder):
    """The scale is not learned: a smaller family than that of all independent normals."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            mean, _ = self.parameters_of(x)
            pyro.sample("z", dist.Normal(mean, 1.0).to_event(1))


class OneScale(WrongEncoder):
    """One scale for all elements."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            mean, scale = self.parameters_of(x)
            pyro.sample("z", dist.Normal(mean, scale[:, :1].expand_as(mean)).to_event(1))


def flow(**settings: Any) -> Callable[[Any], Any]:
    return lambda model: AutoLocalFlow(model, **settings)


SAME: list[tuple[Callable[[], nn.Module], Any, bool]] = [
    (lambda: WrongEncoder(MODEL), AutoNormal, True),
    (lambda: AmortizedNormal(6, 3, (4,)).double(), AutoNormal, True),
    (lambda: WrongEncoder(MODEL), AutoLocalMultivariateNormal, False),
    (lambda: FixedScale(MODEL), AutoNormal, False),
    (lambda: OneScale(MODEL), AutoNormal, False),
    (lambda: WrongFullEncoder(MODEL), AutoLocalMultivariateNormal, True),
    (lambda: AmortizedMultivariateNormal(6, 3, (4,)).double(), AutoLocalMultivariateNormal, True),
    (lambda: WrongFullEncoder(MODEL), AutoNormal, False),
    (lambda: AmortizedFlow(6, 3, (4,), num_steps=2, flow_hidden=3).double(), flow(num_steps=2, hidden=3), True),
    (lambda: AmortizedFlow(6, 3, (4,), num_steps=2, flow_hidden=3).double(), flow(num_steps=2, hidden=4), False),
    (lambda: AmortizedFlow(6, 3, (4,), num_steps=2, flow_hidden=3).double(), AutoLocalMixture, False),
]


@pytest.mark.parametrize(("guide", "family", "same"), SAME)
def test_the_guides_own_family_is_known(guide: Callable[[], nn.Module], family: Any, same: bool) -> None:
    problem = pg.Problem.of(MODEL, guide(), X)
    assert is_own_family(own_family(problem.guide_density()), family, problem, Run(0)) == same


def test_in_one_dimension_a_full_covariance_is_none() -> None:
    model = anisotropic(4, 1)
    problem = pg.Problem.of(model, WrongEncoder(model), draws_of(model, 5)[0])
    own = own_family(problem.guide_density())
    assert all(is_own_family(own, family, problem, Run(0)) for family in FAMILIES.values())


def test_the_ledger_says_which_family_is_the_guides_own(ledger: pg.GapLedger) -> None:
    remark = "the family 'mean-field' is the guide's own family, so its rows estimate the same values again"
    assert f"Note: T{remark[1:]}." in str(ledger) and f"Note: {remark}." in str(ledger.diagnose())
    assert "'full covariance' is the guide's own" not in str(ledger)
    back = pg.GapLedger.from_datatree(ledger.to_datatree())
    assert str(back.diagnose()) == str(ledger.diagnose()) and back.diagnose().savings == ledger.diagnose().savings


def test_the_words_on_a_saving() -> None:
    assert str(Saving("flow", 0.945, 0.02)) == "flow would save 0.945 ± 0.020 nats of it"
    assert str(Saving("flow", 0.945, 0.02, same=True)) == "flow is the guide's own family"
    empty = Diagnosis((), None, ())
    assert empty.savings == () and empty.within() == []
