"""Processes that share the work: what they tell each other, and that their number and their deaths change no ledger."""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import xarray as xr
import yaml

from pyrogaps import AIS, JointDensity, memory, processes, train
from pyrogaps.errors import InputError
from pyrogaps.gaps.sizes import sizes_of
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.models.vae import VAE
from tests.commands import MODULE, RECIPE, RESULTS, command, ledger

NUM_CHUNKS = 5


def start(number: int, place: int, file: str, body) -> None:  # type: ignore[no-untyped-def]
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=place, world_size=number)
    try:
        body()
    finally:
        processes.leave()
    # A thread that outlives its group aborts the process now and then, as the interpreter ends.
    assert not [name for name in threads() if "gloo" in name]


def threads() -> list[str]:
    """The names of this process's threads, those of Python and those of torch, where the system tells them."""
    return [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]


def share() -> None:
    """The checks of a process; an assertion that fails there fails the test."""
    assert processes.divided(lambda item: (item, dist.get_rank()), range(7)) == [(n, n % 3) for n in range(7)]
    assert processes.divided(lambda item: item, []) == []
    # Within a share everyone works alone: what is divided there is done whole.
    nested = processes.divided(
        lambda item: processes.divided(lambda inner: (inner, dist.get_rank()), range(2)), range(3)
    )
    assert nested == [[(0, n), (1, n)] for n in range(3)]
    assert processes.first(lambda: processes.rank() * 10 + 5) == 5
    assert processes.together(processes.rank) == processes.rank()


def fail() -> None:
    def picky(item: int) -> int:
        if item == 1:
            raise InputError("datapoint 1: bad")
        return item

    for compute in (
        lambda: processes.divided(picky, range(4)),
        lambda: processes.together(lambda: picky(processes.rank())),
    ):
        with pytest.raises(InputError, match="datapoint 1: bad"):
            compute()
    with pytest.raises(InputError, match="datapoint 1: bad"):
        processes.first(lambda: picky(1))
    assert processes.divided(lambda item: item, range(4)) == [0, 1, 2, 3]  # they are still in step


def disagree() -> None:
    with pytest.raises(RuntimeError, match="different numbers of items"):
        processes.divided(lambda item: item, range(4 + processes.rank()))


def fail_within() -> None:
    """What one process meets within what all do together is known to all, in the same words."""

    def stage() -> int:
        if processes.rank() == 0:
            raise InputError("the disk is full")
        return processes.first(lambda: 1)

    with pytest.raises(InputError, match="the disk is full"):
        processes.together(stage)
    assert processes.everywhere(processes.rank) == [0, 1, 2]


def train_and_leave() -> None:
    assert any("gloo" in name for name in threads()) or not threads()
    model = LinearGaussian.random(6, 2, seed=0)
    train(model, AmortizedNormal(6, 2, (4,)), torch.randn(40, 6), num_epochs=2, progress=False)


def keep_nothing() -> None:
    """A checkpoint that cannot be written ends training everywhere."""
    torch.manual_seed(0)
    model = LinearGaussian.random(6, 2, seed=0)
    guide, x = AmortizedNormal(6, 2, (4,)), torch.randn(40, 6)
    with pytest.raises(InputError, match="cannot be written"):
        processes.together(
            lambda: train(model, guide, x, num_epochs=2, freeze_model=True, checkpoint="/dev/null/x", progress=False)
        )
    assert processes.everywhere(processes.rank) == [0, 1, 2]


def agree_on_sizes() -> None:
    """The process with the least memory decides for all."""
    joint = JointDensity(VAE(64, 600, ()), torch.zeros(300, 64))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(memory, "available", lambda: (1 + processes.rank()) << 29)
        found = processes.everywhere(lambda: None) and sizes_of(joint, AIS(), 1000, None, None)
    assert processes.everywhere(lambda: found) == [found] * 3
    assert found.batch_size == 64


def lose() -> None:
    """The last: it ends the processes."""
    if processes.rank() != 1:
        with pytest.raises(processes.LostRankError, match="lost the connection to the other processes"):
            processes.divided(lambda item: item, range(4))


BODIES = [share, fail, fail_within, disagree, train_and_leave, keep_nothing, agree_on_sizes, lose]


def run(place: int, folder: Path) -> None:
    """All checks in turn, each in a group of its own; a file says of each that it has passed here."""

    def lose_and_end() -> None:
        lose()
        (folder / f"lose-{place}").touch()
        os._exit(0)

    for body in BODIES:
        start(3, place, f"{folder}/store-{body.__name__}", lose_and_end if body is lose else body)
        (folder / f"{body.__name__}-{place}").touch()


