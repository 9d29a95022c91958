"""What a posterior of 60,000 images takes: seconds, and memory at its peak."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

import torch

from benchmarks.mapa_costs.settings import BANDWIDTHS, NUM_NEIGHBOURS, Settings

TITLE = f"The posterior of the training images, {NUM_NEIGHBOURS} neighbours each"
COLUMNS = ("what", "images", "wall seconds", "CPU seconds", "GiB at peak", "seconds allowed", "GiB allowed")
SECONDS_ALLOWED, GIB_ALLOWED = 300, 4
Row = list[object]
T = TypeVar("T")


def rows(settings: Settings) -> list[Row]:
    """Measured in a process of its own, whose peak is that of the building."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measured, settings, torch.get_num_threads()).result()


def measured(settings: Settings, num_threads: int) -> list[Row]:
    """What comes before, the building with no file to read, another bandwidth, and the file read."""
    torch.set_num_threads(num_threads)
    settings.cache.unlink(missing_ok=True)
    return list(_measured(settings))


def _measured(settings: Settings) -> Iterator[Row]:
    x = settings.images()
    yield ["library and images loaded", len(x), None, None, _peak(), None, None]
    posterior, *seconds = _timed(lambda: settings.posterior(x))
    yield ["built, and its file written", len(x), *seconds, _peak(), SECONDS_ALLOWED, GIB_ALLOWED]
    _, *seconds = _timed(lambda: posterior.with_bandwidth(BANDWIDTHS[1]))
    yield ["another bandwidth", len(x), *seconds, None, None, None]
    _, *seconds = _timed(lambda: settings.posterior(x))
    yield ["from its file", len(x), *seconds, None, None, None]


def _timed(work: Callable[[], T]) -> tuple[T, float, float]:
    """What `work` returns, wall seconds and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def _peak() -> float:
    """The most memory that the process has had so far, GiB."""
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
