"""Memory that this process may use, and memory that it uses."""

import ctypes
import gc
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pyrogaps.settings import Limit

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
# Control groups, versions 2 and 1: controller, root, and the names of limit, usage and reclaimable usage.
CGROUPS = (
    ("", "/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("memory", "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)

# Memory of the points that a model is evaluated at together: much less than a machine has, more than small models need.
# It is the same on all machines, because the last digits of results depend on it.
WORKING_SET = 256 << 20
# Parameters of glibc's mallopt: what is freed stays on the heap, of which tensors of any size are made.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
KEPT = {TRIM_THRESHOLD: (1 << 31) - 1, MMAP_MAX: 0}
# What glibc would have adapted to, had nobody set it.
GIVEN_BACK = {TRIM_THRESHOLD: 64 << 20, MMAP_THRESHOLD: 32 << 20, MMAP_MAX: 1 << 16}
_keeping = 0  # blocks of `kept` that are open
_working_set: ContextVar[int] = ContextVar("working_set", default=WORKING_SET)


def working_set() -> int:
    """Bytes available for intermediate results."""
    return _working_set.get()


@contextmanager
def limited(number: int) -> Iterator[None]:
    """Set the working set to `number` bytes within the block."""
    token = _working_set.set(number)
    try:
        yield
    finally:
        _working_set.reset(token)


def free_cycles() -> None:
    """Free the tensors that a finished step has left in reference cycles; call it between steps.

    A transform and its inverse refer to each other (torch 2.14), and each keeps the tensors of its last call, with all
    that their gradients need. These few objects hold a hundred megabytes a step, and Python, which counts objects and
    not bytes, collects them after thousands of steps. Only young objects are searched, in about 0.1 ms; within a step
    this would make old objects of those still in use.
    """
    gc.collect(1)


def parse_bytes(text: str | int) -> int:
    """Parse a number of bytes, such as 1000000, "4GiB" or "500MB"; raises `ValueError` for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b?\s*", str(text).lower())
    if match is None or match[2] not in UNITS:
        raise ValueError(text)
    return int(float(match[1]) * UNITS[match[2]])


Bytes = Annotated[int | str, Limit("a number of bytes such as 4GiB or 500MB", parse_bytes)]


def format_bytes(number: int) -> str:
    """A number of bytes in MiB or GiB."""
    return f"{number / (1 << 30):.2f} GiB" if number >= 1 << 30 else f"{number / (1 << 20):.0f} MiB"


def available() -> int:
    """Bytes that this process may still allocate: an even share for each process of `torchrun` on this machine."""
    free = [_system(), *_groups()]
    return min(free) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def resident() -> int:
    """Bytes of memory that this process uses."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return peak()


def peak() -> int:
    """Peak memory of this process, in bytes."""
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum << 10  # bytes on macOS, KiB elsewhere


@contextmanager
def kept() -> Iterator[None]:
    """Keep freed memory in this process within the block, where the C library is glibc; then give it back.

    A tensor of more than 32 MB is otherwise the system's again as soon as it is freed, and the next one is made of new
    pages, which the system clears one by one: with a flow for every datapoint, two thirds of all time. Nothing is
    changed where the environment has settings of its own for malloc.
    """
    global _keeping
    own = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if _LIBRARY is None or own:
        yield
        return
    _keeping += 1
    if _keeping == 1:
        _set_malloc(KEPT)
    try:
        yield
    finally:
        _keeping -= 1
        if not _keeping:
            _set_malloc(GIVEN_BACK)
            give_back()


def _set_malloc(settings: dict[int, int]) -> None:
    for parameter, value in settings.items():
        _LIBRARY.mallopt(parameter, value)


def give_back() -> None:
    """Return freed memory from the C library to the system, if the library supports it.

    Tensors of many sizes fragment the heap: without this a process keeps growing although it uses no more memory.
    """
    if _LIBRARY is not None:
        _LIBRARY.malloc_trim(0)


def _c_library() -> Any:
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None


_LIBRARY = _c_library()


def _system() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))


def _groups() -> list[int]:
    """Bytes left in this process's control groups that have a limit."""
    try:
        entries = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    own = {kind: path for _, kinds, path in entries for kind in kinds.split(",")}
    left = []
    for kind, root, *names in CGROUPS:
        path = PurePosixPath(own.get(kind, "/"))
        # Inside a container its group appears as the root, so that the path from outside does not exist.
        for group in (path, *path.parents):
            left += _left(Path(root) / str(group).lstrip("/"), *names)
    return left


def _left(group: Path, limit: str, usage: str, idle: str) -> list[int]:
    """Bytes left in one group, including reclaimable file pages; empty if there is no such group or no limit."""
    try:
        free = int((group / limit).read_text()) - int((group / usage).read_text())
        lines = (group / "memory.stat").read_text().splitlines()
        return [max(0, free + next((int(line.split()[1]) for line in lines if line.split()[0] == idle), 0))]
    except (OSError, ValueError, IndexError):
        return []
