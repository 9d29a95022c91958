"""Arrays that are read by rows: in memory, memory-mapped, sparse, of Zarr or of HDF5, and files that hold one."""

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrogaps.density import IndexedData
from pyrogaps.density.data import check_indices, evenly_spaced
from pyrogaps.errors import InputError
from pyrogaps.guard import guarded
from pyrogaps.settings import checked

NUM_JUDGED = 64  # rows that are read at once, so that unusable ones are refused before anything is measured
KINDS = "an array (NumPy, np.memmap, SciPy sparse, Zarr, HDF5) or the path of an .npy file or of a Zarr array"
# What it has at given rows, which are in order and not repeated.
Column: TypeAlias = Callable[[NDArray[np.int64]], Tensor]


@guarded
@checked()
def from_arrays(arrays: Any, dtype: torch.dtype | None = None, names: Sequence[str] | None = None) -> IndexedData:
    """Arrays on disk or sparse as data, of which the rows asked for are read.

    Memory does not grow with the number of rows. Sparse rows become dense when they are read.

    Args:
        arrays: an array whose rows are datapoints, or a tuple or list of them, which are the model's arguments. Each is
            a NumPy array, memory-mapped ones too, a SciPy sparse matrix, an array of Zarr, a data set of h5py, or the
            path of an `.npy` file or of a Zarr array.
        dtype: of all tensors. None keeps floating-point numbers of 32 bits or more, and makes all others torch's
            default.
        names: one for each datapoint, which ledgers keep.

    Raises:
        InputError: for a file that does not exist or is none of these; for arrays of different lengths; for integers
            that the dtype cannot hold exactly; and, when rows are read, for indices beyond the last.

    Example:
        >>> import numpy as np, pyrogaps as pg, tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/counts.npy", np.arange(12, dtype=np.uint16).reshape(4, 3))
        ...     pg.from_arrays(f"{folder}/counts.npy").fetch(torch.tensor([3, 0]))
        (tensor([[ 9., 10., 11.],
                [ 0.,  1.,  2.]]),)
    """
    given = list(arrays) if isinstance(arrays, list | tuple) else [arrays]
    if not given:
        raise InputError(f"arrays: there are none. Pass {KINDS}")
    labels = ["arrays"] if len(given) == 1 else [f"arrays[{position}]" for position in range(len(given))]
    stored = [_opened(source, label) for source, label in zip(given, labels, strict=True)]
    lengths = [source.shape[0] for source in stored]
    if len({*lengths}) > 1:
        raise InputError(f"arrays: they have different numbers of rows: {lengths}. Pass arrays of the same datapoints")
    columns = [StoredRows(source, label, dtype) for source, label in zip(stored, labels, strict=True)]
    return indexed(columns, lengths[0], names, "arrays")


def indexed(columns: Sequence[Column], number: int, names: Sequence[str] | None, label: str) -> IndexedData:
    """Data whose arguments are what `columns` have."""
    if not number:
        raise InputError(f"{label}: there are no datapoints")

    def fetch(indices: Tensor) -> tuple[Tensor, ...]:
        check_indices(indices, number)
        # Rows are read once each and in the order of the file, which files on disk require.
        rows, places = indices.cpu().unique(return_inverse=True)
        return tuple(column(rows.numpy()).index_select(0, places) for column in columns)

    data = IndexedData(number, fetch, names=names)
    fetch(evenly_spaced(number, NUM_JUDGED))
    return data


