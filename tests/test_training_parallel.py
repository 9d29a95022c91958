"""Training in two and three processes: the steps of one, errors in all of them, one checkpoint, equal weights."""

import contextlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributed as distributed
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, multiprocessing, nn
from torch.distributions import constraints

import pyrogaps as pg
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.processes import leave, rank, world_size
from pyrogaps.training import Cosine, train

WORLDS = (pytest.param(2, marks=pytest.mark.slow), 3)
# With minibatches of 10 the last has 2 rows: fewer than three processes, and unequal shares in the others.
X = torch.randn(22, 4, generator=torch.Generator().manual_seed(2)) @ torch.randn(
    4, 4, generator=torch.Generator().manual_seed(3)
)
quick: dict[str, Any] = {"progress": False, "num_epochs": 6, "batch_size": 10, "learning_rate": 1e-2}
Outcome = dict[str, Any]


def fresh(seed: int = 0) -> None:
    """An empty store, and weights of this process's own: the first one's count."""
    pyro.clear_param_store()
    torch.manual_seed(seed + 100 * rank())


class Pointed(AmortizedNormal):
    """A guide without noise: all of its mass at the mean."""

    def forward(self, x: Tensor) -> Tensor:
        mean, _ = self.parameters_of(x)
        with pyro.plate("data", len(x)):
            z: Tensor = pyro.sample("z", dist.Delta(mean, event_dim=1))
        return z


def plain_model(x: Tensor) -> None:
    loading = pyro.param("loading", lambda: torch.eye(2, 4))
    noise = pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ loading, noise).to_event(1), obs=x)


def plain_guide(x: Tensor) -> None:
    slope = pyro.param("slope", lambda: torch.full((4, 2), 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(x @ slope, event_dim=1))


def told(*modules: Any, result: Any = None) -> Outcome:
    states = [module.state_dict() for module in modules if isinstance(module, nn.Module)]
    weights = {f"{number}.{name}": value for number, state in enumerate(states) for name, value in state.items()}
    weights |= {name: value.detach().clone() for name, value in pyro.get_param_store().named_parameters()}
    return {"weights": weights, "result": result and vars(result)}


# --- What is run, in one process and in several -----------------------------------------------------------------


def exact(_: Path) -> Outcome:
    fresh()
    pair = LinearGaussian.random(4, 2), Pointed(4, 2, (5,))
    return told(*pair, result=train(*pair, X, validation=X[:7], clip_norm=1.0, kl_warmup=2, **quick))


def whole_data(_: Path) -> Outcome:
    fresh()
    pair = LinearGaussian.random(4, 2), Pointed(4, 2, ())
    return told(*pair, result=train(*pair, X, **{**quick, "batch_size": 100}))


def store(_: Path) -> Outcome:
    fresh()
    return told(result=train(plain_model, plain_guide, X, **quick))


def scaled_plate(_: Path) -> Outcome:
    """A latent outside of the data plate, which is counted once."""

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 0.1).expand([4]).to_event(1))
        with pyro.plate("data", 22, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("mean", dist.Delta(pyro.param("loc", torch.zeros(4)), event_dim=1))

    fresh()
    return told(result=train(model, guide, X, **quick))


def noisy(_: Path) -> Outcome:
    fresh()
    model, guide = LinearGaussian.random(4, 2, noise_scale=0.7), AmortizedNormal(4, 2, ())
    x = X.repeat(10, 1)
    result = train(model, guide, x, num_epochs=60, batch_size=60, learning_rate=5e-2, schedule=Cosine(60),
                   freeze_model=True, num_particles=4, progress=False)  # fmt: skip
    mean, scale = guide.parameters_of(x)
    gap = model.amortization_gap(x, mean, scale).mean().item()
    return {**told(model, guide, result=result), "gap": gap}


def batch_statistics(_: Path) -> Outcome:
    class Normalised(AmortizedNormal):
        def __init__(self) -> None:
            super().__init__(4, 2, ())
            self.normalise = nn.BatchNorm1d(4)

        def encode(self, x: Tensor) -> Tensor:
            return super().encode(self.normalise(x))

    fresh()
    pair = LinearGaussian.random(4, 2), Normalised()
    return told(*pair, result=train(*pair, X.repeat(3, 1), **{**quick, "batch_size": 22}))


def early_stopping(_: Path) -> Outcome:
    fresh()
    pair = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (30,))
    settings = {**quick, "num_epochs": 300, "learning_rate": 5e-2}
    return told(*pair, result=train(*pair, X[:10], validation=X[10:], patience=4, **settings))


