"""Recorded training steps are the eager ones: same draws, loss, gradients and buffers, or not recorded at all."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyrogaps import IWAE_ELBO, IndexedData, InputError
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.models.vae import VAE
from pyrogaps.training import Training, steps, train
from pyrogaps.training.record import Record

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(2)) @ torch.randn(4, 4)
quick: dict[str, Any] = {"progress": False, "learning_rate": 1e-2, "num_epochs": 8, "batch_size": 20}
Pair = tuple[Any, Any]
IS_FASTER = Record.is_faster


@pytest.fixture(autouse=True)
def replays(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """Records from the third step on; every replay enters its record."""
    used: list[Record] = []
    replay = Record.__call__

    def counted(self: Record, *args: Any) -> Any:
        used.append(self)
        return replay(self, *args)

    monkeypatch.setattr(steps, "WARM_UP", 2)
    monkeypatch.setattr(Record, "__call__", counted)
    monkeypatch.setattr(Record, "is_faster", True)  # whatever a busy machine makes of it
    return used


def modules() -> Pair:
    return LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (5,))


def pixels() -> Pair:
    return VAE(4, 2, (6,), likelihood="gaussian", noise="learned"), AmortizedNormal(4, 2, (5,))


def plain_model(x: Tensor) -> None:
    loading = pyro.param("loading", lambda: torch.eye(2, 4))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ loading, 0.5).to_event(1), obs=x)


def functions() -> Pair:
    """Parameters in Pyro's store, one of them constrained."""

    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", lambda: torch.zeros(4, 2))
        scale = pyro.param("scale", torch.ones(2), constraint=constraints.interval(0.01, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ slope, scale).to_event(1))

    return plain_model, guide


def late() -> Pair:
    """A parameter that appears while training, and changes what steps compute from then on."""
    encoder, calls = nn.Linear(4, 2), []

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        calls.append(None)
        shift = pyro.param("late", lambda: torch.zeros(2)) if len(calls) > 15 else 0.0
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x) + shift, 0.5).to_event(1))

    return plain_model, guide


class Noisy(AmortizedNormal):
    """Dropout, and batch statistics in buffers."""

    def __init__(self) -> None:
        super().__init__(4, 2, ())
        self.normalise = nn.BatchNorm1d(4)

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(nn.functional.dropout(self.normalise(x), 0.3, self.training))


def noisy() -> Pair:
    return LinearGaussian.random(4, 2), Noisy()


def subsampling() -> Pair:
    """The plate draws its own rows, whatever it is given."""

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(4), 3.0).to_event(1))
        with pyro.plate("data", 60, subsample_size=7) as rows:
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=X[rows])

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.zeros(4))
        pyro.sample("mean", dist.Normal(loc, pyro.param("s", torch.tensor(0.3), constraint=constraints.positive)).expand([4]).to_event(1))  # fmt: skip  # noqa: E501

    return model, guide


def twins() -> Pair:
    """Two parameters with one gradient, which is no tensor of either's own until it is copied."""

    def guide(x: Tensor) -> None:
        first, second = (pyro.param(name, lambda: torch.zeros(2)) for name in ("first", "second"))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((first + second).expand(len(x), 2), 0.3).to_event(1))

    return plain_model, guide


def everything(pair: Pair) -> dict[str, Tensor]:
    states = [part.state_dict() for part in pair if isinstance(part, nn.Module)]
    found = {f"{number}.{name}": value for number, state in enumerate(states) for name, value in state.items()}
    return {**found, **{name: value.detach().clone() for name, value in pyro.get_param_store().named_parameters()}}


def trained(make: Callable[[], Pair], mode: str, x: Any = X, **settings: Any) -> tuple[dict[str, Tensor], Any]:
    pyro.clear_param_store()
    torch.manual_seed(3)
    pair = make()
    result = train(*pair, x, mode=mode, **{**quick, **settings})  # type: ignore[arg-type]
    return everything(pair), result