@pytest.fixture(scope="module")
def passed(tmp_path_factory):  # type: ignore[no-untyped-def]
    """The checks that passed in each of three processes, by name, and the error that ended them."""
    folder, error = tmp_path_factory.mktemp("ranks"), None
    try:
        mp.spawn(run, (folder,), nprocs=3)
    except Exception as raised:
        error = raised
    return Counter(path.name.split("-")[0] for path in folder.glob("*-[0-2]")), error


@pytest.mark.parametrize("body", BODIES)
def test_processes_agree(body, passed) -> None:  # type: ignore[no-untyped-def]
    """Where a check fails, those after it are not made."""
    times, error = passed
    assert times[body.__name__] == 3, error


def test_one_process_needs_no_others() -> None:
    assert (processes.rank(), processes.world_size()) == (0, 1)
    assert processes.divided(lambda item: item + 1, range(3)) == [1, 2, 3]
    assert (processes.first(lambda: 4), processes.together(lambda: 5)) == (4, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):  # type: ignore[no-untyped-def]
    """A recipe and the run of it in one process."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "mine.py").write_text(MODULE)
    data = {"class_path": "mine.Data", "init_args": {"num_test": 64 * NUM_CHUNKS - 20}}
    recipe = {**RECIPE, "data": data, "batch_size": 64}
    (folder / "linear.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        assert command("linear.yaml", "--quiet", "--out", "trained").returncode == 0
    return folder


@pytest.fixture
def trained(folder, monkeypatch):  # type: ignore[no-untyped-def]
    """Arguments with which the weights are there and the ledger alone is measured, and the ledger of one process."""
    monkeypatch.chdir(folder)
    return ["linear.yaml", "--quiet", "--checkpoint", "trained/checkpoint.pt"], ledger("trained")


def equal(left: xr.Dataset, right: xr.Dataset) -> None:
    xr.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("number", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_any_number_of_processes_gives_the_same_ledger(number: int, trained) -> None:  # type: ignore[no-untyped-def]
    arguments, expected = trained
    told = command(*arguments, "--out", f"of-{number}", ranks=number)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("Inference gaps of") == 1  # one process speaks
    assert sorted(os.listdir(f"of-{number}")) == RESULTS
    equal(ledger(f"of-{number}"), expected)


@pytest.mark.slow
def test_what_was_finished_is_not_measured_again_whoever_dies(trained) -> None:  # type: ignore[no-untyped-def]
    """Rank 1 dies, then rank 0; the third time torchrun starts the processes again by itself."""
    arguments, expected = trained
    count = Path("count").resolve()
    for victim, pattern in (("1", "dying/parts/*.npz"), ("0", "dying/parts/000000[1-9]*.npz")):
        told = command(
            *arguments, "--out", "dying", ranks=2, COUNT=str(count), VICTIM=victim, INTERRUPT=f"SIGKILL {pattern}"
        )
        assert told.returncode != 0
        assert not Path("dying/ledger.nc").exists()
    told = command(*arguments, "--out", "dying", ranks=2, restarts=1, COUNT=str(count))
    assert told.returncode == 0, told.stderr
    equal(ledger("dying"), expected)
    times = Counter(count.read_text().split())
    assert set(times.values()) == {1}, times
    assert len(times) >= NUM_CHUNKS - 2  # who dies between keeping and counting counts one less


@pytest.mark.slow
def test_training_is_shared_and_goes_on_where_it_was_killed(trained) -> None:  # type: ignore[no-untyped-def]
    arguments = ["linear.yaml", "--quiet", "--training.num_epochs", "30", "--evaluate.num_datapoints", "64"]
    told = command(*arguments, "--out", "killed", ranks=2, VICTIM="1", INTERRUPT="SIGKILL killed/training.pt")
    assert told.returncode != 0
    assert not Path("killed/checkpoint.pt").exists()
    for folder in ("killed", "unbroken"):
        told = command(*arguments, "--out", folder, ranks=2)
        assert told.returncode == 0, told.stderr
        assert told.stderr.count("training\n") == 1
    xr.testing.assert_identical(ledger("killed"), ledger("unbroken"))


@pytest.mark.slow
def test_bad_input_is_said_once(trained) -> None:  # type: ignore[no-untyped-def]
    arguments, _ = trained
    told = command(*arguments, "--plate", "rows", "--out", "never", ranks=2)
    assert told.returncode != 0
    assert [line for line in told.stderr.splitlines() if line.startswith("pyrogaps: ")] == [
        "pyrogaps: plate: the model has no plate named 'rows' (its plates are data)"
    ]
