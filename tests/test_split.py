"""The amortization gap in three: closed forms, the ledger that holds it, how phi-hat is found, refusals, advice."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

import pyrogaps as pg
from benchmarks import whose_fault
from pyrogaps.density.copies import copied
from pyrogaps.gaps.decomposition import Decomposition
from pyrogaps.gaps.diagnose import diagnosis
from pyrogaps.gaps.retrain import _candidates, trainable
from pyrogaps.gaps.terms import Columns, Mean, measured_gaps
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.guides.auxiliary_flows import AmortizedAuxiliaryFlow
from pyrogaps.guides.mixture import AmortizedMixture
from pyrogaps.guides.sequential import StructuredNormal
from pyrogaps.models.dmm import DeepMarkovModel
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.run import Run
from pyrogaps.streams import seeded
from pyrogaps.training import Training
from tests.references import anisotropic, draws_of

STANDARD_ERRORS = 4.0
GAPS = list(whose_fault.GAPS)
TINY: dict[str, Any] = {
    "evidence": pg.AIS(num_chains=2, num_temperatures=4, num_leapfrog=2),
    "refinement": pg.Refinement(num_steps=20),
    "num_particles": 20,
    "progress": False,
}
QUICK = pg.Retraining(Training(num_epochs=2, learning_rate=1e-2), max_rounds=2, num_datapoints=40)


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def pair(seed: int = 0) -> tuple[LinearGaussian, AmortizedNormal, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = anisotropic(4, 2)
    x, _ = draws_of(model, 130)
    return model, AmortizedNormal(4, 2, (3,)).double(), x[:100], x[100:]


def split_ledger(retraining: pg.Retraining = QUICK, **options: Any) -> pg.GapLedger:
    model, guide, train, test = pair()
    return pg.decompose(model, guide, test, split=pg.Split(train, retraining), **{**TINY, **options})


@pytest.mark.parametrize("cause", GAPS)
def test_children_are_those_of_the_closed_form_and_the_cause_is_named(cause: str) -> None:
    ledger, exact = whose_fault.measured(whose_fault.CASES[cause](0), seed=0)
    summary = ledger.summary()
    for gap in GAPS:
        off = summary.loc[gap, "mean"] - exact[gap]
        # A refinement of 300 steps is short of its optimum by less than a thousandth.
        assert abs(off) < STANDARD_ERRORS * summary.loc[gap, "mcse"] + 1e-3, f"{gap}: off by {off} of {exact}"
    assert max(exact, key=lambda gap: exact[gap]) == cause
    diagnosis = ledger.diagnose()
    assert diagnosis.dominant_within("amortization_gap") == cause
    name = str(ledger.gaps["label"].sel(gap=cause).item())
    assert diagnosis.verdict.endswith(f" Within the amortization gap, mostly the {name}.")


@pytest.mark.usefixtures("brief_check")
def test_children_sum_to_their_parent() -> None:
    summary = split_ledger().summary()
    assert list(summary.index[-4:]) == ["amortization_gap", *GAPS]
    assert summary.loc[GAPS, "mean"].sum() == pytest.approx(summary.loc["amortization_gap", "mean"], abs=1e-12)
    assert np.isfinite(summary.loc[GAPS, ["standard_error", "mcse"]].to_numpy(float)).all()


def test_data_simulated_without_end_leave_nothing_to_generalise() -> None:
    """With data from the model on either side, no generalization gap is left; the rest of the split is as ever."""
    model, guide, train, _ = pair()
    for parameter in guide.parameters():
        parameter.data.mul_(1.1)
    endless = pg.SimulatedData(model, train, num_datapoints=256)
    with seeded(9, "evaluated"):
        x = endless.fetch(torch.arange(120))
    retraining = pg.Retraining(Training(num_epochs=8, learning_rate=2e-2), num_restarts=0, num_datapoints=120)
    options = {**TINY, "refinement": pg.Refinement(num_steps=100), "num_particles": 100}
    ledger = pg.decompose(model, guide, x, split=pg.Split(endless, retraining), **options)
    gaps = ledger.summary().loc[GAPS]
    generalization = gaps.loc["generalization_gap"]
    assert abs(generalization["mean"]) < STANDARD_ERRORS * generalization["standard_error"]
    assert gaps.loc["optimization_gap", "mean"] > STANDARD_ERRORS * gaps.loc["optimization_gap", "standard_error"]
    assert ledger.diagnose().dominant_within("amortization_gap") != "generalization_gap"


@pytest.mark.usefixtures("brief_check")
def test_the_ledger_keeps_its_split(tmp_path: Path) -> None:
    ledger = split_ledger()
    ledger.to_datatree().to_netcdf(tmp_path / "ledger.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "ledger.nc", engine="h5netcdf") as tree:
        back = pg.GapLedger.from_datatree(tree.load())
    assert str(back) == str(ledger)
    assert str(back.diagnose()) == str(ledger.diagnose())
    whole = replace(ledger, gaps=ledger.gaps.sel(gap=[name for name in ledger.gaps["gap"].values if name not in GAPS]))
    assert ledger.diagnose().verdict.startswith(whole.diagnose().verdict)
    assert ledger.diagnose().dominant == whole.diagnose().dominant
    assert "split=Split(" in str(whole.diagnose()) and "split=Split(" not in str(ledger.diagnose())
    assert "   ├─ capacity gap" in str(ledger)
    assert "   └─ generalization gap" in str(ledger)
    assert "Retraining (phi-hat): 2 starts, " in str(ledger.table("full"))
    assert back.training is not None
    assert back.training.sizes["training_datapoint"] == 40


@pytest.mark.usefixtures("brief_check")
def test_the_split_is_drawn_below_its_parent() -> None:
    ledger = split_ledger()
    for source in (ledger, ledger.to_datatree()):
        ax = pg.plot_gaps(source)
        labels = [label.get_text().strip() for label in ax.get_yticklabels()]
        assert labels == [
            "inference gap",
            "approximation",
            "amortization",
            "capacity",
            "optimization",
            "generalization",
        ]
    start = ledger.summary().loc["approximation_gap", "mean"]
    assert min(patch.get_x() for patch in ax.patches[-3:-2]) == pytest.approx(start)


@pytest.mark.usefixtures("brief_check")
def test_model_and_guide_are_left_as_they_were() -> None:
    model, guide, train, test = pair()
    before = [value.clone() for value in (*model.parameters(), *guide.parameters())]
    whole = pg.decompose(model, guide, test, **TINY)
    ledger = pg.decompose(model, guide, test, split=pg.Split(train, QUICK), **TINY)
    for value, kept in zip((*model.parameters(), *guide.parameters()), before, strict=True):
        assert torch.equal(value, kept)
    pd.testing.assert_frame_equal(ledger.summary().drop(index=GAPS), whole.summary())


@pytest.mark.usefixtures("brief_check")
def test_phi_hat_is_never_worse_than_the_guide() -> None:
    """Training that ruins the network leaves the guide itself the best."""
    ruin = replace(QUICK, training=Training(num_epochs=1, learning_rate=3.0), num_restarts=0)
    ledger = split_ledger(ruin, num_particles=400)
    row = ledger.summary().loc["optimization_gap"]
    assert abs(row["mean"]) < STANDARD_ERRORS * row["mcse"]


@pytest.mark.usefixtures("brief_check")
def test_a_run_that_was_stopped_continues_to_the_same_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = split_ledger()
    from pyrogaps.gaps import retrain

    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    original, calls = retrain.train, []

    def second_round_stops(*args: Any, **options: Any) -> Any:
        calls.append(options["seed"])
        return stop() if len(calls) == 3 else original(*args, **options)

    monkeypatch.setattr(retrain, "train", second_round_stops)
    with pytest.raises(KeyboardInterrupt):
        split_ledger(cache=tmp_path)
    monkeypatch.setattr(retrain, "train", original)
    assert len(list((tmp_path / "training").glob("retraining-*.pt"))) == 2
    continued = split_ledger(cache=tmp_path)
    pd.testing.assert_frame_equal(continued.summary(), whole.summary())


class Loose(nn.Module):
    """A guide with a parameter that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.scale = nn.Linear(4, 2).double(), nn.Parameter(torch.zeros(2).double())

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), self.scale.exp()).to_event(1))


