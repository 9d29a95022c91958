"""`GapMonitor` and `train(callback=...)`: training is unchanged, numbers are those of `decompose`, doubts are shown."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.training.record import Record as RecordedStep

pytestmark = pytest.mark.usefixtures("brief_check")

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(2))
QUICK: dict[str, Any] = {
    "evidence": pg.Ladder(tolerance=1.0, max_evaluations=100),
    "refinement": pg.Refinement(num_steps=4, num_selection=8),
    "num_particles": 20,
}
TRAINED: dict[str, Any] = {"num_epochs": 6, "batch_size": 10, "learning_rate": 1e-2, "progress": False}
Pair = tuple[LinearGaussian, AmortizedNormal]


def pair() -> Pair:
    torch.manual_seed(1)
    return LinearGaussian.random(4, 2, noise_scale=0.7), AmortizedNormal(4, 2, (5,))


def weights(*programs: nn.Module) -> dict[str, Tensor]:
    named = {f"{n}.{k}": v for n, program in enumerate(programs) for k, v in program.state_dict().items()}
    named |= dict(pyro.get_param_store().named_parameters())
    return {name: value.detach().clone() for name, value in named.items()}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


# The callback of `train`


def test_a_callback_is_called_after_every_epoch_with_the_history_so_far() -> None:
    calls: list[tuple[int, dict[str, list[float]]]] = []

    def callback(epoch: int, history: dict[str, list[float]]) -> None:
        calls.append((epoch, {name: [*values] for name, values in history.items()}))
        history["train_elbo"].clear()  # a copy

    result = pg.train(*pair(), X, validation=X[:5], callback=callback, **TRAINED)
    assert [epoch for epoch, _ in calls] == [1, 2, 3, 4, 5, 6]
    for epoch, history in calls:
        assert history == {name: values[:epoch] for name, values in result.history.items()}


@pytest.mark.parametrize("kind", [KeyError, ValueError, StopIteration])
def test_a_callback_may_end_the_training(kind: type[Exception]) -> None:
    def callback(epoch: int, history: Any) -> None:
        if epoch == 3:
            raise kind("enough")

    with pytest.raises(kind, match="enough") as caught:
        pg.train(*pair(), X, callback=callback, **TRAINED)
    assert not isinstance(caught.value, pg.InputError)


def test_gradients_that_a_callback_leaves_are_not_added() -> None:
    ends = []
    for leaves in (False, True):
        model, guide = pair()

        def callback(epoch: int, history: Any, left: bool = leaves, guide: nn.Module = guide) -> None:
            if left:
                sum(value.sum() for value in guide.parameters()).backward()  # type: ignore[union-attr]

        pg.train(model, guide, X, mode="eager", callback=callback, **TRAINED)
        ends.append(weights(model, guide))
    assert_same(*ends)


def test_a_resumed_training_leaves_no_epoch_out(tmp_path: Any) -> None:
    epochs: list[int] = []
    for num_epochs in (3, 6):
        model, guide = pair()
        settings = {**TRAINED, "num_epochs": num_epochs, "checkpoint": tmp_path / "run.pt"}
        pg.train(model, guide, X, callback=lambda epoch, history: epochs.append(epoch), **settings)
    assert epochs == [1, 2, 3, 4, 5, 6]


# Training is not changed


@pytest.mark.parametrize("mode", ["eager", "captured"])
def test_a_training_with_a_monitor_ends_with_the_same_weights(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Which of record and Pyro is faster depends on the machine, and the two differ by rounding.
    monkeypatch.setattr(RecordedStep, "is_faster", property(lambda self: True))
    ends = []
    for monitored in (False, True):
        model, guide = pair()
        monitor = pg.GapMonitor(model, guide, X, every=5, datapoints=16, **QUICK)  # replay begins after 50 steps
        result = pg.train(
            model,
            guide,
            X,
            validation=X[:8],
            mode=mode,
            callback=monitor if monitored else None,
            **{**TRAINED, "num_epochs": 20},
        )
        assert result.mode == mode
        ends.append((weights(model, guide), result.history))
    assert [*monitor.history.index] == [5, 10, 15, 20]
    assert not monitor.history["failure"].any()
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def plain_model(x: Tensor) -> None:
    loading = pyro.param("loading", lambda: torch.linspace(-1, 1, 8).reshape(2, 4))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ loading, 1.0).to_event(1), obs=x)


class Noisy(nn.Module):
    """With dropout, so that mode and random state matter."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> None:
        pyro.module("net", self.net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), 0.7).to_event(1))