class StoredRows:
    """Rows of an array as a tensor; `label` is its name in messages."""

    def __init__(self, source: Any, label: str, dtype: torch.dtype | None) -> None:
        self._source, self._label = source, label
        kind = np.dtype(source.dtype)
        if kind.kind not in "biuf":
            raise InputError(f"{label}: its dtype {kind} cannot become numbers. Pass an array of numbers")
        own = torch.float64 if kind == np.float64 else torch.float32 if kind == np.float32 else None
        self._dtype = dtype or own or torch.get_default_dtype()

    def __call__(self, rows: NDArray[np.int64]) -> Tensor:
        """The rows at these indices, which are in order and not repeated."""
        source = self._source
        # Zarr's own brackets take an index for each dimension.
        read = source.oindex[(rows, *(slice(None),) * (source.ndim - 1))] if hasattr(source, "oindex") else source[rows]
        values = np.asarray(read.toarray() if hasattr(read, "toarray") else read)
        self._check_fits(values, rows)
        if not values.dtype.isnative:
            values = values.astype(values.dtype.newbyteorder("="))
        # A copy, because a memory-mapped array can be changed by others, or not be written to.
        return torch.tensor(values if values.dtype.kind in "bf" else values.astype(np.int64), dtype=self._dtype)

    def _check_fits(self, values: NDArray[Any], rows: NDArray[np.int64]) -> None:
        """Refuse integers that the dtype rounds, and values that an integer dtype cannot hold."""
        to_float = self._dtype.is_floating_point
        if to_float and values.dtype.kind not in "iu":
            return
        if self._dtype == torch.bool:
            wrong = (values != 0) & (values != 1)
        else:
            most = int(2 / torch.finfo(self._dtype).eps) if to_float else torch.iinfo(self._dtype).max
            least = -most if to_float else torch.iinfo(self._dtype).min
            # As Python's integers, because NumPy compares 64 bits with and without a sign as floating-point numbers.
            inside = values.size == 0 or (least <= values.min().item() and values.max().item() <= most)
            wrong = np.zeros(values.shape, bool) if inside else (values < least) | (values > most)
            if values.dtype.kind == "f":
                wrong |= values != np.trunc(values)
        if not wrong.any():
            return
        at = np.argwhere(wrong)[0]
        value = values[tuple(at)].item()
        whole = value == value and abs(value) != float("inf") and value == int(value)
        remedy = "torch.float64" if whole and abs(value) <= 1 << 53 else "None"
        raise InputError(
            f"{self._label}: {value:,} in row {rows[at[0]]} does not fit in {self._dtype}"
            f"{', which rounds integers of this size' if to_float else ''}. Pass dtype={remedy}"
        )


def _opened(source: Any, label: str) -> Any:
    """An array of rows, or what is in the file of that path."""
    if isinstance(source, str | os.PathLike):
        source = _read(Path(source), label)
    if not all(hasattr(source, name) for name in ("shape", "dtype", "__getitem__")) or isinstance(source, Tensor):
        further = ". Pass a tensor as it is, without from_arrays" if isinstance(source, Tensor) else ""
        raise InputError(f"{label}: expected {KINDS}, got a {type(source).__name__}{further}")
    if not source.shape:
        raise InputError(f"{label}: it has no dimensions, so no rows. Pass an array of at least one dimension")
    if hasattr(source, "tocsr") and not hasattr(source, "to_memory"):  # of SciPy, whose other formats have no rows
        source = source.tocsr()
    return source


def _read(path: Path, label: str) -> Any:
    """The array in a file, which is mapped into memory or read by chunks."""
    check_exists(path, label)
    if path.suffix == ".npy":
        try:
            return np.load(path, mmap_mode="r")
        except ValueError as error:
            raise InputError(f"{label}: the file '{path}' holds no array of numbers ({error})") from error
    if path.suffix == ".npz":
        raise InputError(f"{label}: '{path}' is an archive, which is read whole. Pass np.load('{path}')['x']")
    if path.suffix in (".zarr", ".zip") or path.is_dir():
        zarr = library("zarr", label)
        try:
            found = zarr.open(path, mode="r")
        except Exception as error:  # of several classes, from one version of Zarr to the next
            raise InputError(f"{label}: '{path}' holds no Zarr array ({error})") from error
        if not hasattr(found, "shape"):
            some = ", ".join(repr(name) for name in sorted(found)[:5])
            raise InputError(
                f"{label}: '{path}' is a group of Zarr arrays ({some}). Pass one, as in zarr.open('{path}')[name]"
            )
        return found
    raise InputError(f"{label}: '{path}' is neither an .npy file nor a Zarr array. Open it, and pass an array")


def check_exists(path: Path, label: str) -> None:
    """Refuse a path with nothing at it."""
    if not path.exists():
        raise InputError(f"{label}: the file '{path}' does not exist. Check its name and folder")


def library(name: str, label: str) -> Any:
    """A module of an optional package."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        raise InputError(f"{label}: {package} is not installed. Run: pip install {package}") from error


def unique_names(names: Sequence[str]) -> tuple[str, ...] | None:
    """Names as data have them; None where two are alike."""
    found = tuple(map(str, names))
    return found if len({*found}) == len(found) else None