@pytest.mark.usefixtures("brief_check")
def test_what_cannot_be_drawn_anew_starts_from_the_guide() -> None:
    """A fresh start draws what it can, and the ledger says what it could not; frozen weights stay as they are."""
    model, _, train, test = pair()
    guide = Loose()
    guide.scale.data.fill_(-1.0)
    ledger = pg.decompose(model, guide, test, split=pg.Split(train, QUICK), **TINY)
    starts = {start["start"]: start["kept"] for start in ledger.provenance["split"]["starts"]}
    assert starts == {"warm": [], "fresh 1": ["scale"]}
    assert "Note: Fresh starts reuse the guide's values of scale, because no reset_parameters() sets them" in str(
        ledger
    )
    guide.net.requires_grad_(False)
    assert [candidate.name for candidate in _candidates(guide, 2, Run(0))] == ["warm"]


@pytest.mark.parametrize(
    "guide",
    [
        AmortizedAuxiliaryFlow(4, 2, (3,), flow_hidden=3),
        AmortizedMixture(4, 2, (3,), num_components=2),
        StructuredNormal(4, 2, 3, around=DeepMarkovModel(4, 2, 3, 3), innovations=True),
    ],
    ids=lambda guide: type(guide).__name__,
)
def test_every_weight_of_our_guides_can_be_drawn_anew(guide: nn.Module) -> None:
    used = copy.deepcopy(guide)
    with torch.no_grad():
        for value in used.parameters():
            value.fill_(7.0)
    _, fresh = _candidates(used, 1, Run(0))
    assert fresh.kept == ()
    for name, value in guide.named_parameters():
        # What a new guide starts at 0 is 0 again.
        assert bool((fresh.guide.get_parameter(name).abs() < 5).all())
        assert bool((fresh.guide.get_parameter(name) == 0).all()) == bool((value == 0).all())


