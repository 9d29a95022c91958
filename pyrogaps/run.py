"""`Run`: how work on the datapoints of a problem is carried out."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from pyrogaps import memory, processes
from pyrogaps.chunk_cache import Arrays, ChunkCache
from pyrogaps.density import JointDensity
from pyrogaps.progress import ProgressBar
from pyrogaps.streams import BLOCK, Chunk, Stream, chunks, derive_seed, seeded

Result = TypeVar("Result")
FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
DELAY = 2.0  # seconds that a call may take before it shows how far it is


class Bar:
    """A progress bar over stages of chunks. Without a `ProgressBar` it shows nothing.

    Stages take different times, chunks about the same. So the time left is known once one of the `num_chunks` that are
    to be measured is finished; before, the bar shows none.
    """

    def __init__(self, bar: Any = None, num_stages: int = 1, num_chunks: int = 1) -> None:
        self._bar, self._num_stages, self._num_chunks = bar, num_stages, num_chunks
        self._begun = self._last = time.monotonic()
        self._started = self._finished = 0
        self._means: dict[str, list[np.ndarray[Any, Any]]] = {}

    def stage(self, name: str) -> None:
        """Name the stage that begins; the stages before it are finished."""
        if self._bar is not None:
            self._advance_to(self._started)
            self._started += 1
            self._bar.set_description_str(name)

    def advance(self, fraction: float, elbo: Tensor) -> None:
        """Move the bar by a fraction of a stage, not beyond its end, and show the mean of the bound it has reached."""
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"{self._left()}{self._reached()}ELBO {float(elbo.mean()):.2f} nats", refresh=False
            )
            self._bar.update(max(0.0, min(fraction, self._started - self._bar.n)))

    def finish_chunk(self, reached: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Show the means of what all finished chunks have reached, nats."""
        if self._bar is not None:
            for name, values in reached.items():
                self._means.setdefault(name, []).append(values)
            self._finished, self._last = self._finished + 1, time.monotonic()
            words = f"{self._left()}{self._reached()}{'nats' * bool(self._means)}"
            self._bar.set_postfix_str(words.removesuffix(", "), refresh=False)
            self._started = self._finished * self._num_stages
            self._advance_to(self._started)

    def _advance_to(self, position: float) -> None:
        self._bar.update(position - self._bar.n)

    def _left(self) -> str:
        """About how long the chunks that are left take, if they take as long as those before."""
        chunks_left = self._num_chunks - self._finished
        if not self._finished or chunks_left <= 0:
            return ""
        seconds = (self._last - self._begun) / self._finished * chunks_left - (time.monotonic() - self._last)
        return f"about {ProgressBar.format_interval(max(seconds, 0))} left, "

    def _reached(self) -> str:
        means = (f"{name} {np.concatenate(values).mean():.2f}" for name, values in self._means.items())
        return "".join(f"{mean}, " for mean in means).removesuffix(", ") + " " * bool(self._means)


