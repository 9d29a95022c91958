"""Every test starts from the same state of Pyro and torch and leaves none behind."""

import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pyro
import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The tests' tensors are small: threads cost more than they bring, and most where other work shares the cores."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that tests start


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Fixed seeds, an empty param store, validation on; the default dtype as it was."""
    dtype = torch.get_default_dtype()
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    with pyro.validation_enabled():
        yield
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
    if (pyplot := sys.modules.get("matplotlib.pyplot")) is not None:
        pyplot.close("all")


@pytest.fixture
def brief_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check of convergence of 2 further steps instead of 50, which are most of a refinement of a few steps.

    For tests of what becomes of refined guides, not of how good they are. Not for those that start the command as a
    process of its own, which takes 50.
    """
    # By its full name: the package has a function of the name `refine`.
    monkeypatch.setattr(import_module("pyrogaps.refine.optimise"), "MIN_FURTHER_STEPS", 2)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets that PYROGAPS_DATA names; skips where it names none."""
    root = os.environ.get("PYROGAPS_DATA")
    if not root:
        pytest.skip("PYROGAPS_DATA names no folder of data sets")
    return Path(root)
