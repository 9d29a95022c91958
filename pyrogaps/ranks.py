"""The processes that share the work: which of them this is, how they divide it, and what they tell each other.

They are those of `torch.distributed`, as `torchrun` starts them. Where that is not initialised there is one process,
of rank 0, and everything here costs nothing.
"""

import gc
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

if dist.is_available():
    # Imported while a process group is there, as torch does on its own at some first use, this module keeps the group
    # in its functions' defaults: its threads then outlive it and abort the process as the interpreter ends.
    import torch.distributed.nn.functional

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
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with as_lost_rank_error():
        dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
        leave()


def leave() -> None:
    """End what `torch.distributed.init_process_group` began, with all of its threads."""
    dist.destroy_process_group()
    gc.collect()  # a model in DistributedDataParallel is a cycle, and holds on to the group


def divided(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`work` on every item, in their order: each process takes its share, and all get all results.

    Within `work` the processes go their own ways: what would be divided there is done whole. Results are pickled.
    Raises on all processes the `InputError` that any of them met.
    """
    if world_size() == 1:
        return [work(item) for item in items]
    share, number = items[rank() :: world_size()], len(items)

    def own() -> tuple[int, list[Result]]:
        token = _dividing.set(True)
        try:
            return number, [work(item) for item in share]
        finally:
            _dividing.reset(token)

    shares = everywhere(own)
    if {its for its, _ in shares} != {number}:
        raise RuntimeError("processes that share work disagree about what there is to do")
    return [shares[place % len(shares)][1][place // len(shares)] for place in range(number)]


def first(compute: Callable[[], Result]) -> Result:
    """What `compute` returns on rank 0, which alone runs it, on every process; its `InputError` is raised on all."""
    if world_size() == 1:
        return compute()
    result: Any = everywhere(lambda: compute() if rank() == 0 else None)[0]
    return result  # type: ignore[no-any-return]


def together(compute: Callable[[], Result]) -> Result:
    """What `compute` returns on this process; where it raises an `InputError` on any of them, it is raised on all."""
    if world_size() == 1:
        return compute()
    found: list[Result] = []
    everywhere(lambda: found.append(compute()))
    return found[0]


def everywhere(compute: Callable[[], Result]) -> list[Result]:
    """What `compute` returns on every process, in the order of their ranks, tensors on the CPU.

    The first `InputError` among them is raised on all.
    """
    if world_size() == 1:
        return [compute()]
    own: Any
    try:
        own = tree_map_only(torch.Tensor, torch.Tensor.cpu, compute())
    except (InputError, FloatingPointError) as error:
        if getattr(error, "known", False):  # to all of them already, who are on their way out too
            raise
        own = error
    shares: list[Any] = [None] * world_size()
    with as_lost_rank_error():
        dist.all_gather_object(shares, own)
    for share in shares:
        if isinstance(share, Exception):
            share.known = True  # type: ignore[attr-defined]
            raise share
    return shares


@contextmanager
def as_lost_rank_error() -> Iterator[None]:
    """Raise `LostRankError` where `torch.distributed` says that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        words = str(error)
        if not (isinstance(error, dist.DistError) or any(name in words for name in ("gloo", "NCCL", "onnection"))):
            raise
        reason = words.splitlines()[0]
        raise LostRankError(f"rank {os.environ.get('RANK', '?')} lost the other processes ({reason})") from error


def restarted() -> bool:
    """Whether `torchrun` started this process in the place of one that died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def take_gpu() -> None:
    """Of several processes each takes a GPU of its own; raises `InputError` where there are not enough."""
    if world_size() == 1:
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise InputError(
            f"device: {torch.cuda.device_count()} GPUs are too few for the processes here; start as many as there are"
        )
    torch.cuda.set_device(local)
