"""Files written whole or not at all, the checksums that they carry, and locks on folders."""

import errno
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterator
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

# Temporary files that `replacing` makes, and the name of the file that each was to become.
_TEMPORARY = re.compile(r"\.(.+)\.pyrogaps-[0-9a-f]{16}\.tmp")
# The comment that closes a sealed archive: this and 64 hexadecimal digits.
_SEAL = b"pyrogaps sha256 "
_SEAL_SIZE = len(_SEAL) + 64


def with_ending(path: str | os.PathLike[str], endings: Collection[str], name: str = "path", remedy: str = "") -> Path:
    """The path; raises `InputError`, which names the argument and ends with `remedy`, where it ends otherwise."""
    if Path(path).suffix.lower() not in endings:
        *most, last = endings
        raise InputError(f"{name}: must end in {', '.join(most)}{' or ' * bool(most)}{last}, got '{path}'{remedy}")
    return Path(path)


@contextmanager
def replacing(path: Path, what: str, remedy: str = "") -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` when the block ends; until then `path` is unchanged.

    Raises `InputError`, which names the file `what` and ends with `remedy`, if it cannot be written.
    """
    with writing(path, what, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.pyrogaps-{secrets.token_hex(8)}.tmp")
        file = temporary.open("x+b")
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink()


def _sync(folder: Path) -> None:
    """Bring the names in `folder` to the disk, so that a rename outlives a power failure."""
    if fcntl is None:  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems that sync no folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path, what: str, remedy: str = "") -> Iterator[None]:
    """Turn an `OSError` of writing `path`, named `what`, into a one-line `InputError`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what} {path}: cannot be written: {error.strerror or error}{remedy}") from error


def remove_leftovers(folder: Path, wanted: Callable[[str], object]) -> None:
    """Remove temporary files that killed processes left in `folder`, where `wanted` takes the name of the target."""
    for path in folder.glob(".*.tmp"):
        if (match := _TEMPORARY.fullmatch(path.name)) and wanted(match[1]):
            path.unlink(missing_ok=True)


def sha256(file: BinaryIO, size: int | None = None) -> str:
    """The SHA-256 of an open file, or of its first `size` bytes, in hexadecimal digits."""
    left = file.seek(0, os.SEEK_END) if size is None else size
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(min(left, 1 << 20)):
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()


def seal(file: BinaryIO) -> None:
    """End a ZIP archive (the form of `.pt` and `.npz` files) with its own SHA-256, as a comment that readers skip."""
    file.seek(-2, os.SEEK_END)  # the archive ends with the length of its comment
    file.write(_SEAL_SIZE.to_bytes(2, "little"))
    file.write(_SEAL + sha256(file).encode())


def is_sealed(file: BinaryIO) -> bool:
    """Whether a file is, to the bit, what `seal` left; it is rewound to its start."""
    size = max(file.seek(0, os.SEEK_END) - _SEAL_SIZE, 0)
    file.seek(size)
    sealed = file.read() == _SEAL + sha256(file, size).encode()
    file.seek(0)
    return sealed


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
