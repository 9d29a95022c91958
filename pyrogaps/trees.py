"""What saved DataTrees have in common: files, the provenance, and a checksum by which damage is noticed."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import xarray as xr

from pyrogaps.errors import InputError
from pyrogaps.files import replacing, with_ending
from pyrogaps.guard import is_out_of_memory
from pyrogaps.settings import File, Limit

PROVENANCE, CHECKSUM = "pyrogaps", "pyrogaps_sha256"
ENGINE: Literal["h5netcdf"] = "h5netcdf"
ENDINGS = (".nc", ".nc4", ".netcdf", ".h5", ".hdf5")
MAX_REASON = 150
Result = TypeVar("Result")


def saved(what: str) -> Limit:
    """Of an argument: the tree that `what` was saved as."""
    return Limit("a DataTree", remedy=f"Open a saved {what} with xarray.open_datatree")


def content_of(tree: xr.DataTree) -> bytes:
    """A tree as the bytes of a netCDF file, made in memory: on a full disk the library would fail midway."""
    return bytes(tree.to_netcdf(engine=ENGINE))


def write_tree(tree: xr.DataTree, path: File, what: str) -> None:
    """Write a tree to a netCDF file, whole or not at all. Raises `InputError`, which names `what` it is."""
    target = with_ending(path, ENDINGS, remedy=f". It is netCDF; for a table write {what}.summary() with its to_csv")
    content = content_of(tree)
    with replacing(target, what, ". Choose another path") as file:
        file.write(content)


def read_tree(path: File, what: str, read: Callable[[xr.DataTree], Result]) -> Result:
    """What `read` makes of the tree in a file.

    Raises `InputError`, which names the file and `what` it should be, where there is none, or where it is damaged or
    something else.
    """
    path = Path(path)
    if not path.is_file():
        kind = "a folder, and no file" if path.is_dir() else "no such file"
        raise InputError(f"{what} {path}: {kind}. Pass the path that it was saved under")
    try:
        with xr.open_datatree(path, engine=ENGINE) as tree:
            return read(tree.load())
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # of HDF5, netCDF and xarray, in many ways
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}"[:MAX_REASON]
        raise InputError(
            f"{what} {path}: the file is damaged, or something else ({reason}). Restore a copy, or make it again"
        ) from error


def describe(tree: xr.DataTree, groups: Mapping[str, xr.Dataset], provenance: Mapping[str, Any]) -> xr.DataTree:
    """Give `tree` its provenance, as JSON, and a checksum of it and of the values in `groups`; returns the tree."""
    tree.attrs[PROVENANCE] = json.dumps(provenance)
    tree.attrs[CHECKSUM] = _checksum(groups, tree.attrs[PROVENANCE])
    return tree


def provenance_of(tree: xr.DataTree, groups: Mapping[str, xr.Dataset], what: str) -> dict[str, Any]:
    """The provenance of a tree. Raises `InputError`, which names `what` the tree is, where the checksum differs.

    A tree without a checksum is taken as it is.
    """
    text = tree.attrs[PROVENANCE]
    if tree.attrs.get(CHECKSUM) not in (None, _checksum(groups, text)):
        raise InputError(
            f"{what}: its values are not those that to_datatree wrote: the file is damaged, or the tree was changed. "
            f"Load a copy of the file, or, if you changed it yourself, delete the attribute '{CHECKSUM}'."
        )
    provenance: dict[str, Any] = json.loads(text)
    return provenance


def _checksum(groups: Mapping[str, xr.Dataset], text: str) -> str:
    """A SHA-256 of names, dimensions and values, which are the same before and after a file."""
    digest = hashlib.sha256(text.encode(errors="surrogatepass"))  # of a damaged file, text may not be Unicode
    for group, dataset in groups.items():
        for name, variable in sorted(dataset.variables.items(), key=lambda item: str(item[0])):
            values = variable.values
            digest.update(json.dumps([group, str(name), *map(str, variable.dims), *values.shape]).encode())
            if values.dtype.kind in "biufc":
                digest.update(values.dtype.newbyteorder("<").str.encode())
                digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
            else:
                digest.update(json.dumps([str(value) for value in values.ravel()]).encode())
    return digest.hexdigest()