@pytest.mark.usefixtures("brief_check")
@pytest.mark.slow
def test_phi_hat_of_a_guide_with_auxiliary_variables_has_a_reverse_model_of_its_own() -> None:
    """Its bound is that of a guide with the same weights, so retraining from where it stands is no loss."""
    model, _, train, test = pair()
    torch.manual_seed(1)
    guide = AmortizedAuxiliaryFlow(4, 2, (3,), "Tanh", flow_hidden=3).double()
    retraining = replace(QUICK, training=Training(num_epochs=10, learning_rate=3e-2))
    ledger = pg.decompose(model, guide, test, split=pg.Split(train, retraining), **{**TINY, "num_particles": 100})
    best = ledger.provenance["split"]["starts"][0]
    assert best["elbo"][-1] > best["elbo"][0] + 0.1
    assert ledger.training is not None
    retrained = ledger.training["elbo_retrained"].values.mean()
    assert abs(retrained - max(best["elbo"])) < STANDARD_ERRORS * ledger.training["elbo_retrained_mcse"].values.mean()
    assert ledger.summary().loc[GAPS, "mean"].sum() == pytest.approx(ledger.summary().loc["amortization_gap", "mean"])


def test_a_guide_that_cannot_be_copied_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, train, test = pair()
    monkeypatch.setattr(Decomposition, "ledger", lambda *args: pytest.fail("it was measured"))
    for refused, said in (
        (with_parameters_of_the_store, "split: no module with trainable parameters was found in the guide"),
        (
            partly_of_the_store(nn.Linear(4, 2).double()),
            "guide: 'scale' is a pyro.param, which copies of the guide would share",
        ),
    ):
        with pytest.raises(pg.InputError, match=said):
            pg.decompose(model, refused, test, split=pg.Split(train, QUICK), **TINY)


def with_parameters_of_the_store(x: Tensor) -> None:
    weight = pyro.param("weight", torch.zeros(4, 2, dtype=torch.float64))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x @ weight, 1.0).to_event(1))


def partly_of_the_store(net: nn.Module) -> Any:
    def guide(x: Tensor) -> None:
        scale = pyro.param("scale", torch.ones(2, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), scale).to_event(1))

    return guide


