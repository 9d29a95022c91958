"""What saved DataTrees have in common: the provenance, and a checksum by which damage is noticed."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import xarray as xr

from pyrogaps.errors import InputError
from pyrogaps.settings import Limit

PROVENANCE, CHECKSUM = "pyrogaps", "pyrogaps_sha256"


def saved(what: str) -> Limit:
    """Of an argument: the tree that `what` was saved as."""
    return Limit("a DataTree", remedy=f"Open a saved {what} with xarray.open_datatree")


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
