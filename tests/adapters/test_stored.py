"""Rows of arrays and of AnnData on disk: read by index, without the rest, and one line for wrong input."""

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

import pyrogaps as pg
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.linear_gaussian import LinearGaussian
from tests.refusals import refuses

X = np.random.default_rng(0).poisson(2.0, (50, 4)).astype(np.uint16)
ASKED = torch.tensor([7, 0, 7, 49])
# Warnings of anndata, Zarr and their libraries are not this library's.
pytestmark = pytest.mark.filterwarnings("ignore:::(?!pyrogaps)")


def memory_mapped(folder: Path) -> Any:
    np.save(folder / "x.npy", X)
    return np.load(folder / "x.npy", mmap_mode="r")


def saved(folder: Path) -> Any:
    memory_mapped(folder)
    return str(folder / "x.npy")


def hdf5(folder: Path) -> Any:
    h5py = pytest.importorskip("h5py")
    return h5py.File(folder / "x.h5", "w").create_dataset("x", data=X)


def zarr_array(folder: Path) -> Any:
    zarr = pytest.importorskip("zarr")
    array = zarr.open(str(folder / "x.zarr"), mode="w", shape=X.shape, chunks=(8, 4), dtype=X.dtype)
    array[:] = X
    return array


def zarr_path(folder: Path) -> Any:
    zarr_array(folder)
    return folder / "x.zarr"


FORMS = [
    memory_mapped,
    saved,
    hdf5,
    zarr_array,
    zarr_path,
    lambda folder: X,
    lambda folder: X.astype(">u2"),
    lambda folder: scipy.sparse.csr_matrix(X),
    lambda folder: scipy.sparse.coo_array(X),
]


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_those_asked_for(form: Callable[[Path], Any], tmp_path: Path) -> None:
    data = pg.from_arrays(form(tmp_path))
    (rows,) = data.fetch(ASKED)
    assert len(data) == 50
    torch.testing.assert_close(rows, torch.from_numpy(X[ASKED].astype(np.float32)), rtol=0, atol=0)
    model, guide = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,))
    expected = pg.elbo(model, guide, torch.from_numpy(X.astype(np.float32)), num_particles=10).value
    torch.testing.assert_close(pg.elbo(model, guide, data, num_particles=10).value, expected)


def test_several_arrays_are_several_arguments(tmp_path: Path) -> None:
    labels = np.arange(50, dtype=np.int8)
    data = pg.from_arrays([memory_mapped(tmp_path), labels], dtype=torch.long, names=[f"cell {n}" for n in range(50)])
    x, label = data.fetch(ASKED)
    assert x.dtype == torch.long and label.tolist() == ASKED.tolist()
    assert data.names is not None and data.names[7] == "cell 7"
    halves, doubles = (pg.from_arrays(X.astype(kind)).fetch(ASKED)[0].dtype for kind in (np.float16, np.float64))
    assert (halves, doubles) == (torch.float32, torch.float64)
    (mask,) = pg.from_arrays(X > 1, dtype=torch.bool).fetch(ASKED)
    assert torch.equal(mask, torch.from_numpy(X > 1)[ASKED])


class Counting:
    """An array that counts the rows which are read."""

    shape, dtype, ndim = (10**6, 3), np.dtype(np.float32), 2

    def __init__(self) -> None:
        self.read = 0

    def __getitem__(self, rows: Any) -> Any:
        assert (np.diff(rows) > 0).all()  # as HDF5 requires
        self.read += len(rows)
        return np.repeat(rows[:, None], 3, 1).astype(np.float32)


def test_no_other_rows_are_read() -> None:
    array = Counting()
    data = pg.from_arrays(array)
    before = array.read
    (rows,) = data.fetch(torch.tensor([999_999, 5, 5]))
    assert rows[:, 0].tolist() == [999_999, 5, 5]
    assert before <= 64 and array.read - before == 2


def cells() -> Any:
    anndata = pytest.importorskip("anndata")
    adata = anndata.AnnData(scipy.sparse.csr_matrix(X.astype(np.float32)), layers={"counts": X})
    adata.obs_names = [f"cell {n}" for n in range(50)]
    adata.obs["age"], adata.obs["donor"] = np.arange(50) / 2, [*"ba"] * 25
    return adata


def in_memory(adata: Any, folder: Path) -> Any:
    return adata


def as_h5ad(adata: Any, folder: Path) -> Any:
    adata.write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad"


def backed(adata: Any, folder: Path) -> Any:
    return pytest.importorskip("anndata").read_h5ad(as_h5ad(adata, folder), backed="r")


def as_zarr(adata: Any, folder: Path) -> Any:
    pytest.importorskip("zarr")
    adata.write_zarr(folder / "cells.zarr")
    return str(folder / "cells.zarr")


