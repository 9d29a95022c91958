"""Where data files lie, and what is said when they cannot be read."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyrogaps.errors import InputError

FOLDER = "--data_root (data_root=) or PYROGAPS_DATA"


def data_folder(data_root: str | None) -> Path | None:
    """The folder `data_root`, or that of the environment variable PYROGAPS_DATA; None where neither names one."""
    root = data_root or os.environ.get("PYROGAPS_DATA")
    return Path(root).expanduser() if root else None


def locate(name: str, path: str, data_root: str | None) -> Path:
    """The file `path`, from the current folder or from the data folder; `InputError` where it is in neither."""
    wanted, folder = Path(path).expanduser(), data_folder(data_root)
    candidates = [wanted] if folder is None else [wanted, folder / wanted]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    looked = " nor ".join(dict.fromkeys(str(candidate) for candidate in candidates))
    raise InputError(f"{name}: there is no file {looked}; give its full path, or the folder by {FOLDER}")


@contextmanager
def reading(name: str, path: Path, remedy: str) -> Iterator[None]:
    """Turn whatever a damaged file raises into an `InputError` of one line: the data set, the file, why, a remedy."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
        raise InputError(f"{name}: cannot read {path}: {reason}; {remedy}") from error
