"""The data folder, and errors for files that cannot be read."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyrogaps.errors import InputError

FOLDER = "--data_root (data_root=) or PYROGAPS_DATA"


def data_folder(data_root: str | None) -> Path | None:
    """The folder `data_root`, else that of the environment variable PYROGAPS_DATA, else None."""
    root = data_root or os.environ.get("PYROGAPS_DATA")
    return Path(root).expanduser() if root else None


def locate(name: str, path: str, data_root: str | None) -> Path:
    """The file `path` in the current folder, else in the data folder; `InputError` if it is in neither."""
    relative, folder = Path(path).expanduser(), data_folder(data_root)
    candidates = [relative] if folder is None else [relative, folder / relative]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    searched = " or ".join(dict.fromkeys(str(candidate) for candidate in candidates))
    raise InputError(f"{name}: there is no file {searched}. Pass its full path, or set the folder with {FOLDER}.")


@contextmanager
def reading(name: str, path: Path, remedy: str) -> Iterator[None]:
    """Turn any error of reading a file into a one-line `InputError`: data set, file, reason, remedy."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
        raise InputError(f"{name}: cannot read {path}: {reason}. {remedy}") from error