def not_a_number(_: Path) -> Outcome:
    """One bad row, in one share."""
    fresh()
    x = X.clone()
    x[13, 2] = torch.nan
    pair = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, ())
    return {"error": caught(lambda: train(*pair, x, **quick)), **told(*pair)}


def bad_gradient(_: Path) -> Outcome:
    """In the last process alone, in the fourth epoch."""
    fresh()
    pair = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, ())

    def sabotage(epoch: int) -> float:
        if epoch == 3 and rank() == world_size() - 1:
            pair[1].encoder[0].weight.register_hook(lambda gradient: gradient * torch.inf)
        return 1.0

    return {"error": caught(lambda: train(*pair, X, schedule=sabotage, **quick)), **told(*pair)}


def resumed(folder: Path) -> Outcome:
    """No file system is shared: each process has a path of its own."""
    path = folder / f"{world_size()}-{rank()}.pt"
    found = {}
    for name, lengths in (("unbroken", (6,)), ("resumed", (3, 6))):
        for num_epochs in lengths:
            fresh()
            pair = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (5,))
            checkpoint = path if name == "resumed" else None
            result = train(*pair, X, checkpoint=checkpoint, validation=X[:7], **{**quick, "num_epochs": num_epochs})
        found[name] = told(*pair, result=result)
    fresh()
    found["files"] = path.exists()
    other = {**quick, "learning_rate": 1.0}
    found["error"] = caught(lambda: train(*pair, X, checkpoint=path, validation=X[:7], **other))
    return found


def refusals(_: Path) -> Outcome:
    def globally(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean.expand(4), 1.0).to_event(1), obs=x)

    def late(x: Tensor) -> None:
        calls.append(None)
        if len(calls) > 6 and rank() == 0:
            pyro.param("late", torch.zeros(()))
        plain_guide(x)

    calls: list[None] = []
    pair = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, ())
    indexed = pg.MAPA_ELBO(pg.mapa_posterior(X, pg.GaussianKernel(0.6)))
    cases: dict[str, Callable[[], Any]] = {
        "ahead": lambda: train(*pair, X, guide_steps=2, **quick),
        "indexed": lambda: train(*pair, X, objective=indexed, **quick),
        "single": lambda: train(*pair, X[:1], **quick),
        "tied": lambda: train(pair[0], AutoNormal(pair[0]), X, **{**quick, "batch_size": 22}),
        "global": lambda: train(globally, AutoNormal(globally), X, **quick),
        "late": lambda: train(plain_model, late, X, **quick),
    }
    found = {}
    for name, run in cases.items():
        fresh()
        found[name] = caught(run)
    return found


def shown(_: Path) -> Outcome:
    fresh()
    pair = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, ())
    with contextlib.redirect_stderr(io.StringIO()) as text:
        train(*pair, X, num_epochs=1)
    return {"bar": text.getvalue()}


def monitored(_: Path) -> Outcome:
    """With chunks for two processes, and a writer in all of them."""
    budget = {"evidence": pg.Ladder(tolerance=1.0, max_evaluations=100), "refinement": pg.Refinement(num_steps=4)}
    found: Outcome = {}
    for name in ("without", "with"):
        fresh()
        x, pair = X.repeat(4, 1), (LinearGaussian.random(4, 2), AmortizedNormal(4, 2, ()))
        writer = Kept()
        monitor = pg.GapMonitor(*pair, x, every=3, datapoints=None, num_particles=20, writers=[writer], **budget)
        result = train(*pair, x, callback=monitor if name == "with" else None, **quick)
        found[name] = told(*pair, result=result)
    return {**found, "history": monitor.history.drop(columns="seconds"), "written": writer.steps}


class Kept:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self.steps.append(step)


def caught(run: Callable[[], object]) -> str:
    try:
        run()
    except (pg.InputError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


ALIKE = (exact, whole_data, store, scaled_plate)
RUNS = (
    *ALIKE,
    noisy,
    batch_statistics,
    early_stopping,
    not_a_number,
    bad_gradient,
    resumed,
    refusals,
    shown,
    monitored,
)


def work(number: int, folder: Path, size: int) -> None:
    """What each of the processes does; the last waits for the others."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=size)
    torch.save({run.__name__: run(folder) for run in RUNS}, folder / f"outcome-{number}.pt")
    distributed.barrier()
    leave()


class Outcomes(dict[int, list[dict[str, Outcome]]]):
    """By number of processes, what every one of them found; they run when first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, size: int) -> list[dict[str, Outcome]]:
        folder = self.folder / str(size)
        folder.mkdir()
        multiprocessing.spawn(work, args=(folder, size), nprocs=size)
        self[size] = [torch.load(folder / f"outcome-{number}.pt", weights_only=False) for number in range(size)]
        return self[size]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return Outcomes(tmp_path_factory.mktemp("parallel"))


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("name", [run.__name__ for run in (*ALIKE, noisy, batch_statistics, early_stopping)])
def test_all_processes_end_alike(name: str, size: int, outcomes: Outcomes) -> None:
    first, *others = (outcome[name] for outcome in outcomes[size])
    for other in others:
        assert_same(other["weights"], first["weights"])
        assert other["result"] == first["result"]


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("run", ALIKE)
def test_without_noise_any_number_of_processes_takes_the_same_steps(
    run: Callable[[Path], Outcome], size: int, outcomes: Outcomes, tmp_path: Path
) -> None:
    alone, found = run(tmp_path), outcomes[size][0][run.__name__]
    assert found["weights"].keys() == alone["weights"].keys()
    for name, value in alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-4, atol=1e-5)
    for name, values in alone["result"]["history"].items():
        assert found["result"]["history"][name] == pytest.approx(values, rel=1e-4)


