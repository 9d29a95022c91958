"""Batches of near neighbours, whose datapoints are decoded once for many."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrogaps.errors import InputError
from pyrogaps.mapa.posterior import MapaPosterior

Integers = np.ndarray[Any, np.dtype[Any]]


def neighbourhood_batches(
    posterior: MapaPosterior,
    batch_size: int,
    generator: torch.Generator | None = None,
    *,
    neighbourhood_size: int = 10,
    width: int = 10,
) -> Iterator[Tensor]:
    """One pass over the data in batches made of neighbourhoods that share their explanations: indices `(B,)`.

    A neighbourhood grows from a random datapoint by the one, among those not taken, of whose `width` most probable
    explanations it has most already. Half of K + S is a good `width`. Each call cuts the data anew; where that takes
    too long (some 20 microseconds a datapoint), keep a list of batches and shuffle it.

    Every datapoint is in one batch of a pass (the last may be short), and neighbourhoods come in random order, so that
    a batch's gradient is an unbiased estimate of the whole data set's, as a uniform batch's is. But what is near is
    alike, so that it has more variance: up to that of a uniform batch with one datapoint for each neighbourhood. On
    MNIST that loses more than sharing saves (`benchmarks.mapa_costs`): 2.6 times the variance for 0.6 of the passes
    with neighbourhoods of 5, 20 times for 0.3 with 100. They pay where passes are dear and the steps small.

    Raises `InputError` where `batch_size`, `neighbourhood_size` or `width` is below 1.
    """
    sizes = {"batch_size": batch_size, "neighbourhood_size": neighbourhood_size, "width": width}
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"neighbourhood_batches: {name} must be at least 1, got {value}")
    order = torch.randperm(posterior.num_datapoints, generator=generator)
    cutter = _Cutter(posterior.indices[:, :width].cpu().numpy())
    *full, last = cutter.cut(order.tolist(), min(neighbourhood_size, batch_size))
    # The last may be short; anywhere else it would push the others over the edges of their batches.
    shuffled = [full[position] for position in torch.randperm(len(full), generator=generator).tolist()]
    indices = torch.tensor([index for part in (*shuffled, last) for index in part], device=posterior.indices.device)
    yield from indices.split(batch_size)


class _Cutter:
    """Cuts datapoints into neighbourhoods; `explained_by` `(N, W)` are the datapoints that each one needs decoded."""

    def __init__(self, explained_by: Integers) -> None:
        self.explained_by = explained_by
        number = len(explained_by)
        # The datapoints that i explains are explains[starts[i] : starts[i + 1]].
        order = np.argsort(explained_by, axis=None, kind="stable")
        self.explains = order // explained_by.shape[1]
        self.starts = np.searchsorted(explained_by.ravel()[order], np.arange(number + 1))

    def cut(self, order: list[int], size: int) -> Iterator[list[int]]:
        """All datapoints in lists of `size`, each list begun at the first in `order` that is left."""
        free = np.ones(len(order), dtype=bool)
        shared = np.zeros(len(order), dtype=np.int32)
        seeds = (seed for seed in order if free[seed])
        while (seed := next(seeds, None)) is not None:
            yield self._grow(seed, seeds, size, free, shared)

    def _grow(self, seed: int, seeds: Iterator[int], size: int, free: Integers, shared: Integers) -> list[int]:
        """A list from `seed`; `shared`, all 0 between lists, counts what each datapoint has in common with it."""
        grown: list[int] = []
        decoded: set[int] = set()
        candidates = np.empty(0, dtype=np.int64)
        member: int | None = seed
        while member is not None:
            grown.append(member)
            free[member] = False
            shared[member] = 0
            if len(grown) == size:
                break
            fresh = [i for i in self.explained_by[member].tolist() if i not in decoded]
            decoded.update(fresh)
            candidates = np.concatenate([candidates, self._note(fresh, free, shared)])
            counts = shared[candidates]
            best = int(counts.argmax()) if len(counts) else -1
            member = int(candidates[best]) if best >= 0 and counts[best] > 0 else next(seeds, None)
        shared[candidates] = 0
        return grown

    def _note(self, decoded: list[int], free: Integers, shared: Integers) -> Integers:
        """Count what is decoded for those that it explains; returns those that had nothing in common before."""
        found = [self.explains[self.starts[i] : self.starts[i + 1]] for i in decoded]
        touched = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
        touched = touched[free[touched]]
        new = np.unique(touched[shared[touched] == 0])
        np.add.at(shared, touched, 1)
        return new
