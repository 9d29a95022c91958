"""`from_anndata`: the rows of an AnnData, or of a file that holds one, fetched by index."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrogaps.adapters.stored import Column, StoredRows, check_exists, indexed, library, unique_names
from pyrogaps.density import IndexedData
from pyrogaps.errors import InputError
from pyrogaps.guard import guarded
from pyrogaps.settings import Name, checked

NUM_NAMED = 5  # names in a message


@guarded
@checked()
def from_anndata(
    adata: Any, layer: Name | None = None, obs: Sequence[Name] = (), dtype: torch.dtype | None = None
) -> IndexedData:
    """The rows of an AnnData as data of a model, read by index.

    X, or a layer, may be dense, sparse, or on disk. A row becomes dense when it is read, and memory does not grow with
    the number of rows. Of a path, layers are read by rows too; `anndata.read_h5ad(backed="r")` reads them whole.

    Args:
        adata: an AnnData, or the path of its `.h5ad` file or Zarr store.
        layer: the layer to take instead of X.
        obs: columns of `obs` that the model takes as further arguments, of shape `(B,)` each: numbers as floating-point
            numbers, all else as the numbers of its categories in their order.
        dtype: of the rows; None keeps floating-point numbers of 32 bits or more, and makes all others torch's default.

    Returns:
        The data, with the names of the rows where no two are alike.

    Raises:
        InputError: for a file, a layer or a column that is not there; for a column with missing values; for integers
            that the dtype cannot hold exactly; and, when rows are read, for indices beyond the last.

    Example:
        >>> import anndata, numpy as np, pyrogaps as pg, torch                         # doctest: +SKIP
        >>> adata = anndata.AnnData(np.arange(6, dtype=np.float32).reshape(3, 2))      # doctest: +SKIP
        >>> adata.obs["batch"] = ["b", "a", "b"]                                       # doctest: +SKIP
        >>> pg.from_anndata(adata, obs=["batch"]).fetch(torch.tensor([2, 1]))          # doctest: +SKIP
        (tensor([[4., 5.],
                [2., 3.]]), tensor([1, 0]))
    """
    matrix, table, where = _parts(adata, layer)
    columns: list[Column] = [StoredRows(matrix, where, dtype), *(_Column(table, name) for name in obs)]
    return indexed(columns, len(table), unique_names(table.index), "adata")


class _Column:
    """A column of `obs` as a tensor."""

    def __init__(self, table: Any, name: str) -> None:
        if name not in table:
            raise InputError(f"obs: there is no column '{name}'. {_known(table, 'Pass')}")
        column = table[name]
        if (missing := column.isna().to_numpy()).any():
            row = table.index[int(np.flatnonzero(missing)[0])]
            raise InputError(f"obs: '{name}' of row '{row}' is missing. Remove such rows, or fill them in")
        if column.dtype.kind in "biuf":
            self._values = torch.tensor(column.to_numpy(np.float64), dtype=torch.get_default_dtype())
        else:
            self._values = torch.tensor(column.astype("category").cat.codes.to_numpy(np.int64))

    def __call__(self, rows: NDArray[np.int64]) -> Tensor:
        return self._values[torch.from_numpy(rows)]


def _parts(adata: Any, layer: str | None) -> tuple[Any, Any, str]:
    """The matrix, the table of its rows, and what messages call the matrix."""
    where = "adata.X" if layer is None else f"adata.layers['{layer}']"
    if isinstance(adata, str | os.PathLike):
        return *_of_file(Path(adata), layer), where
    if not hasattr(adata, "obs_names") or not hasattr(adata, "layers"):
        raise InputError(f"adata: expected an AnnData or the path of one, got a {type(adata).__name__}")
    if layer is not None:
        _check_layer(layer, adata.layers)
    elif adata.X is None:
        raise InputError(f"adata: it has no X. {_known(adata.layers, 'Pass as layer')}")
    return adata.X if layer is None else adata.layers[layer], adata.obs, where


def _of_file(path: Path, layer: str | None) -> tuple[Any, Any]:
    """The matrix and the table of rows in a file, the former not read yet."""
    check_exists(path, "adata")
    io = library("anndata.io", "adata")
    try:
        if path.is_dir():
            store: Any = library("zarr", "adata").open_group(path, mode="r")
        else:
            store = library("h5py", "adata").File(path, "r")
        table = io.read_elem(store["obs"])
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"adata: '{path}' holds no AnnData. Pass an .h5ad file or a Zarr store of one") from error
    layers = store.get("layers", {})
    if layer is not None:
        _check_layer(layer, layers)
    elif "X" not in store:
        raise InputError(f"adata: it has no X. {_known(layers, 'Pass as layer')}")
    found = store["X"] if layer is None else layers[layer]
    return found if hasattr(found, "shape") else io.sparse_dataset(found), table


def _check_layer(layer: str, layers: Any) -> None:
    if layer not in layers:
        raise InputError(f"layer: there is no layer '{layer}'. {_known(layers, 'Pass')}, or None for X")


def _known(names: Any, words: str) -> str:
    """What else there is, in words."""
    some = [repr(str(name)) for name in names]
    more = f" or one of {len(some) - NUM_NAMED:,} more" if len(some) > NUM_NAMED else ""
    return f"{words} {' or '.join(some[:NUM_NAMED])}{more}" if some else "There are none"