@pytest.mark.parametrize("size", WORLDS)
def test_with_noise_they_find_the_same_optimum(size: int, outcomes: Outcomes, tmp_path: Path) -> None:
    """A linear encoder's best is the exact mean-field optimum; the gap that is left is rounding and last steps."""
    found = [noisy(tmp_path), outcomes[size][0]["noisy"]]
    assert all(0 <= each["gap"] < 0.01 for each in found)
    # Noise of their own, in every process: they did not take the steps of one process alone.
    assert len({each["result"]["history"]["train_elbo"][0] for each in found}) == 2


@pytest.mark.parametrize("size", WORLDS)
def test_what_is_not_finite_in_one_process_ends_all(size: int, outcomes: Outcomes) -> None:
    for name, message in (("not_a_number", "data: argument 0 contains NaN"), ("bad_gradient", "epoch 4: the norm")):
        errors = {outcome[name]["error"] for outcome in outcomes[size]}
        assert len(errors) == 1
        assert message in errors.pop()
        weights = [outcome[name]["weights"] for outcome in outcomes[size]]
        for other in weights[1:]:
            assert_same(other, weights[0])
            assert all(value.isfinite().all() for value in other.values())


@pytest.mark.parametrize("size", WORLDS)
def test_the_first_process_keeps_the_checkpoint(size: int, outcomes: Outcomes) -> None:
    found = [outcome["resumed"] for outcome in outcomes[size]]
    assert [each["files"] for each in found] == [True] + [False] * (size - 1)
    for each in found:
        assert_same(each["resumed"]["weights"], found[0]["unbroken"]["weights"])
        assert each["resumed"]["result"] == found[0]["unbroken"]["result"]
        assert "was made with different settings: learning_rate" in each["error"]


@pytest.mark.parametrize("size", WORLDS)
def test_what_cannot_be_divided_is_refused_in_one_line(size: int, outcomes: Outcomes) -> None:
    expected = {
        "ahead": "guide_steps does not support several processes",
        "indexed": "objective MAPA_ELBO makes its own minibatches",
        "single": "one datapoint cannot be divided",
        "tied": "has parameters for each of",
        "global": "site 'mean': lies outside the data plate",
        "late": "a parameter was first registered after training had started",
    }
    for outcome in outcomes[size]:
        for name, message in expected.items():
            assert outcome["refusals"][name].startswith("InputError: ")
            assert message in outcome["refusals"][name]
            assert "\n" not in outcome["refusals"][name]


@pytest.mark.parametrize("size", WORLDS)
def test_one_process_shows_the_bar(size: int, outcomes: Outcomes) -> None:
    bars = [outcome["shown"]["bar"] for outcome in outcomes[size]]
    assert "epoch 1/1" in bars[0]
    assert not any(bars[1:])


@pytest.mark.parametrize("size", WORLDS)
def test_early_stopping_is_common(size: int, outcomes: Outcomes) -> None:
    result = outcomes[size][0]["early_stopping"]["result"]
    assert result["stopped_early"]
    assert result["num_epochs"] == result["best_epoch"] + 4 < 300


def test_alone_there_is_one_process() -> None:
    assert (rank(), world_size()) == (0, 1)


@pytest.mark.parametrize("size", WORLDS)
def test_a_monitor_measures_with_all_processes_and_changes_nothing(size: int, outcomes: Outcomes) -> None:
    found = [outcome["monitored"] for outcome in outcomes[size]]
    for each in found:
        assert_same(each["with"]["weights"], each["without"]["weights"])
        assert [*each["history"].index] == [3, 6]
        assert not each["history"]["failure"].any()
        assert each["history"].equals(found[0]["history"])
    assert [each["written"] for each in found] == [[3, 6]] + [[]] * (size - 1)
