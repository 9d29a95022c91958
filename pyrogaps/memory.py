"""How much memory this process may use, and how much it holds."""

import ctypes
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import Any

from pyrogaps.errors import InputError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
# Control groups, versions 2 and 1: where they lie, and the names of limit, usage, and usage that would be given up.
CGROUPS = (
    ("", "/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("memory", "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)

# What the points that a model is evaluated at together may take: much less than a machine has, and more than small
# models need. It is the same on all machines, because results depend on such sizes in their last digits.
WORKING_SET = 256 << 20
_working_set: ContextVar[int] = ContextVar("working_set", default=WORKING_SET)


def working_set() -> int:
    """Bytes that intermediate results may take."""
    return _working_set.get()


@contextmanager
def limited(number: int) -> Iterator[None]:
    """A working set of so many bytes within the block."""
    token = _working_set.set(number)
    try:
        yield
    finally:
        _working_set.reset(token)


def parse_bytes(text: str | int) -> int:
    """A number of bytes, also written as "4GiB" or "500MB".

    Raises `InputError` for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b?\s*", str(text).lower())
    if found is None or found[2] not in UNITS:
        raise InputError(f"max_memory: expected a number of bytes, as in 4GiB or 500MB, got {text!r}")
    return int(float(found[1]) * UNITS[found[2]])


def told(number: int) -> str:
    """A number of bytes in words."""
    return f"{number / (1 << 30):.2f} GiB" if number >= 1 << 30 else f"{number / (1 << 20):.0f} MiB"


def available() -> int:
    """Bytes that may still be allocated here, shared evenly with the other processes that `torchrun` started here."""
    free = [_system(), *_groups()]
    return min(free) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def resident() -> int:
    """Bytes of memory that this process holds."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return peak()


def peak() -> int:
    """The most bytes of memory that this process has held."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found << 10


def give_back() -> None:
    """Return to the system what the C library keeps of memory that was freed, where it can be asked to.

    Tensors of many sizes leave gaps: without this a process that holds no more grows for hours.
    """
    if _LIBRARY is not None:
        _LIBRARY.malloc_trim(0)


def _c_library() -> Any:
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return library if hasattr(library, "malloc_trim") else None


_LIBRARY = _c_library()


def _system() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))


def _groups() -> list[int]:
    """What this process's control groups leave, where they set a limit."""
    try:
        entries = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    own = {kind: path for _, kinds, path in entries for kind in kinds.split(",")}
    left = []
    for kind, root, *names in CGROUPS:
        place = PurePosixPath(own.get(kind, "/"))
        # In a container its own group is the root, whatever it is called outside.
        for group in (place, *place.parents):
            left += _left(Path(root) / str(group).lstrip("/"), *names)
    return left


def _left(group: Path, limit: str, usage: str, idle: str) -> list[int]:
    """What one group leaves; nothing where there is no such group, or no limit. Pages of files are given up first."""
    try:
        free = int((group / limit).read_text()) - int((group / usage).read_text())
        lines = (group / "memory.stat").read_text().splitlines()
        return [max(0, free + next((int(line.split()[1]) for line in lines if line.split()[0] == idle), 0))]
    except (OSError, ValueError, IndexError):
        return []
