"""Memory: what is read off the machine, what a model takes, and that what fits changes nothing but rounding."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions.transforms import _InverseTransform

from pyrogaps import AIS, Refinement, ais, decompose, iwae, memory, refine, train
from pyrogaps.capture import GradientEvaluator
from pyrogaps.capture.footprint import LiveMemory, bytes_per_point, points_within
from pyrogaps.density import JointDensity
from pyrogaps.errors import InputError
from pyrogaps.gaps.sizes import MOST, sizes_of
from pyrogaps.gaussians import gaussian_by_moments
from pyrogaps.guides.auxiliary_flows import AutoLocalAuxiliaryFlow
from pyrogaps.guides.flows import AmortizedFlow
from pyrogaps.models.vae import VAE
from pyrogaps.settings import conform
from tests.references import WrongEncoder, anisotropic, draws_of

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "number"),
    [(17, 17), ("17", 17), ("4GiB", 4 << 30), ("500 MB", 500_000_000), ("1.5g", 1_500_000_000), ("2Ki", 2048)],
)
def test_bytes_are_read(text: str | int, number: int) -> None:
    assert memory.parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "many", "-1", "4 GiB or so", "iB", "1e9"])
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(InputError, match="max_memory: must be a number of bytes such as 4GiB or 500MB"):
        conform("max_memory", memory.Bytes, text)


def test_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 10 * MIB < memory.resident() < 1.1 * memory.peak()
    alone = memory.available()
    assert alone > 100 * MIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available() < 0.5 * alone


def test_control_groups(tmp_path: Path) -> None:
    """Pages of files count as free; a group without a limit sets none."""
    for name, text in {"max": "1000", "now": "900", "memory.stat": "anon 300\ninactive_file 500\n"}.items():
        (tmp_path / name).write_text(text)
    assert memory._left(tmp_path, "max", "now", "inactive_file") == [600]
    (tmp_path / "max").write_text("max\n")
    assert memory._left(tmp_path, "max", "now", "inactive_file") == []
    assert memory._left(tmp_path / "none", "max", "now", "inactive_file") == []


def test_models_without_gradients_or_dense_tensors_are_evaluated() -> None:
    weight = torch.eye(4).to_sparse()

    def sparse(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.sparse.mm(weight, z.T).T, 1.0).to_event(1), obs=x)

    def by_numpy(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.from_numpy(z.numpy() * 1.0), 1.0).to_event(1), obs=x)

    x, z = torch.randn(5, 4), torch.randn(300, 5, 4)
    for model in (sparse, by_numpy):
        joint = JointDensity(model, x)
        assert bytes_per_point(joint) > 0
        evaluator = GradientEvaluator(joint, quiet=True)
        torch.testing.assert_close(evaluator(z, torch.arange(5)), joint(z))


def test_live_memory_counts_what_is_alive() -> None:
    with LiveMemory() as live:
        kept = torch.zeros(1000)
        torch.ones(3000).sum()
        view = kept[:10]
    assert (live.now, live.peak) == (4 * 1000, 4 * (1000 + 3000 + 1))
    assert view.shape == (10,)


def test_what_a_point_takes() -> None:
    """At least the activations that its gradient needs, and not many times as much."""
    model = VAE(784, 50, (200, 200))
    joint = JointDensity(model, torch.zeros(20, 784))
    activations = 4 * (50 + 4 * 200 + 2 * 784)
    assert activations < bytes_per_point(joint) < 5 * activations
    with memory.limited(100 * activations):
        assert 16 <= points_within(joint, 1024) <= 64
    assert points_within(joint, 1024) == 1024


@pytest.mark.parametrize("available", [256 * MIB, 3 << 30, 1 << 40])
def test_machines_with_some_room_work_alike(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    monkeypatch.setattr(memory, "available", lambda: available)
    joint = JointDensity(anisotropic(8, 3), torch.zeros(600, 8, dtype=torch.float64))
    found = sizes_of(joint, AIS(), 1000, None, None)
    assert found.batch_size == MOST
    assert found.working_set == (memory.WORKING_SET if available > 1 << 30 else available * 4 // 5 // 3)


def test_many_chains_and_dimensions_make_small_chunks() -> None:
    joint = JointDensity(VAE(784, 4000, ()), torch.zeros(300, 784))
    assert sizes_of(joint, AIS(), 1000, None, "40GiB").batch_size == 64
    assert sizes_of(joint, AIS(), 1000, 128, "40GiB").batch_size == 128  # as asked for
    assert sizes_of(joint, AIS(), 1000, None, "40GiB", kept=128).batch_size == 64
    assert sizes_of(joint, AIS(), 1000, 128, "40GiB", kept=64).batch_size == 128
    with pytest.raises(InputError, match="and 320 datapoints at once take"):
        sizes_of(joint, AIS(), 1000, 1024, memory.resident() + (1 << 28))
    # Chains take their turns, so that more of them need no more.
    many, few = (sizes_of(joint, AIS(num_chains=number), 1000, None, "40GiB") for number in (10_000, 64))
    assert many == few


def test_too_little_is_said_with_what_would_do() -> None:
    model = anisotropic(8, 3)
    x, _ = draws_of(model, 5)
    with pytest.raises(InputError, match=r"max_memory: 1 MiB is too little; .* is in use already, and 64 datapoints"):
        decompose(model, WrongEncoder(model), x, max_memory="1MiB", progress=False)


def test_little_memory_changes_rounding_alone() -> None:
    model = anisotropic(8, 3)
    x, _ = draws_of(model, 100)
    joint = JointDensity(model, x)
    z = torch.randn(7, 100, 3, dtype=torch.float64)
    expected = GradientEvaluator(joint).bind(torch.arange(100), 7)(z)
    for piece in (1, 4, 64, 256):
        with memory.limited(piece * bytes_per_point(joint)):
            evaluator = GradientEvaluator(joint)
            assert evaluator.rows == piece
            found = evaluator.bind(torch.arange(100), 7)(z)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_no_piece_is_larger_than_the_working_set() -> None:
    """Evaluated eagerly, nothing that is alive at once exceeds it, however many draws there are."""
    vae = VAE(784, 10, (50,))
    joint = JointDensity(vae, torch.zeros(64, 784))
    with memory.limited(4 * MIB):
        bound = GradientEvaluator(joint, "eager").bind(torch.arange(64), 200)
    peaks = []
    for number in (100, 200):
        z = torch.zeros(number, 64, 10)
        with LiveMemory() as live:
            bound.values(z)
        peaks.append(live.peak - live.now)
    assert max(peaks) < 4 * MIB
    assert peaks[1] < 1.1 * peaks[0] + 4 * 100 * 64 * 2


def test_chains_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["pyrogaps.evidence.ais"], "MAX_CHAINS", 24)  # `ais` there is the function
    model = anisotropic(8, 3)
    x, _ = draws_of(model, 40)
    settings = AIS(num_chains=64, num_temperatures=20)
    found = ais(model, WrongEncoder(model), x, settings=settings, refinement=Refinement(num_steps=50))
    assert found.log_weights is not None and found.log_weights.shape == (64, 40)
    assert found.log_weights.unique(dim=0).shape == (64, 40)  # every group has noise of its own
    assert found.ess is not None and float(found.ess.min()) > 16
    error = float((found.value - model.log_evidence(x).detach()).mean()) / float(found.mcse.square().sum().sqrt() / 40)
    assert abs(error) < 4
    assert found.acceptance is not None and bool(((found.acceptance > 0.5) & (found.acceptance < 1)).all())


@pytest.mark.usefixtures("brief_check")
def test_steps_leave_no_tensors_in_reference_cycles() -> None:
    """A transform and its inverse refer to each other and keep the graph of their last call: 20 GiB in half an hour."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.tanh(), 0.5).to_event(1), obs=x)

    def left_by(work: Callable[[], object]) -> int:
        gc.collect()
        gc.disable()
        try:
            before = num_inverses()
            work()
            return num_inverses() - before
        finally:
            gc.enable()

    def num_inverses() -> int:
        return sum(type(value) is _InverseTransform for value in gc.get_objects())

    x, guide = torch.randn(70, 4), AmortizedFlow(4, 4, (8,))
    settings = Refinement(num_steps=40, num_selection=32)
    assert left_by(lambda: refine(model, AutoLocalAuxiliaryFlow, x, settings=settings, referee=False)) < 200
    assert left_by(lambda: refine(model, guide, x, settings=settings, referee=False)) < 200
    assert left_by(lambda: train(model, guide, x, num_epochs=5, batch_size=10, mode="eager", progress=False)) < 60
    assert left_by(lambda: iwae(model, guide, x, num_particles=2000)) < 60