CASES: dict[str, tuple[Callable[[], Pair], dict[str, Any]]] = {
    "modules": (modules, {}),
    "pixels": (pixels, {"clip_norm": 0.5, "optimizer": torch.optim.SGD}),
    "uneven minibatches": (modules, {"batch_size": 25}),
    "functions": (functions, {"num_particles": 3}),
    "annealed": (pixels, {"kl_warmup": 4, "entropy_annealing": 6, "validation": X[:9]}),
    "frozen": (modules, {"freeze_model": True, "optimizer_options": {"foreach": True}}),
    "guide ahead": (modules, {"guide_steps": 5}),
    "dropout and batch norm": (noisy, {}),
    "shared gradients": (twins, {"clip_norm": 0.01}),
    "subsampling": (subsampling, {"batch_size": 60, "num_epochs": 20}),
    "IWAE": (modules, {"objective": IWAE_ELBO(4, vectorize_particles=True)}),
    "doubly reparametrised": (modules, {"objective": IWAE_ELBO(3, doubly_reparametrised=True)}),
    "scaled": (lambda: (pyro.poutine.scale(modules()[0], 0.5), AmortizedNormal(4, 2, ())), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_recorded_runs_are_eager_runs(name: str, replays: list[Record]) -> None:
    make, settings = CASES[name]
    eager, expected = trained(make, "eager", **settings)
    assert not replays
    found, result = trained(make, "captured", **settings)
    assert len(replays) >= 10
    assert found.keys() == eager.keys()
    for key, value in eager.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    for key, values in expected.history.items():
        assert result.history[key] == pytest.approx(values, rel=1e-4, abs=1e-4)


def test_records_serve_one_shape_and_one_kind_of_annealing(replays: list[Record]) -> None:
    """25, 25 and 10 rows; weights of 0, between, and 1."""
    trained(modules, "captured", batch_size=25, kl_warmup=6, num_epochs=14)
    # Of the last, shorter minibatch of each epoch the first two go through Pyro, of each kind.
    assert len(set(replays)) == 4
    assert len(replays) == (2 * 5 - 2) + (5 - 2) + (2 * 8 - 2) + (8 - 2)


def flat(shift: Any) -> Callable[[], Pair]:
    """A guide that adds what `shift` gives to its means."""

    def make() -> Pair:
        model, guide = modules()

        def shifted(x: Tensor) -> None:
            pyro.module("guide", guide)
            mean, scale = guide.parameters_of(x)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(mean + shift(x, guide), scale).to_event(1))

        return model, shifted

    return make


def branching(x: Tensor, _: Any) -> float:
    return 0.5 if float(x.sum()) > 0 else -0.5


def counting(_: Tensor, guide: Any) -> float:
    guide.calls = getattr(guide, "calls", 0) + 1
    return 0.01 * guide.calls


def hooked() -> Pair:
    model, guide = modules()
    guide.encoder[0].register_forward_hook(lambda module, args, output: 2 * output)
    return model, guide


def hooked_gradient() -> Pair:
    model, guide = modules()
    guide.encoder[0].weight.register_hook(lambda gradient: 0.5 * gradient)
    return model, guide


class Recurrent(AmortizedNormal):
    def __init__(self) -> None:
        super().__init__(4, 2, ())
        self.gru = nn.GRU(1, 4, batch_first=True)

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(self.gru(x[..., None])[1][0])


def scored() -> Pair:
    """A draw that is not reparametrised."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Poisson(2.0))
            pyro.sample("x", dist.Normal(z[:, None].expand(-1, 4), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        rate = pyro.param("rate", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Poisson(rate))

    return model, guide


EAGER: dict[str, Callable[[], Pair]] = {
    "branches": flat(branching),
    "counts": flat(counting),
    "hook": hooked,
    "hook on a gradient": hooked_gradient,
    "recurrent": lambda: (modules()[0], Recurrent()),
    "scores": scored,
}


@pytest.mark.parametrize("name", EAGER)
def test_what_cannot_be_recorded_stays_eager_bit_for_bit(name: str, replays: list[Record]) -> None:
    expected, _ = trained(EAGER[name], "eager")
    found, _ = trained(EAGER[name], "captured")
    assert not replays
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def reading(module: nn.Module, of: Callable[..., Tensor]) -> Callable[..., Any]:
    """A program that runs `module` on what `of` makes of the arguments."""

    def program(*args: Any) -> Any:
        pyro.module(type(module).__name__, module)
        return module(of(*args))

    return program


class Rows:
    """A minibatch in a wrapper that hides its tensor from whoever takes arguments apart."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __repr__(self) -> str:
        return "Rows"


def test_a_record_that_closed_over_a_minibatch_is_found_out_on_the_second(replays: list[Record]) -> None:
    def make() -> Pair:
        model, guide = modules()
        return reading(model, lambda rows: rows.x), reading(guide, lambda rows: rows.x)

    hidden = IndexedData(60, lambda indices: (Rows(X[indices]),))
    expected, _ = trained(make, "eager", hidden)
    found, _ = trained(make, "captured", hidden)
    # A replay was used for one step: rounding, no more.
    assert len(replays) == 2
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


def test_arguments_that_are_no_tensors_have_records_of_their_own(replays: list[Record]) -> None:
    def make() -> Pair:
        model, guide = modules()
        return reading(model, lambda x, power: x * power), reading(guide, lambda x, power: x)

    told = IndexedData(60, lambda indices: (X[indices], 1.0 + float(indices[0] % 2)))
    expected, _ = trained(make, "eager", told)
    found, _ = trained(make, "captured", told)
    assert len(set(replays)) == 2
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


def test_settings_of_a_module_may_change_between_epochs(replays: list[Record]) -> None:
    def run(mode: str) -> dict[str, Tensor]:
        model, guide = (pyro.clear_param_store(), torch.manual_seed(3), modules())[2]

        def cool(epoch: int) -> float:
            guide.min_scale = 0.3 if epoch < 3 else 1e-4
            return 1.0

        train(model, guide, X, mode=mode, schedule=cool, **quick)  # type: ignore[arg-type]
        return everything((model, guide))

    expected = run("eager")
    found = run("captured")
    assert len(set(replays)) == 2
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


def test_a_change_that_nothing_announces_is_found_out_with_a_warning(replays: list[Record]) -> None:
    held = [torch.tensor(0.0)]

    def drift(epoch: int) -> float:
        held[0] = torch.tensor(float(epoch > 4))
        return 1.0

    with pytest.warns(UserWarning, match="set mode='eager'"):
        trained(flat(lambda x, guide: held[0]), "captured", schedule=drift)
    assert replays


def test_parameters_that_join_end_old_records(replays: list[Record]) -> None:
    expected, _ = trained(late, "eager")
    found, _ = trained(late, "captured")
    assert "late" in found and not torch.equal(found["late"], torch.zeros(2))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [modules, functions, noisy])