@dataclass(frozen=True)
class Run:
    """Seed, chunks, processes, progress and cache: all that changes how numbers are computed, not what they mean.

    Attributes:
        seed: of all the randomness. Every purpose has a stream of its own, see `stream`.
        batch_size: datapoints worked on at once, in whole blocks of 64; it changes results in rounding alone.
        progress: whether `map_kept` and `map_shown` show a progress bar.
        cache: a folder in which `map_kept` keeps finished chunks; None keeps nothing.
        bar: the progress bar of the chunk at hand, which does nothing outside of these two.
    """

    seed: int = 0
    batch_size: int = BLOCK
    progress: bool = False
    cache: Path | None = None
    bar: Bar = field(default_factory=Bar, repr=False, compare=False)
    _last: dict[str, tuple[Any, Any]] = field(default_factory=dict, repr=False, compare=False)

    def remembered(self, name: str, key: Any, compute: Callable[[], Result]) -> Result:
        """What `compute` returned when `name` was last asked for, if the `key` was the same; else compute it."""
        if name not in self._last or self._last[name][0] != key:
            self._last[name] = key, compute()
        result: Result = self._last[name][1]
        return result

    def stream(self, purpose: str) -> Stream:
        """The random numbers of one purpose. No two purposes of a run may have the same name."""
        return Stream(self.seed, purpose)

    def derived(self, *labels: str | int) -> "Run":
        """The same run with streams of its own, which `labels` name."""
        return replace(self, seed=derive_seed(self.seed, *labels))

    def quiet(self) -> "Run":
        """The same run without its progress bar."""
        return replace(self, bar=Bar(), progress=False)

    def map(self, measure: Callable[[Chunk], Result], joint: JointDensity) -> list[Result]:
        """`measure` of every chunk of the data, in order.

        Where several processes share the work, each takes some chunks and all get all results, on the CPU. The
        caller's random state is restored afterwards.
        """
        with self.random_state_kept(joint), memory.kept():
            return processes.divided(partial(_freed, measure), chunks(joint.num_datapoints, self.batch_size))

    def map_alone(self, measure: Callable[[Chunk], Result], joint: JointDensity) -> list[Result]:
        """As `map`, every process by itself, for results that belong to their process, such as guides."""
        with self.random_state_kept(joint), memory.kept():
            return [_freed(measure, chunk) for chunk in chunks(joint.num_datapoints, self.batch_size)]

    def map_shown(
        self, measure: "Callable[[Chunk, Run], Result]", joint: JointDensity, stage: str, *, alone: bool = False
    ) -> list[Result]:
        """As `map`, or `map_alone`, with a progress bar called `stage` once it has taken two seconds.

        `measure` is given a chunk and this run with the bar.
        """
        pieces = chunks(joint.num_datapoints, self.batch_size)
        mine = pieces if alone else pieces[processes.rank() :: processes.world_size()]
        hidden = not self.progress or processes.rank() > 0
        with ProgressBar(total=len(mine), disable=hidden, bar_format=FORMAT, delay=DELAY) as bar:
            run = replace(self, bar=Bar(bar, 1, len(mine)))

            def shown(chunk: Chunk) -> Result:
                run.bar.stage(stage)
                result = measure(chunk, run)
                run.bar.finish_chunk({})
                return result

            return (self.map_alone if alone else self.map)(shown, joint)

    def map_kept(
        self,
        measure: "Callable[[Chunk, Run], Arrays]",
        joint: JointDensity,
        settings: Mapping[str, Any],
        fingerprint: Callable[[Chunk], Tensor],
        num_stages: int,
        reached: Callable[[Arrays], Mapping[str, Any]],
    ) -> list[tuple[Chunk, Arrays]]:
        """As `map`, with a progress bar; finished chunks are kept in the cache.

        Args:
            measure: given a chunk and this run with the bar of that chunk, which counts `num_stages` stages.
            joint: the density whose datapoints are measured.
            settings: a chunk in the cache holds only for the same settings,
            fingerprint: and for the same numbers here, which change with data and parameters.
            reached: what the bar shows the mean of, by name, from the arrays of a chunk.
        """
        cache = ChunkCache(self.cache, dict(settings))
        pieces = chunks(joint.num_datapoints, self.batch_size)
        # Processes share what is left to do evenly, whoever did the rest.
        done = processes.first(lambda: cache.present(pieces))
        order = sorted(pieces, key=lambda chunk: chunk in done)
        mine, shown = order[processes.rank() :: processes.world_size()], self.progress and processes.rank() == 0
        with (
            self.random_state_kept(joint),
            memory.kept(),
            ProgressBar(total=len(mine) * num_stages, disable=not shown, bar_format=FORMAT) as bar,
        ):
            shown_in = replace(self, bar=Bar(bar, num_stages, sum(chunk not in done for chunk in mine)))

            def kept(chunk: Chunk) -> tuple[Chunk, Arrays]:
                arrays = cache.get(chunk, fingerprint, lambda: measure(chunk, shown_in))
                shown_in.bar.finish_chunk(reached(arrays))
                memory.free_cycles()
                memory.give_back()
                return chunk, arrays

            return sorted(processes.divided(kept, order), key=lambda result: result[0].start)

    @contextmanager
    def random_state_kept(self, joint: JointDensity) -> Iterator[None]:
        """What a guide draws outside of all streams neither depends on the caller's random state nor changes it."""
        with seeded(self.seed, "unused", device=joint.device):
            yield


def _freed(measure: Callable[[Chunk], Result], chunk: Chunk) -> Result:
    """`measure` of a chunk, without what it leaves in memory."""
    result = measure(chunk)
    memory.free_cycles()
    return result
