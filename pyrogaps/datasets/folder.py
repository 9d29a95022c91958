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
