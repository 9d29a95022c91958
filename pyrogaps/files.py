"""Files that appear whole or not at all, and folders that one process at a time writes to."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from pyrogaps.errors import InputError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None


@contextmanager
def replacing(path: Path, what: str) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the block ends; until then `path` is as it was.

    Raises `InputError`, which calls the file `what`, where it cannot be written.
    """
    with writing(path, what):
        path.parent.mkdir(parents=True, exist_ok=True)
        with in_place_of(path) as temporary, temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def in_place_of(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of `path` when the block ends well; nothing is left of it otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def writing(path: Path, what: str) -> Iterator[None]:
    """Say in one line, as an `InputError`, that `path`, which it calls `what`, cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what} {path}: cannot be written: {error.strerror or error}") from error


def hold(folder: Path, remedy: str) -> int | None:
    """Make `folder` this process's own, until it ends or closes the file descriptor returned.

    Returns None where the file system knows no locks. Raises `InputError`, with the `remedy`, where another process
    holds the folder.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"{folder}: another run is writing there; {remedy}") from None
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
