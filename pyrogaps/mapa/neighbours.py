"""The nearest neighbours of every datapoint, found once and kept in a file."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyrogaps.errors import InputError
from pyrogaps.files import replacing
from pyrogaps.mapa.distances import Comparison
from pyrogaps.mapa.kernels import Kernel

FORMAT = "pyrogaps distances 1"
# Of a block of rows against all datapoints; what is done to it holds a few blocks at once.
BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Neighbours:
    """Of each datapoint the M nearest, itself among them, nearest first.

    `indices` `(N, M)` are whole numbers, `distances` `(N, M)` are double precision. Among equally near ones a
    datapoint itself comes first; which of the others come next, and which of them fall out at the end, is arbitrary.
    """

    indices: Tensor
    distances: Tensor

    def nearest(self, number: int) -> "Neighbours":
        """The first `number` of them."""
        return Neighbours(self.indices[:, :number], self.distances[:, :number])


def search(comparison: Comparison, number: int) -> Neighbours:
    """The `number` nearest neighbours of all N datapoints that are compared, exact for `number` = N.

    Otherwise they are found by brute force in the data's own precision, a block of rows at a time: N^2 D operations in
    matrix products, on the data's device. In hundreds of dimensions no tree does better, scikit-learn's brute force is
    the same product on a CPU, for symmetric distances alone, and nothing is approximate. The distances of what is found
    are computed again from differences.
    """
    rows = torch.arange(len(comparison.x), device=comparison.x.device)
    found = [_block(comparison, part, number) for part in rows.split(max(1, BLOCK_ELEMENTS // len(rows)))]
    return Neighbours(torch.cat([part.indices for part in found]), torch.cat([part.distances for part in found]))


def _block(comparison: Comparison, rows: Tensor, number: int) -> Neighbours:
    if number == len(comparison.x):
        columns = torch.arange(number, device=rows.device).expand(len(rows), -1)
        return _sorted(rows, columns, comparison.all_distances(rows))
    scores = comparison.scores(rows)
    own = (torch.arange(len(rows), device=rows.device), rows)
    kept = scores[own]
    scores[own] = _raised(kept)
    columns = scores.topk(number, sorted=False).indices
    scores[own] = kept
    return _sorted(rows, columns, comparison.distances(rows, columns, scores))


def _sorted(rows: Tensor, columns: Tensor, distances: Tensor) -> Neighbours:
    key = torch.where(columns == rows[:, None], _raised(-distances), -distances)
    order = key.sort(dim=1, descending=True, stable=True).indices
    return Neighbours(columns.gather(1, order).int(), distances.gather(1, order))


def _raised(values: Tensor) -> Tensor:
    """The next larger numbers, so that a datapoint stands before those that are exactly as near."""
    tiny = torch.finfo(values.dtype).tiny
    return torch.maximum(torch.nextafter(values, torch.full_like(values, torch.inf)), values + tiny)


def digest(x: Tensor) -> str:
    """What tells one data set from another: a hash of shape, type and values."""
    values = x.detach().cpu().contiguous()
    found = hashlib.blake2b(repr((tuple(x.shape), str(x.dtype))).encode(), digest_size=16)
    found.update(values.numpy().tobytes())
    return found.hexdigest()


def cached(path: str | Path, x: Tensor, kernel: Kernel, number: int) -> Neighbours:
    """As `search` of `x` `(N, *event)`, but read from the file `path`, or written there where it holds too few.

    Raises `InputError` where the file belongs to other data or to another distance, is damaged or cannot be written,
    and for a kernel of the user's own.
    """
    if not kernel.distance:
        raise InputError("cache: what a kernel of your own depends on is not known, so a file of it cannot be trusted")
    path, told = Path(path), {"format": FORMAT, "distance": kernel.distance, "data": digest(x)}
    if path.exists():
        found = _read(path, told)
        if found.indices.shape[1] >= number:
            found = found.nearest(number)
            return Neighbours(found.indices.to(x.device), found.distances.to(x.device))
    found = search(kernel.compare(x), number)
    _write(path, found, told)
    return found


def _read(path: Path, told: dict[str, str]) -> Neighbours:
    try:
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            held = {name: str(file[name]) for name in told}
            indices, distances = torch.from_numpy(file["indices"]), torch.from_numpy(file["distances"])
    except Exception as error:  # NumPy and zipfile raise half a dozen kinds for a damaged file
        raise InputError(f"cache {path}: cannot be read; it is damaged or no file of distances: delete it") from error
    reasons = {
        "format": "was made by another version",
        "distance": f"holds distances of another kind ({held['distance']}, not {told['distance']})",
        "data": "belongs to other data",
    }
    for name, reason in reasons.items():
        if held[name] != told[name]:
            raise InputError(f"cache {path}: {reason}; delete it or name another file")
    return Neighbours(indices, distances)


def _write(path: Path, found: Neighbours, told: dict[str, str]) -> None:
    arrays = {"indices": found.indices.cpu().numpy(), "distances": found.distances.cpu().numpy()}
    with replacing(path, "cache") as file:
        np.savez(file, allow_pickle=False, **arrays, **{name: np.array(value) for name, value in told.items()})
