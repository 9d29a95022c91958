"""Checkpoints: a run that is cut short continues bit for bit, and weights survive the process."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import constraints

from pyrogaps.errors import InputError
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.training import Cosine, load_weights, save_weights, train

x = torch.randn(50, 4, generator=torch.Generator().manual_seed(5))
settings: dict[str, Any] = {
    "batch_size": 20, "learning_rate": 1e-2, "schedule": Cosine(8), "kl_warmup": 3, "clip_norm": 1.0, "progress": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def modules() -> tuple[Any, Any]:
    torch.manual_seed(1)
    return LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (6,))


def functions() -> tuple[Any, Any]:
    """A guide with a module, a constrained parameter, and a parameter that appears in an epoch's last minibatch."""
    torch.manual_seed(1)
    model, encoder = LinearGaussian.random(4, 2), nn.Linear(4, 2)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        scale = pyro.param("scale", torch.ones(2), constraint=constraints.interval(0.01, 2.0))
        shift = pyro.param("late", torch.zeros(2)) if len(x) == 10 or "late" in pyro.get_param_store() else 0.0
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x) + shift, scale).to_event(1))

    return model, guide


def everything(model: Any, guide: Any) -> dict[str, Tensor]:
    parts = {f"model.{name}": value for name, value in model.state_dict().items()}
    if isinstance(guide, nn.Module):
        parts |= {f"guide.{name}": value for name, value in guide.state_dict().items()}
    parts |= {f"store.{name}": value for name, value in pyro.get_param_store().named_parameters()}
    return {name: value.detach().clone() for name, value in parts.items()}


class Killed(Exception):
    pass