class Both(nn.Module):
    """Model and guide as methods of one module, as in Pyro's tutorial on VAEs."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2).to(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


class AsModule(nn.Module):
    """The guide of `Both` as a module of its own, which enters its parameters in Pyro's store."""

    def __init__(self, both: Both) -> None:
        super().__init__()
        self.encoder, self.run = both.encoder, Both.guide

    def forward(self, x: Tensor) -> None:
        self.run(self, x)  # type: ignore[arg-type]


class WithScale(PyroModule):
    """Its scale is a `PyroParam`, which the store holds under the name of the attribute, also for a copy."""

    def __init__(self, encoder: nn.Linear) -> None:
        super().__init__()
        self.encoder = encoder
        self.scale = PyroParam(torch.full((2,), 0.3, dtype=torch.float64), dist.constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x)[:, :2], self.scale).to_event(1))


def methods() -> tuple[Both, Tensor, Tensor]:
    _, _, train, test = pair()
    return Both(nn.Linear(4, 4).double(), nn.Linear(2, 4).double()), train, test


def contents() -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def test_methods_and_functions_are_split_as_modules_are() -> None:
    both, train, test = methods()
    encoder = both.encoder

    def function(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    # Fresh weights would differ: other modules, in another order, draw theirs.
    summaries, warm = [], pg.Split(train, replace(QUICK, num_restarts=0))
    for guide in (AsModule(both), both.guide, function):
        ledger = pg.decompose(both.model, guide, test, split=warm, **TINY)
        (start,) = ledger.provenance["split"]["starts"]
        assert start["elbo"][-1] > start["elbo"][0]
        summaries.append(ledger.summary())
    for summary in summaries[1:]:
        pd.testing.assert_frame_equal(summary, summaries[0])


@pytest.mark.parametrize("kind", ["module", "method", "PyroParam"])
def test_a_split_changes_neither_the_guide_nor_the_store(kind: str) -> None:
    both, train, test = methods()
    guides = {"module": AsModule(both), "method": both.guide, "PyroParam": WithScale(both.encoder)}
    guide = guides[kind]
    module = both if kind == "method" else guide
    guide(test)  # enters the parameters in the store, as training does
    before, held = copy.deepcopy(module.state_dict()), contents()
    ledger = pg.decompose(both.model, guide, test, split=pg.Split(train, QUICK), **TINY)
    assert ledger.provenance["split"]["starts"][0]["elbo"][-1] > -1e9
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    after = contents()
    assert all(torch.equal(after[name], value) for name, value in held.items())
    assert {*after} <= {*held, "decoder$$$weight", "decoder$$$bias"}


def test_a_pyro_module_within_a_copy_runs() -> None:
    """Its context was made while parameters were not local to modules."""
    both, train, _ = methods()
    scaled = WithScale(both.encoder)
    for guide in (scaled.forward, Within(scaled)):
        other = copied(trainable(guide))
        other(train)
        assert {id(value) for value in other.parameters()}.isdisjoint(id(value) for value in scaled.parameters())
    assert not contents()


class Within(nn.Module):
    def __init__(self, guide: nn.Module) -> None:
        super().__init__()
        self.guide = guide

    def forward(self, x: Tensor) -> None:
        self.guide(x)


def test_networks_that_a_copy_would_share_are_refused() -> None:
    """They would be trained by nobody, and the split would find nothing to gain."""
    both, train, _ = methods()
    encoder, hidden = both.encoder, SimpleNamespace(net=nn.Linear(4, 4).double())

    def guide(x: Tensor) -> None:
        loc, log_scale = (encoder(x) + hidden.net(x)).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    with pytest.raises(pg.InputError, match=r"a parameter of shape \(4,.* belongs to a module that was not found"):
        pg.reference_guide(both.model, guide, train, num_epochs=1, progress=False)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_tensors_that_cannot_be_copied_are_named() -> None:
    normed = nn.utils.weight_norm(nn.Linear(4, 4))
    with pytest.raises(pg.InputError, match=r"no copy of it can be made to train .*parametrizations"):
        copied(normed)


def test_what_cannot_be_split_is_refused() -> None:
    model, guide, train, test = pair()

    def refuse(said: str, guide: Any, retraining: pg.Retraining = QUICK) -> None:
        with pytest.raises(pg.InputError, match=said):
            pg.decompose(model, guide, test, split=pg.Split(train, retraining), **TINY)

    refuse("the warm start diverged", guide, replace(QUICK, training=Training(num_epochs=9, learning_rate=1e200)))
    with pytest.raises(pg.InputError, match="Leave split out"):
        pg.decompose(model, guide, test, split=pg.Split(train, QUICK), plate=False, **TINY)
    local = AutoNormal(model)
    local(test)
    refuse("AutoNormal|parameters for each", local)


def test_latents_that_are_summed_out_cannot_be_split() -> None:
    """Training draws them from the prior, if the guide does not: a bound of another problem."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))
            mean = z[..., 0] + k
            pyro.sample("x", dist.Normal(torch.stack([mean, mean], -1), 1.0).to_event(1), obs=x)

    x = torch.randn(4, 2)
    with pytest.raises(pg.InputError, match=r"split: the guide does not draw 'k', .* or leave split out"):
        pg.decompose(model, AmortizedNormal(2, 1, (4,)), x, split=pg.Split(x, QUICK), **TINY)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_restarts": -1}, "retraining.num_restarts: must be a whole number of at least 0"),
        ({"max_rounds": 0}, "retraining.max_rounds: must be a whole number of at least 1"),
        ({"num_datapoints": 1}, "retraining.num_datapoints: must be a whole number of at least 2"),
        ({"tolerance": 0.0}, "retraining.tolerance: must be a number above 0"),
        ({"training": Training(patience=3)}, "leave patience out"),
        ({"training": Training(objective=pg.IWAE_ELBO(3))}, "leave objective out"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(pg.InputError, match=said):
        pg.Retraining(**options)


def tree_of(**gaps: tuple[float, float]) -> xr.Dataset:
    """A tree of gaps with these means and standard errors."""
    total = sum(mean for mean, _ in gaps.values())
    known = {"inference_gap": (total, 0.1), **gaps}
    means = {name: Mean(*pair, 0.0) for name, pair in known.items()}
    terms = [replace(term, value=partial(_given, means[term.id])) for term in pg.TERMS if term.id in means]
    return measured_gaps(Columns(xr.Dataset()), [replace(term, applies=lambda columns: True) for term in terms])[0]


def _given(mean: Mean, columns: Columns) -> Mean:
    return mean


def test_advice_is_ranked_and_never_within_its_error() -> None:
    told = diagnosis(tree_of(approximation_gap=(1.0, 0.1), amortization_gap=(4.0, 0.2)), ())
    assert told.dominant == "amortization_gap"
    assert [finding.gap for finding in told.findings] == ["amortization_gap", "approximation_gap"]
    assert "split=Split(train_data)" in str(told)
    near = diagnosis(tree_of(approximation_gap=(1.0, 0.3), amortization_gap=(1.4, 0.3)), ())
    assert near.dominant is None
    assert "No single cause: the amortization gap and the approximation gap differ by less than" in str(near)
    none = diagnosis(tree_of(approximation_gap=(0.1, 0.3), amortization_gap=(0.2, 0.3)), ("look out",))
    assert none.dominant is None
    assert "No gap exceeds its error" in str(none)
    assert "What usually helps" not in str(none)
    assert str(none).startswith("Warning: look out.")
    alone = diagnosis(tree_of(approximation_gap=(1.0, 0.4), amortization_gap=(0.5, 0.9)), ())
    assert alone.dominant is None
    assert (
        "approximation gap is the largest gap that exceeds its error, but the amortization gap may be as large"
        in str(alone)
    )
    below = diagnosis(tree_of(approximation_gap=(0.5, 0.1), amortization_gap=(0.7, 0.6)), ())
    assert below.dominant is None and below.findings[0].gap == "amortization_gap"
    assert str(below).startswith(
        "The approximation gap is the largest gap that exceeds its error, but the amortization gap may be as large"
    )
