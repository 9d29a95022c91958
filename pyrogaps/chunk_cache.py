"""Finished chunks on disk, so that a run that was killed continues where it stopped."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pyrogaps.files import is_sealed, remove_leftovers, replacing, seal, writing
from pyrogaps.guard import warn
from pyrogaps.streams import Chunk

Arrays = dict[str, Any]
Probe = Callable[[Chunk], Tensor]

_NAME = re.compile(r"(\d{9})-(\d{9})\.npz")


class ChunkCache:
    """A folder of chunk results, each written whole or not at all; None keeps nothing.

    A part is taken up again only where settings, seed, data and both programs' densities are what they were.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, settings: dict[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        if self.folder is not None:
            with writing(self.folder, "results"):
                self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, chunk: Chunk, probe: Probe, compute: Callable[[], Arrays]) -> Arrays:
        """The result of a chunk, from disk or computed and kept; it holds as long as `probe(chunk)` is the same."""
        if self.folder is None:
            return compute()
        path = _path(self.folder, chunk)
        fingerprint = hashlib.sha256(probe(chunk).cpu().numpy().tobytes()).hexdigest()[:16] + self.digest
        kept = _read(path)
        if kept is not None and str(kept.pop("fingerprint", "")) == fingerprint:
            return kept
        arrays = compute()
        with replacing(path, "results") as file:
            np.savez(file, fingerprint=np.array(fingerprint), **arrays)
            seal(file)
        return arrays

    def present(self, pieces: Sequence[Chunk]) -> set[Chunk]:
        """Those of the chunks that there is a file of, whatever it holds."""
        return {chunk for chunk in pieces if self.folder is not None and _path(self.folder, chunk).exists()}


def chunk_size(folder: str | os.PathLike[str] | None, num_datapoints: int) -> int | None:
    """Datapoints in each chunk whose result lies in `folder`, the data's last one left out; None without any."""
    names = () if folder is None else (path.name for path in Path(folder).glob("*.npz"))
    known = [(int(match[1]), int(match[2])) for name in names if (match := _NAME.fullmatch(name))]
    return max((stop - start for start, stop in known if stop != num_datapoints), default=None)


def remove_chunks(folder: Path) -> None:
    """Remove what caches wrote to `folder` and those in it, and the folders too unless something else lies there."""
    for below in [path for path in folder.glob("*") if path.is_dir() and not path.is_symlink()]:
        remove_chunks(below)
    remove_leftovers(folder, _NAME.fullmatch)
    for path in folder.glob("*.npz"):
        if _NAME.fullmatch(path.name):
            path.unlink()
    with suppress(OSError):
        folder.rmdir()


def _path(folder: Path, chunk: Chunk) -> Path:
    return folder / f"{chunk.start:09d}-{chunk.stop:09d}.npz"


def _read(path: Path) -> Arrays | None:
    """What is in the file; None where there is none, or, said in a warning, where it cannot be read."""
    try:
        with open(path, "rb") as file:
            if not is_sealed(file):
                raise ValueError("its checksum differs")
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        warn(f"{path} is damaged, so its datapoints are measured again")
        return None