class KilledIn:
    """A schedule like the settings' own that ends the run in one epoch, as a kill would."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def __repr__(self) -> str:
        return repr(settings["schedule"])

    def __call__(self, epoch: int) -> float:
        if epoch == self.epoch:
            raise Killed
        return float(settings["schedule"](epoch))


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("make", [modules, functions])
@pytest.mark.parametrize("validation", [None, x[:15] + 0.1])
@pytest.mark.parametrize("how", ["limit", "killed"])
def test_a_resumed_run_is_the_unbroken_run(make: Any, validation: Tensor | None, how: str, tmp_path: Path) -> None:
    pair = make()
    unbroken = train(*pair, x, num_epochs=8, validation=validation, **settings)
    expected = everything(*pair)

    for part in range(2):
        pyro.clear_param_store()
        pair = make()
        torch.randn(part + 1)
        common = {**settings, "checkpoint": tmp_path / "run.pt", "validation": validation}
        if part == 0 and how == "limit":
            train(*pair, x, num_epochs=5, **common)
        elif part == 0:
            with pytest.raises(Killed):
                train(*pair, x, num_epochs=8, **{**common, "schedule": KilledIn(5)})
        else:
            resumed = train(*pair, x, num_epochs=8, **common)
    assert_same(everything(*pair), expected)
    assert resumed == unbroken


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    pair = modules()
    first = train(*pair, x, num_epochs=4, checkpoint=path, validation=x, **settings)
    content, expected = path.read_bytes(), everything(*pair)
    pair = modules()
    assert train(*pair, x, num_epochs=4, checkpoint=path, validation=x, **settings) == first
    assert_same(everything(*pair), expected)
    assert path.read_bytes() == content
    with pytest.raises(InputError, match="was saved after 4 epochs"):
        train(*modules(), x, num_epochs=3, checkpoint=path, validation=x, **settings)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"learning_rate": 1e-3}, "learning_rate 0.01 .now 0.001."),
        ({"batch_size": 25}, "batch_size"),
        ({"schedule": None}, "schedule"),
        ({"seed": 1}, "seed"),
        ({"optimizer": torch.optim.SGD}, "optimizer"),
        ({"validation": x}, "validation none"),
    ],
)
def test_other_settings_are_refused(change: dict[str, Any], word: str, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    train(*modules(), x, num_epochs=1, checkpoint=path, **settings)
    with pytest.raises(InputError, match=f"different settings: {word}") as caught:
        train(*modules(), x, num_epochs=2, checkpoint=path, **{**settings, **change})
    assert "\n" not in str(caught.value)


def test_other_data_and_other_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    model, guide = modules()
    train(model, guide, x, num_epochs=1, checkpoint=path, **settings)
    for other in (x + 1, x[:40]):
        with pytest.raises(InputError, match="different settings: data 50 datapoints"):
            train(model, guide, other, num_epochs=2, checkpoint=path, **settings)
    for wider, word in ((AmortizedNormal(4, 2, (7,)), "shape"), (AmortizedNormal(4, 2, ()), "in the file only")):
        before = everything(model, wider)
        with pytest.raises(InputError, match=f"does not fit AmortizedNormal.*{word}") as caught:
            train(model, wider, x, num_epochs=2, checkpoint=path, **settings)
        assert "\n" not in str(caught.value)
        assert_same(everything(model, wider), before)


@pytest.mark.parametrize("make", [modules, functions])
def test_weights_survive(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "weights.pt"
    pair = make()
    train(*pair, x, num_epochs=3, **settings)
    expected = everything(*pair)
    save_weights(path, *pair)
    pyro.clear_param_store()
    pair = make()
    load_weights(path, *pair)
    pair[1](x)
    assert_same(everything(*pair), expected)
    assert list(path.parent.iterdir()) == [path]


def test_a_training_checkpoint_loads_its_best_weights(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    pair = modules()
    train(*pair, x, num_epochs=6, checkpoint=path, validation=-x, **settings)
    expected = everything(*pair)
    pair = modules()
    load_weights(path, *pair)
    assert_same(everything(*pair), expected)


def test_weights_alone_are_no_run(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.pt", *modules())
    with pytest.raises(InputError, match="no training run"):
        train(*modules(), x, num_epochs=1, checkpoint=tmp_path / "w.pt", **settings)


def test_autoguides_load_once_they_have_seen_data(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    model = LinearGaussian.random(4, 2)
    guide = AutoNormal(model)
    train(model, guide, x, num_epochs=2, **{**settings, "batch_size": 50})
    expected = guide.median(x)["z"]
    save_weights(path, model, guide)
    pyro.clear_param_store()
    fresh = AutoNormal(model)
    with pytest.raises(InputError, match="pass data="):
        load_weights(path, model, fresh)
    load_weights(path, model, fresh, x)
    assert torch.equal(fresh.median(x)["z"], expected)


def test_missing_damaged_and_foreign_files(tmp_path: Path) -> None:
    pair = modules()
    with pytest.raises(InputError, match="no such file"):
        load_weights(tmp_path / "absent.pt", *pair)
    whole = tmp_path / "whole.pt"
    save_weights(whole, *pair)
    for name, content in (("short.pt", whole.read_bytes()[:-200]), ("text.pt", b"hello"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="damaged") as caught:
            load_weights(tmp_path / name, *pair)
        assert "\n" not in str(caught.value)
        with pytest.raises(InputError, match="damaged"):
            train(*pair, x, num_epochs=1, checkpoint=tmp_path / name, **settings)
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    with pytest.raises(InputError, match="not a checkpoint of this version"):
        load_weights(tmp_path / "foreign.pt", *pair)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_weights(blocked / "w.pt", *pair)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pt"
    save_weights(path, *modules())
    content = path.read_bytes()

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match="No space left"):
        save_weights(path, *modules())
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_a_constraint_of_the_users_own_is_refused_before_it_is_written(tmp_path: Path) -> None:
    class Odd(constraints.Constraint):
        def check(self, value: Tensor) -> Tensor:
            return value > -math.inf

    pyro.get_param_store()._constraints["odd"] = Odd()
    pyro.get_param_store()._params["odd"] = torch.zeros(1)
    pyro.get_param_store()._param_to_name[pyro.get_param_store()._params["odd"]] = "odd"
    with pytest.raises(InputError, match="'odd'"):
        save_weights(tmp_path / "w.pt", *modules())


def test_weights_cross_processes(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    model, guide = functions()
    train(model, guide, x, num_epochs=2, **settings)
    save_weights(path, model, guide)
    script = (
        "import sys, pyro, torch; sys.path.insert(0, sys.argv[2])\n"
        "from pyrogaps.training.weights import read_file\n"
        "weights = read_file(sys.argv[1])['weights']\n"
        "print(sorted(weights['store']), weights['constraints']['scale'])"
    )
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", script, str(path), root], capture_output=True, text=True, check=True)
    assert "['late', 'scale'] Interval(lower_bound=0.01, upper_bound=2.0)" in done.stdout
