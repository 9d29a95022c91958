"""Processes that share the work: their ranks, the division of the work, and the exchange of results.

The processes are those of `torch.distributed`, started by `torchrun`. If it is not initialised, there is a single
process of rank 0, and the functions here cost nothing.
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
    # If torch imports this module while a process group exists, default arguments keep the group alive, and its threads
    # abort the process when the interpreter exits. Importing it now avoids that.
    import torch.distributed.nn.functional

Item = TypeVar("Item")
Result = TypeVar("Result")

# One process may have hours of work left when another has finished. A dead process is detected without this timeout.
TIMEOUT = timedelta(days=7)

_dividing: ContextVar[bool] = ContextVar("dividing", default=False)


class LostRankError(RuntimeError):
    """Another process has died; finished chunks are on disk."""


def rank() -> int:
    """This process's rank among those that share the work; 0 if it works alone."""
    return dist.get_rank() if _is_distributed() and not _dividing.get() else 0


def world_size() -> int:
    """Number of processes that share the work; 1 if this one works alone."""
    return dist.get_world_size() if _is_distributed() and not _dividing.get() else 1


def is_reporting() -> bool:
    """Whether this process prints messages for the user."""
    return not _is_distributed() or dist.get_rank() == 0


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that `torchrun` started, if any, within the block."""
    launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)
    if not launched or int(os.environ["WORLD_SIZE"]) == 1 or not dist.is_available():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with as_lost_rank_error():
        dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield
    finally:
        leave()


def leave() -> None:
    """Destroy the process group and end all of its threads."""
    dist.destroy_process_group()
    gc.collect()  # a model in DistributedDataParallel is a reference cycle that keeps the group alive


def divided(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Apply `work` to every item, divided among the processes; all processes get all results, in order.

    Within `work` each process counts as working alone, so that nested calls are not divided. Results are pickled.
    An `InputError` of one process is raised on all.
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
    if {count for count, _ in shares} != {number}:
        raise RuntimeError("the processes have different numbers of items to work on")
    return [shares[position % len(shares)][1][position // len(shares)] for position in range(number)]


def first(compute: Callable[[], Result]) -> Result:
    """Run `compute` on rank 0 only and return its result on every process; its `InputError` is raised on all."""
    if world_size() == 1:
        return compute()
    result: Any = everywhere(lambda: compute() if rank() == 0 else None)[0]
    return result  # type: ignore[no-any-return]


def together(compute: Callable[[], Result]) -> Result:
    """Run `compute` on every process and return this process's result; one's `InputError` is raised on all."""
    if world_size() == 1:
        return compute()
    results: list[Result] = []
    everywhere(lambda: results.append(compute()))
    return results[0]


def everywhere(compute: Callable[[], Result]) -> list[Result]:
    """Run `compute` on every process and return all results on each, by rank, with tensors on the CPU.

    The first `InputError` among them is raised on all.
    """
    if world_size() == 1:
        return [compute()]
    own: Any
    try:
        own = tree_map_only(torch.Tensor, torch.Tensor.cpu, compute())
    except (InputError, FloatingPointError) as error:
        if getattr(error, "known", False):  # all processes have it already and are raising it too
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
    """Raise `LostRankError` instead of errors by which `torch.distributed` reports a dead process."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not (isinstance(error, dist.DistError) or any(name in text for name in ("gloo", "NCCL", "onnection"))):
            raise
        reason = text.splitlines()[0]
        process = os.environ.get("RANK", "?")
        raise LostRankError(f"rank {process}: lost the connection to the other processes ({reason})") from error


def restarted() -> bool:
    """Whether `torchrun` started this process to replace one that died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def take_gpu() -> None:
    """Give each process its own GPU; raises `InputError` if there are too few."""
    if world_size() == 1:
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise InputError(
            f"device: this machine has fewer GPUs ({torch.cuda.device_count()}) than processes. Start at most one "
            "process per GPU."
        )
    torch.cuda.set_device(local)
