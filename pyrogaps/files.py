"""Atomic writing of files, and locks on folders."""

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
except ImportError:  # not on Windows
    fcntl = None


@contextmanager
def replacing(path: Path, what: str) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` when the block ends; until then `path` is unchanged.

    Raises `InputError`, which names the file `what`, if it cannot be written.
    """
    with writing(path, what):
        path.parent.mkdir(parents=True, exist_ok=True)
        with in_place_of(path) as temporary, temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def in_place_of(path: Path) -> Iterator[Path]:
    """A temporary path that replaces `path` when the block succeeds and is deleted otherwise."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def writing(path: Path, what: str) -> Iterator[None]:
    """Turn an `OSError` of writing `path`, named `what`, into a one-line `InputError`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what} {path}: cannot be written: {error.strerror or error}") from error


def hold(folder: Path, remedy: str) -> int | None:
    """Lock `folder` until this process ends or closes the returned file descriptor.

    Returns None if the file system does not support locks. Raises `InputError`, with the `remedy`, if another process
    has locked the folder.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InputError(f"{folder}: another run is writing there. {remedy}") from None
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
