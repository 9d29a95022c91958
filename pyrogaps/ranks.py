"""The processes that share the work: which of them this is, how they divide it, and what they tell each other.

They are those of `torch.distributed`, as `torchrun` starts them. Where that is not initialised there is one process,
of rank 0, and everything here costs nothing.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from pyrogaps.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

# One process may have finished chunks on disk where another has hours of work left. One that dies is noticed at once.
PATIENCE = timedelta(days=7)

_dividing: ContextVar[bool] = ContextVar("dividing", default=False)


class LostRankError(RuntimeError):
    """Another process is gone; what was finished is on disk."""


def rank() -> int:
    """This process's number among those that share the work, 0 where it works alone."""
    return dist.get_rank() if _several() and not _dividing.get() else 0


def world_size() -> int:
    """How many processes share the work, 1 where this one works alone."""
    return dist.get_world_size() if _several() and not _dividing.get() else 1


def speaks() -> bool:
    """Whether this is the process that tells the user what is being done."""
    return not _several() or dist.get_rank() == 0


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that `torchrun` started, for as long as the block runs; nothing where it started none."""
    told = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)
    if not told or int(os.environ["WORLD_SIZE"]) == 1 or not dist.is_available():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _losses_named():
        dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def divided(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`work` on every item, in their order: each process takes its share, and all get all results.

    Within `work` the processes go their own ways: what would be divided there is done whole. Results are pickled.
    Raises on all processes the `InputError` that any of them met.
    """
    if world_size() == 1:
        return [work(item) for item in items]
    share = items[rank() :: world_size()]
    token = _dividing.set(True)
    own: Any
    try:
        own = [work(item) for item in share]
    except (InputError, FloatingPointError) as error:
        own = error
    finally:
        _dividing.reset(token)
    shares = _all(own)
    return [shares[place % len(shares)][place // len(shares)] for place in range(len(items))]


def first(compute: Callable[[], Result]) -> Result:
    """What `compute` returns on rank 0, which alone runs it, on every process; its `InputError` is raised on all."""
    if world_size() == 1:
        return compute()
    own: Any = None
    if rank() == 0:
        try:
            own = compute()
        except (InputError, FloatingPointError) as error:
            own = error
    result: Result = _all(own)[0]
    return result


def together(compute: Callable[[], Result]) -> Result:
    """What `compute` returns on this process; where it raises an `InputError` on any of them, it is raised on all."""
    if world_size() == 1:
        return compute()
    own: Any = None
    error: Exception | None = None
    try:
        own = compute()
    except (InputError, FloatingPointError) as found:
        error = found
    _all(error)
    result: Result = own
    return result


def _all(own: Any) -> list[Any]:
    """What every process has, in the order of their ranks, tensors on the CPU; the first error among it is raised."""
    shares: list[Any] = [None] * world_size()
    plain = tree_map_only(torch.Tensor, torch.Tensor.cpu, own)
    with _losses_named():
        dist.all_gather_object(shares, plain)
    for share in shares:
        if isinstance(share, Exception):
            raise share
    return shares


@contextmanager
def _losses_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise LostRankError(f"rank {os.environ.get('RANK', '?')} lost the other processes ({reason})") from error
