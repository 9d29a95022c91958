"""Bits that flip on the disk: every file is refused by name, made anew, or gives the values that were written.

Of each kind of file 20 single bits are flipped, at places that a seed chooses; of the slow tests 100, at others.
"""

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import pyrogaps as pg
from pyrogaps.chunk_cache import ChunkCache
from pyrogaps.cli.run_folder import LEDGER, RECIPE, UNFINISHED, WEIGHTS, RunFolder
from pyrogaps.errors import InputError
from pyrogaps.gaps.ledger import GROUPS
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.streams import Chunk
from pyrogaps.training import load_weights, save_weights, train

SETTINGS: dict[str, Any] = {"batch_size": 10, "learning_rate": 1e-2, "progress": False}


@pytest.fixture(params=[20, pytest.param(100, marks=pytest.mark.slow)])
def number(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def flips(path: Path, number: int) -> Iterator[int]:
    """Flip one bit after another in a file, each alone; yields its place. The file is whole again in the end."""
    content, chance = path.read_bytes(), random.Random(number)
    for _ in range(number):
        place = chance.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        yield place
    path.write_bytes(content)


def pair() -> tuple[Any, Any]:
    torch.manual_seed(0)
    return LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (6,))


x = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("error")
def test_weights(number: int, tmp_path: Path) -> None:
    path, (model, guide) = tmp_path / "weights.pt", pair()
    save_weights(path, model, guide)
    before = [value.clone() for value in (*model.parameters(), *guide.parameters())]
    for place in flips(path, number):
        with pytest.raises(InputError, match=r"weights\.pt: is damaged.*Restore a copy, or move it away"):
            load_weights(path, model, guide)
        assert all(map(torch.equal, before, (*model.parameters(), *guide.parameters()))), place
    load_weights(path, model, guide)
    # Other programs read the file as before.
    weights = torch.load(path, weights_only=True)["weights"]["modules"]
    assert all(torch.equal(value, weights[1][name]) for name, value in guide.state_dict().items())
    assert "weights" in torch.load(path, weights_only=True, mmap=True)


def test_a_training_run(number: int, tmp_path: Path) -> None:
    path = tmp_path / "training.pt"
    train(*pair(), x, num_epochs=1, checkpoint=path, **SETTINGS)
    for _ in flips(path, number):
        with pytest.raises(InputError, match=r"training\.pt: is damaged"):
            train(*pair(), x, num_epochs=1, checkpoint=path, **SETTINGS)
    # The remedy.
    path.rename(tmp_path / "away.pt")
    train(*pair(), x, num_epochs=1, checkpoint=path, **SETTINGS)
    assert path.exists()


def test_chunks(number: int, tmp_path: Path) -> None:
    """They are measured again, and the note says so."""
    chunk, values = Chunk(0, 5), {"elbo": np.arange(5.0), "converged": np.array([True] * 5)}
    cache = ChunkCache(tmp_path, {"seed": 0})

    def kept() -> tuple[dict[str, Any], int]:
        measured: list[int] = []
        found = cache.get(chunk, lambda _: torch.zeros(1), lambda: measured.append(1) or dict(values))
        return found, len(measured)

    assert kept()[1] == 1 and kept()[1] == 0
    (path,) = tmp_path.iterdir()
    with np.load(path) as arrays:
        assert {*values} <= {*arrays}
    for place in flips(path, number):
        with pytest.warns(UserWarning, match=f"{path.name} is damaged, so its datapoints are measured again"):
            found, measured = kept()
        assert measured == 1 and all(np.array_equal(found[name], values[name]) for name in values), place
        assert kept()[1] == 0


def test_neighbours_of_mapa(number: int, tmp_path: Path) -> None:
    path = tmp_path / "neighbours.npz"
    pg.mapa_posterior(x, "gaussian", bandwidth=0.4, cache=path)
    for _ in flips(path, number):
        with pytest.raises(InputError, match=r"neighbours\.npz: cannot be read. It is damaged .* delete it"):
            pg.mapa_posterior(x, "gaussian", bandwidth=0.4, cache=path)


@pytest.fixture(scope="module")
def ledger() -> pg.GapLedger:
    rough = {"evidence": pg.AIS(num_chains=2, num_temperatures=3), "refinement": pg.Refinement(num_steps=3)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pg.decompose(*pair(), x[:5], **rough, num_particles=4, progress=False)


def equal(left: Any, right: Any) -> bool:
    return all(getattr(left, name).equals(getattr(right, name)) for name in ("per_datapoint", "traces", "gaps"))


def test_a_ledger_that_travels_alone(number: int, ledger: pg.GapLedger, tmp_path: Path) -> None:
    path = tmp_path / "ledger.nc"
    ledger.to_datatree().to_netcdf(path, engine="h5netcdf")
    for place in flips(path, number):
        try:
            with xr.open_datatree(path, engine="h5netcdf") as tree:
                loaded = tree.load()
        except Exception:  # what HDF5 and xarray notice themselves, in many ways
            continue
        try:
            found = pg.GapLedger.from_datatree(loaded)
        except InputError:
            continue
        assert equal(found, ledger) and found.provenance == ledger.provenance, place


@pytest.mark.parametrize("group", GROUPS)
def test_a_tree_that_was_changed(group: str, ledger: pg.GapLedger) -> None:
    tree = ledger.to_datatree().copy(deep=True)
    name = next(name for name, values in tree[group].data_vars.items() if values.dtype.kind == "f")
    values = tree[group][name].values
    tree[group][name].values[...] = np.nextafter(values, np.inf)
    with pytest.raises(InputError, match="delete the attribute 'pyrogaps_sha256'"):
        pg.GapLedger.from_datatree(tree)
    del tree.attrs["pyrogaps_sha256"]
    assert not pd.isna(pg.GapLedger.from_datatree(tree).summary()["mean"]).all()


@pytest.mark.parametrize("name", [RECIPE, WEIGHTS, LEDGER, "run.json"])
def test_files_of_a_run(name: str, number: int, tmp_path: Path) -> None:
    """Each is refused by name before anything is read from it, and what is derived is made anew."""
    folder, text = RunFolder(tmp_path), "seed: 0\n"
    folder.claim(text, overwrite=False)
    for result in (WEIGHTS, *([LEDGER] if name == LEDGER else [])):
        folder.write(result, lambda file: file.write(bytes(range(256))))
    for place in flips(folder / name, number):
        for overwrite in (False, True):
            with pytest.raises(InputError, match=rf"{name}:? is damaged, or"):
                folder.claim(text, overwrite=overwrite)
            assert (folder / WEIGHTS).exists(), place
    folder.claim(text, overwrite=False)
    if name != "run.json":
        (folder / name).rename(tmp_path / "away")
        folder.claim(text, overwrite=False)
        assert (folder / RECIPE).read_text() == text
        assert folder.holds(WEIGHTS) == (name != WEIGHTS)


def test_derived_files_are_known_as_they_were_written(number: int, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.claim("seed: 0\n", overwrite=False)
    folder.write("summary.csv", lambda file: file.write(b"quantity,mean\n"))
    assert folder.is_intact("summary.csv")
    for place in flips(folder / "summary.csv", number):
        assert not folder.is_intact("summary.csv"), place
    (folder / "summary.csv").write_bytes(b"")
    assert not folder.is_intact("summary.csv") and not any(map(folder.is_intact, UNFINISHED))