def test_a_resumed_run_is_the_unbroken_one(make: Callable[[], Pair], tmp_path: Path, replays: list[Record]) -> None:
    chosen: dict[str, Any] = {"batch_size": 25, "kl_warmup": 3}
    expected, _ = trained(make, "captured", **chosen)
    for num_epochs in (3, 5, 8):
        found, _ = trained(make, "captured", checkpoint=tmp_path / "run.pt", **{**chosen, "num_epochs": num_epochs})
    assert replays
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_the_mode_may_change_in_between(tmp_path: Path) -> None:
    for mode, num_epochs in (("captured", 3), ("eager", 5), ("captured", 8)):
        found, _ = trained(modules, mode, checkpoint=tmp_path / "run.pt", num_epochs=num_epochs)
    expected, _ = trained(modules, "eager")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="mode: must be one of eager, captured"):
        Training(mode="compiled")  # type: ignore[arg-type]


def test_divergence_in_a_recorded_step_changes_nothing(replays: list[Record]) -> None:
    model, guide = modules()
    kept: list[Tensor] = []

    def explode(epoch: int) -> float:
        if epoch == 5:
            kept.extend(value.detach().clone() for value in (*model.parameters(), *guide.parameters()))
        return 1e30 if epoch == 5 else 1.0

    with pytest.raises(FloatingPointError, match=r"epoch 6: the loss is .* at step 2"):
        train(model, guide, X, schedule=explode, **quick)
    assert replays
    now = (*model.parameters(), *guide.parameters())
    assert all(torch.equal(old, new) and new.grad is None for old, new in zip(kept, now, strict=True))


def test_a_nan_that_comes_late_is_named(replays: list[Record]) -> None:
    seen: list[int] = []

    def fetch(indices: Tensor) -> tuple[Tensor]:
        seen.append(1)
        return (X[indices] * (math.nan if len(seen) > 20 else 1.0),)

    with pytest.raises(FloatingPointError, match="the loss is nan at step"):
        train(*modules(), IndexedData(60, fetch), **quick)
    assert replays


def test_a_record_slower_than_pyro_is_given_up_for_good(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, replays: list[Record]
) -> None:
    _, result = trained(modules, "captured", num_epochs=12)
    assert result.mode == "captured"
    replay = Record.__call__

    def slow(record: Record, *args: Any) -> Any:
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass
        return replay(record, *args)

    monkeypatch.setattr(Record, "__call__", slow)
    monkeypatch.setattr(Record, "is_faster", IS_FASTER)
    replays.clear()
    chosen = {"checkpoint": tmp_path / "run.pt"}
    found, result = trained(modules, "captured", num_epochs=12, **chosen)
    expected, _ = trained(modules, "eager", num_epochs=12)
    assert result.mode == "eager"
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    assert len(replays) == steps.DECISION_USE
    # A run that goes on keeps the verdict: nothing is timed again.
    trained(modules, "captured", num_epochs=30, **chosen)
    assert len(replays) == steps.DECISION_USE
