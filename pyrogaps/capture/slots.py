"""Densities and gradients for datapoints that need different numbers of points, in batches of few shapes."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from pyrogaps.capture.evaluator import GradientEvaluator
from pyrogaps.streams import Chunk, Noise, Stream

# Points to a slot, and slots to a batch: a shape is captured once, for whatever is asked. What is left over comes in
# small batches, so that little is padding.
POINTS, WIDTHS = 16, (64, 16)


class PointDensity(Protocol):
    """A density and its gradient at points `(S, B, dim)`: what a `BoundDensity` of one density offers."""

    @property
    def dim(self) -> int: ...

    def __call__(self, z: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]: ...

    def gradients(self, z: Tensor) -> tuple[Tensor, ...]: ...

    def values(self, z: Tensor) -> tuple[Tensor, ...]: ...


class Slots:
    """A slot is one datapoint of a block with `POINTS` points; a datapoint may have many slots.

    A list of slots, each named by its datapoint's place in the block, is cut into batches, the last padded with its
    first slot.
    """

    def __init__(self, evaluator: GradientEvaluator, block: Chunk) -> None:
        self.block, self.evaluator = block, evaluator
        self.widths = [width for width in WIDTHS if width <= len(block)] or [len(block)]
        # Every datapoint's record is checked against Pyro once, and so is every shape; `at` then trusts them.
        for positions in torch.arange(len(block)).split(self.widths[0]):
            evaluator.bind(block.indices[_padded(positions, self.widths[0])], POINTS)
        evaluator.bind(block.indices[: self.widths[-1]], POINTS)

    @property
    def dim(self) -> int:
        """The length of a point."""
        return self.evaluator.joint.dim

    def noise(self, stream: Stream, width: int, dtype: torch.dtype) -> Noise:
        """Standard noise for `width` of the block's datapoints, by the generator of the block."""
        first = self.block.start
        return stream.noise(Chunk(first, first + width), dtype=dtype, device=self.evaluator.joint.device)

    def batches(self, slots: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Slots of a batch, padding last, and how many of them are no padding."""
        for width in self.widths:
            while len(slots) >= width or (width == self.widths[-1] and len(slots)):
                batch, slots = slots[:width], slots[width:]
                yield _padded(batch, width), len(batch)

    def at(self, slots: Tensor) -> PointDensity:
        """log p(x, z) and its gradient at points `(POINTS, K, dim)` of a batch of K slots."""
        return self.evaluator.bind(self.block.indices[slots], POINTS, checked=True)

    def gradients(self, positions: Tensor, points: Tensor) -> Tensor:
        """Gradients `(S, M, dim)` at `points` `(S, M, dim)` of the datapoints at `positions` of the block."""
        return self._evaluated(positions, points, lambda density, z: density.gradients(z)[0])

    def values(self, positions: Tensor, points: Tensor) -> Tensor:
        """log p(x, z) `(S, M)` at `points` `(S, M, dim)` of the datapoints at `positions` of the block."""
        return self._evaluated(positions, points, lambda density, z: density.values(z)[0])

    def _evaluated(
        self, positions: Tensor, points: Tensor, evaluate: Callable[[PointDensity, Tensor], Tensor]
    ) -> Tensor:
        each = -(-len(points) // POINTS)
        short = each * POINTS - len(points)
        padded = torch.cat([points, points[:1].expand(short, -1, -1)]) if short else points
        # (each, POINTS, M, dim) -> (POINTS, M * each, dim): the slots of a datapoint lie side by side.
        flat = padded.unflatten(0, (each, POINTS)).permute(1, 2, 0, 3).flatten(1, 2)
        columns, owners, parts = torch.arange(flat.shape[1]), positions.repeat_interleave(each), []
        for batch, kept in self.batches(columns):
            parts.append(evaluate(self.at(owners[batch]), flat[:, batch].contiguous())[:, :kept])
        return of_datapoints(torch.cat(parts, 1), each)[: len(points)]


def of_datapoints(slots: Tensor, each: int) -> Tensor:
    """Values at points of slots `(POINTS, M * each, *)`, as those of M datapoints with `each` slots side by side,
    `(each * POINTS, M, *)`.
    """
    values: Tensor = slots.unflatten(1, (-1, each)).movedim(2, 0).flatten(0, 1)
    return values


def _padded(slots: Tensor, width: int) -> Tensor:
    return torch.cat([slots, slots[:1].expand(width - len(slots))])