@pytest.mark.parametrize("early", [False, True])
def test_a_loop_of_pyro_ends_with_the_same_weights(early: bool) -> None:
    """Also where the monitor is called before the first step, when the parameters do not exist yet."""
    ends = []
    for monitored in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(3)
        guide = Noisy()
        monitor = pg.GapMonitor(plain_model, guide, X, every=2, datapoints=8, **QUICK)
        svi = SVI(plain_model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        losses = []
        for step in range(5):
            if monitored and early:
                monitor(step)
            losses.append(svi.step(X))
            if monitored and not early:
                monitor(step)
        ends.append((weights(guide), losses, torch.get_rng_state()))
        assert guide.training
    assert [*monitor.history.index] == [0, 2, 4]
    assert not monitor.history["failure"].any()
    assert_same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]
    assert torch.equal(ends[0][2], ends[1][2])


# Numbers


def test_numbers_are_those_of_decompose_on_the_datapoints_chosen() -> None:
    model, guide = pair()
    monitor = pg.GapMonitor(model, guide, X, datapoints=9, seed=5, **QUICK)
    ledger = monitor.measure(7)
    assert ledger is not None
    assert len({*monitor.indices.tolist()}) == 9
    expected = pg.decompose(model, guide, X[monitor.indices], seed=5, referee=False, progress=False, **QUICK)
    row, summary = monitor.history.loc[7], expected.summary()
    names = {"log_evidence": "log_evidence", "elbo": "elbo", "elbo_refined[own]": "elbo_refined"}
    names |= {str(name): str(name) for name in expected.gaps["gap"].values}
    assert len(names) == 6
    for name, column in names.items():
        assert row[column] == pytest.approx(summary.loc[name, "mean"], rel=1e-5, abs=1e-5)
        assert row[f"{column}_standard_error"] == pytest.approx(summary.loc[name, "standard_error"], rel=1e-4, abs=1e-5)
        assert row[f"{column}_mcse"] == pytest.approx(summary.loc[name, "mcse"], rel=1e-4, abs=1e-5)
    assert row["reliable"] == float(expected.per_datapoint["log_evidence_reliable"].mean())


def test_the_gap_is_the_exact_one() -> None:
    """With the default budgets, within four standard errors, Monte Carlo, of the closed form."""
    model, guide = pair()
    monitor = pg.GapMonitor(model, guide, X, datapoints=20)
    monitor.measure(0)
    row, x = monitor.history.loc[0], X[monitor.indices]
    mean, scale = guide.parameters_of(x)
    exact = (model.log_evidence(x) - model.elbo(x, mean, scale=scale)).mean().item()
    assert row["inference_gap_mcse"] < exact / 10
    assert abs(row["inference_gap"] - exact) < 4 * row["inference_gap_mcse"]
    assert row["reliable"] == row["converged"] == row["finite"] == 1


def test_steps_share_datapoints_and_randomness_and_can_be_compared() -> None:
    model, guide = pair()
    monitor = pg.GapMonitor(model, guide, X, every=1, datapoints=16, **QUICK)
    monitor(1)
    chosen = monitor.indices
    monitor(2)
    columns = [name for name in monitor.history if name != "seconds"]
    assert monitor.history.loc[1, columns].equals(monitor.history.loc[2, columns])  # nothing was trained
    pg.train(model, guide, X, **TRAINED)
    monitor(3)
    assert (monitor.indices == chosen).all()
    comparison = pg.compare(monitor.ledgers[3], monitor.ledgers[1])
    difference = comparison.differences.sel(quantity="elbo", other=comparison.names[1])
    history = monitor.history
    assert float(difference["mean"]) == pytest.approx(history.loc[3, "elbo"] - history.loc[1, "elbo"])
    assert float(difference["standard_error"]) < np.hypot(*history.loc[[1, 3], "elbo_standard_error"])


