"""The nearest neighbours of every datapoint: the search, and the file that keeps its result."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyrogaps.errors import InputError
from pyrogaps.files import is_sealed, replacing, seal
from pyrogaps.mapa.distances import Comparison
from pyrogaps.mapa.kernels import Kernel
from pyrogaps.settings import File

FORMAT = "pyrogaps distances 1"
# The size of a block of rows against all datapoints. The search holds a few such blocks at once.
BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Neighbours:
    """The M nearest neighbours of each datapoint, itself included, nearest first.

    `indices` `(N, M)` are whole numbers, `distances` `(N, M)` are double precision. Among equally near neighbours, the
    datapoint itself comes first; the order of the others is arbitrary, and so is which of them are left out at the end.
    """

    indices: Tensor
    distances: Tensor

    def nearest(self, number: int) -> "Neighbours":
        """The first `number` neighbours of each datapoint."""
        return Neighbours(self.indices[:, :number], self.distances[:, :number])


def search(comparison: Comparison, number: int) -> Neighbours:
    """The `number` nearest neighbours of all N datapoints of `comparison`, by brute force.

    For `number` = N all distances are exact. For fewer, neighbours are selected in the data's own precision, a block of
    rows at a time, and their distances are then computed again from differences. The cost is N^2 D operations in matrix
    products, on the data's device. Trees are no faster in hundreds of dimensions.
    """
    rows = torch.arange(len(comparison.x), device=comparison.x.device)
    blocks = [_block(comparison, part, number) for part in rows.split(max(1, BLOCK_ELEMENTS // len(rows)))]
    return Neighbours(torch.cat([block.indices for block in blocks]), torch.cat([block.distances for block in blocks]))


def _block(comparison: Comparison, rows: Tensor, number: int) -> Neighbours:
    """The neighbours of the datapoints `rows`."""
    if number == len(comparison.x):
        columns = torch.arange(number, device=rows.device).expand(len(rows), -1)
        return _sorted(rows, columns, comparison.all_distances(rows))
    scores = comparison.scores(rows)
    own = (torch.arange(len(rows), device=rows.device), rows)
    own_scores = scores[own]
    scores[own] = _raised(own_scores)
    columns = scores.topk(number, sorted=False).indices
    scores[own] = own_scores
    return _sorted(rows, columns, comparison.distances(rows, columns, scores))


def _sorted(rows: Tensor, columns: Tensor, distances: Tensor) -> Neighbours:
    """Neighbours in ascending order of distance; the datapoint itself comes first among equals."""
    key = torch.where(columns == rows[:, None], _raised(-distances), -distances)
    order = key.sort(dim=1, descending=True, stable=True).indices
    return Neighbours(columns.gather(1, order).int(), distances.gather(1, order))


def _raised(values: Tensor) -> Tensor:
    """The next larger numbers. They put a datapoint before others at exactly the same distance."""
    tiny = torch.finfo(values.dtype).tiny
    return torch.maximum(torch.nextafter(values, torch.full_like(values, torch.inf)), values + tiny)


def digest(x: Tensor) -> str:
    """A hash of shape, type and values, which identifies a data set."""
    values = x.detach().cpu().contiguous()
    hashed = hashlib.blake2b(repr((tuple(x.shape), str(x.dtype))).encode(), digest_size=16)
    hashed.update(values.numpy().tobytes())
    return hashed.hexdigest()


def cached(path: File, x: Tensor, kernel: Kernel, number: int) -> Neighbours:
    """The result of `search` for `x` `(N, *event)`, read from the file `path` if it holds enough neighbours.

    Otherwise the search runs and its result is written to `path`.

    Raises `InputError` for a file of other data or of another distance, for a file that is damaged or cannot be
    written, and for a user's own kernel.
    """
    if not kernel.distance:
        raise InputError("cache: distances of a custom kernel cannot be cached. Leave cache out")
    path, header = Path(path), {"format": FORMAT, "distance": kernel.distance, "data": digest(x)}
    if path.exists():
        kept = _read(path, header)
        if kept.indices.shape[1] >= number:
            kept = kept.nearest(number)
            return Neighbours(kept.indices.to(x.device), kept.distances.to(x.device))
    neighbours = search(kernel.compare(x), number)
    _write(path, neighbours, header)
    return neighbours


def _read(path: Path, header: dict[str, str]) -> Neighbours:
    """The neighbours in a file, which must have the given header."""
    try:
        with path.open("rb") as opened:
            if not is_sealed(opened):
                raise ValueError("its checksum differs")
            file = np.load(opened, allow_pickle=False)
            written = {name: str(file[name]) for name in header}
            indices, distances = torch.from_numpy(file["indices"]), torch.from_numpy(file["distances"])
    except Exception as error:  # NumPy and zipfile raise half a dozen kinds for a damaged file
        raise InputError(f"cache {path}: cannot be read. It is damaged or contains no distances; delete it") from error
    reasons = {
        "format": "was made by another version",
        "distance": f"contains distances of another kind ({written['distance']}, not {header['distance']})",
        "data": "belongs to other data",
    }
    for name, reason in reasons.items():
        if written[name] != header[name]:
            raise InputError(f"cache {path}: {reason}. Delete it or name another file")
    return Neighbours(indices, distances)


def _write(path: Path, neighbours: Neighbours, header: dict[str, str]) -> None:
    """Write neighbours and header to a file."""
    arrays = {"indices": neighbours.indices.cpu().numpy(), "distances": neighbours.distances.cpu().numpy()}
    with replacing(path, "cache") as file:
        np.savez(file, allow_pickle=False, **arrays, **{name: np.array(value) for name, value in header.items()})
        seal(file)