@pytest.mark.parametrize("diagonal", [True, False])
def test_moments_of_blocks(diagonal: bool) -> None:
    draws = 1e4 + torch.randn(256, 3, 4, dtype=torch.float64).cumsum(-1)
    whole, parted = (
        gaussian_by_moments(blocks, diagonal=diagonal, active=None) for blocks in ([draws], draws.split(100))
    )
    torch.testing.assert_close(whole.loc, parted.loc, rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.scale, parted.scale, rtol=1e-9, atol=1e-9)


FAULTS = """
import resource, torch
from pyrogaps import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
first = faults()
with memory.kept():
    faults()
    with memory.kept():
        pass
    within = faults()
    held = memory.resident()
print(first, within, held - memory.resident())
"""


@pytest.mark.skipif(memory._LIBRARY is None, reason="the C library is not glibc")
def test_freed_memory_is_kept_within_a_block() -> None:
    """Tensors of 64 MiB are new pages each time, but not within the block, and its memory is given back."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    ran = subprocess.run([sys.executable, "-c", FAULTS], env=environment, stdout=subprocess.PIPE, check=True, text=True)
    first, within, given_back = map(int, ran.stdout.split())
    assert within < 0.1 * first
    assert given_back > 32 * MIB


def test_settings_of_the_environment_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[object] = []
    monkeypatch.setattr(memory, "_set_malloc", changed.append)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    with memory.kept():
        pass
    assert not changed