def test_a_step_measured_again_takes_the_place_of_the_first() -> None:
    model, guide = pair()
    monitor = pg.GapMonitor(model, guide, X, every=3, datapoints=4, **QUICK)
    for step in (0, 1, 2, 3, 6, 3):
        monitor(step, {"train_elbo": []})
    assert [*monitor.history.index] == [0, 3, 6]
    assert [*monitor.ledgers] == [0, 3, 6]


# Doubts


def test_what_cannot_be_measured_is_missing_with_its_reason_and_training_goes_on() -> None:
    model, guide = pair()
    written: list[tuple[int, dict[str, float]]] = []

    class Kept:
        def log(self, step: int, scalars: Any) -> None:
            written.append((step, dict(scalars)))

    monitor = pg.GapMonitor(model, guide, X, every=1, datapoints=4, writers=[Kept()], **QUICK)
    first = next(guide.parameters())
    before = first.detach().clone()
    monitor(1)
    first.data.fill_(torch.nan)
    with pytest.warns(UserWarning, match="GapMonitor: step 2 could not be measured"):
        monitor(2)
    monitor(3)  # for the same reason, which has been said
    first.data.copy_(before)
    monitor(4)
    history = monitor.history
    assert [*history.index] == [1, 2, 3, 4]
    assert [bool(text) for text in history["failure"]] == [False, True, True, False]
    assert history.loc[[2, 3], "inference_gap"].isna().all()
    assert history.loc[1, "inference_gap"] == history.loc[4, "inference_gap"]
    assert [*monitor.ledgers] == [1, 4]
    text = str(monitor)
    assert "not measured" in text and f"Warning: step 2: {history.loc[2, 'failure']}" in text
    assert [values["gaps/failed"] for _, values in written] == [0, 1, 1, 0]
    assert "gaps/inference_gap" not in written[1][1]
    assert all(np.isfinite([*values.values()]).all() for _, values in written)
    ax = pg.plot_monitor(monitor)
    crosses = next(line for line in ax.lines if line.get_label() == "not measured")
    assert [*crosses.get_xdata()] == [2, 3]
    pyplot.close("all")


def test_a_mistake_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("pyrogaps.monitor.decompose", broken)
    with pytest.raises(KeyError, match="ours"):
        pg.GapMonitor(*pair(), X, **QUICK).measure(1)