@pytest.mark.parametrize("form", [in_memory, as_h5ad, backed, as_zarr])
def test_cells_of_an_anndata(form: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    adata = form(cells(), tmp_path)
    expected = torch.from_numpy(X[ASKED].astype(np.float32))
    data = pg.from_anndata(adata, obs=["age", "donor"])
    x, age, donor = data.fetch(ASKED)
    torch.testing.assert_close(x, expected, rtol=0, atol=0)
    assert age.tolist() == [3.5, 0.0, 3.5, 24.5] and donor.tolist() == [0, 1, 0, 0]
    assert data.names is not None and data.names[49] == "cell 49"
    (counts,) = pg.from_anndata(adata, layer="counts").fetch(ASKED)
    torch.testing.assert_close(counts, expected, rtol=0, atol=0)


def test_wrong_arrays_are_refused(tmp_path: Path) -> None:
    refuses(lambda: pg.from_arrays(X).fetch(torch.tensor([50])), "indices: they must be from 0 to N - 1 = 49")
    refuses(lambda: pg.from_arrays(X).fetch(torch.tensor([-1])), "N - 1 = 49")
    refuses(lambda: pg.from_arrays(tmp_path / "none.npy"), "none.npy' does not exist")
    (tmp_path / "x.csv").write_text("1,2")
    refuses(lambda: pg.from_arrays(tmp_path / "x.csv"), "neither an .npy file nor a Zarr array")
    refuses(lambda: pg.from_arrays([X, X[:3]]), "different numbers of rows: [50, 3]")
    refuses(lambda: pg.from_arrays(X[:0]), "no datapoints")
    refuses(lambda: pg.from_arrays([]), "there are none")
    refuses(lambda: pg.from_arrays({"x": X}), "expected an array", "got a dict")
    refuses(lambda: pg.from_arrays(torch.ones(3)), "got a Tensor", "without from_arrays")
    refuses(lambda: pg.from_arrays(np.array(["a", "b"])), "cannot become numbers")
    refuses(lambda: pg.from_arrays(X, names=["a"]), "names")


@pytest.mark.parametrize(
    ("value", "kind", "dtype", "remedy"),
    [
        ((1 << 24) + 1, np.uint32, None, torch.float64),
        (300, np.int64, torch.uint8, torch.float64),
        (-1, np.int64, torch.uint8, torch.float64),
        ((1 << 63) + 1, np.uint64, torch.long, None),
        (0.5, np.float32, torch.long, None),
        (2, np.int8, torch.bool, torch.float64),
    ],
)
def test_integers_that_do_not_fit_are_refused(value: float, kind: Any, dtype: Any, remedy: Any) -> None:
    """The remedy works, too, where 64 bits can hold the number."""
    x = np.ones((3, 2), kind)
    x[1, 1] = value
    refuses(lambda: pg.from_arrays(x, dtype=dtype), f"{value:,} in row 1 does not fit", f"Pass dtype={remedy}")
    if value < 1 << 53:
        assert pg.from_arrays(x, dtype=remedy).fetch(torch.tensor([1]))[0][0, 1] == value


def test_wrong_anndata_are_refused(tmp_path: Path) -> None:
    adata = cells()
    refuses(lambda: pg.from_anndata(tmp_path / "none.h5ad"), "none.h5ad' does not exist")
    refuses(lambda: pg.from_anndata(X), "expected an AnnData or the path of one, got a ndarray")
    for source in (adata, as_h5ad(adata, tmp_path)):
        refuses(lambda source=source: pg.from_anndata(source, layer="raw"), "no layer 'raw'. Pass 'counts', or None")
        refuses(lambda source=source: pg.from_anndata(source, obs=["sex"]), "no column 'sex'. Pass 'age' or 'donor'")
        refuses(lambda source=source: pg.from_anndata(source).fetch(torch.tensor([50])), "N - 1 = 49")
    (tmp_path / "other.h5ad").write_bytes(b"no HDF5")
    refuses(lambda: pg.from_anndata(tmp_path / "other.h5ad"), "holds no AnnData")
    adata.layers["large"] = np.full((50, 4), 1 << 25)
    refuses(lambda: pg.from_anndata(adata, layer="large"), "adata.layers['large']: 33,554,432 in row 0", "dtype=torch.")
    adata.obs["age"] = np.where(np.arange(50) == 9, np.nan, 1.0)
    refuses(lambda: pg.from_anndata(adata, obs=["age"]), "obs: 'age' of row 'cell 9' is missing")
    adata.X = None
    refuses(lambda: pg.from_anndata(adata), "it has no X. Pass as layer 'counts' or 'large'")


def test_the_example_of_from_anndata_runs() -> None:
    """That of the docstring, which is skipped where anndata may be missing."""
    pytest.importorskip("anndata")
    test = doctest.DocTestParser().get_doctest(
        (pg.from_anndata.__doc__ or "").replace("# doctest: +SKIP", ""), {}, "from_anndata", None, 0
    )
    assert doctest.DocTestRunner(verbose=False).run(test).failed == 0