def banana(x: Tensor) -> None:
    """Posteriors of two far modes: log p(x) by so few evaluations is unreliable."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        pyro.sample("x", dist.Normal((z**2).sum(-1), 0.02), obs=x[:, 0].abs() + 4)


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([2.0, 0.0]))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc.expand(len(x), 2), 0.5).to_event(1))


def test_doubts_are_shown_in_table_picture_history_and_to_writers() -> None:
    monitor = pg.GapMonitor(banana, Wide(), X, every=1, datapoints=8, **QUICK)
    monitor(1)
    row = monitor.history.loc[1]
    assert row["reliable"] < 1
    unreliable = round((1 - row["reliable"]) * 8)
    assert f"log p(x) unreliable {unreliable}/8" in str(monitor)
    assert "cannot be trusted" in row["cautions"]
    for line in row["cautions"].split("; "):
        assert line in str(monitor)
    assert "Warning:" in monitor._repr_html_()
    scalars = monitor.records[0].scalars()
    assert scalars["gaps/reliable"] == row["reliable"]
    assert scalars["gaps/warnings"] >= 1
    ax = pg.plot_monitor(monitor)
    faces = [line.get_markerfacecolor() for line in ax.lines if len(line.get_xdata()) and line.get_marker() == "o"]
    assert faces == ["white"] * 3
    assert "hollow" in ax.get_title(loc="left")
    pyplot.close("all")


def test_the_picture_is_that_of_the_history() -> None:
    model, guide = pair()
    monitor = pg.GapMonitor(model, guide, X, every=1, datapoints=16)
    pg.train(model, guide, X, callback=monitor, **{**TRAINED, "num_epochs": 3})
    ax, history = pg.plot_monitor(monitor), monitor.history
    labels = {"inference gap": "inference_gap", "approximation gap": "approximation_gap"}
    labels["amortization gap"] = "amortization_gap"
    for band, (label, name) in zip(ax.collections, labels.items(), strict=True):
        line = next(line for line in ax.lines if line.get_label() == label)
        np.testing.assert_allclose(line.get_ydata(), history[name])
        error = np.fmax(history[f"{name}_standard_error"], history[f"{name}_mcse"])
        low, high = band.get_paths()[0].get_extents().intervaly
        assert low == pytest.approx((history[name] - error).min())
        assert high == pytest.approx((history[name] + error).max())
    pyplot.close("all")


def test_before_anything_is_measured() -> None:
    monitor = pg.GapMonitor(*pair(), X)
    assert "nothing measured yet" in str(monitor)
    assert isinstance(monitor.history, pd.DataFrame)
    assert monitor.history.empty and monitor.ledgers == {}
    monitor._repr_html_()
    pg.plot_monitor(monitor)
    pyplot.close("all")


# Forms of problems


def globally(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(mean + z, 1.0).to_event(1), obs=x)


def per_datapoint(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("model", "message"),
    [(globally, "all datapoints share 'mean'"), (per_datapoint, "the guide has parameters for each datapoint")],
)
def test_what_needs_all_datapoints_says_so_and_the_remedy_works(model: Callable[..., None], message: str) -> None:
    guide, x = AutoNormal(model), X[:6]
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x)
    with pytest.warns(UserWarning, match=f"{message}.*Pass datapoints=None"):
        assert pg.GapMonitor(model, guide, x, datapoints=3, **QUICK).measure(1) is None
    monitor = pg.GapMonitor(model, guide, x, datapoints=None, **QUICK)
    ledger = monitor.measure(1)
    assert ledger is not None, monitor.history["failure"]
    assert ledger.per_datapoint.sizes["datapoint"] == 6
    assert len(monitor.indices) == 6
    assert "inference gap" in str(monitor)


def test_a_data_set_that_is_one_datapoint() -> None:
    def whole(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    guide = AutoNormal(whole)
    svi = SVI(whole, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(X)
    monitor = pg.GapMonitor(whole, guide, X, plate=False, **QUICK)
    monitor(10)
    assert not monitor.history.loc[10, "failure"]
    assert np.isfinite(monitor.history.loc[10, "guide_optimization_gap"])
    assert "1 datapoint," in str(monitor) and "optimization gap" in str(monitor)


def test_mistakes_are_found_before_a_training() -> None:
    model, guide = pair()
    for call, message in (
        (lambda: pg.GapMonitor(model, guide), "data: missing"),
        (lambda: pg.GapMonitor(model, 3, X), "guide: "),  # type: ignore[arg-type]
        (lambda: pg.GapMonitor(model, guide, X, every=0), "GapMonitor.every: must be a whole number of at least 1"),
        (lambda: pg.GapMonitor(model, guide, X, writers=[3]), r"GapMonitor.writers\[0\]: must be a Writer"),  # type: ignore[list-item]
        (lambda: pg.GapMonitor(model, guide, "x"), "data: "),  # type: ignore[arg-type]
        (lambda: pg.train(model, guide, X, callback=3), "callback: must be callable or None"),  # type: ignore[arg-type]
    ):
        with pytest.raises(pg.InputError, match=message):
            call()
