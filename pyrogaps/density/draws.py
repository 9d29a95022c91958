"""Reproducible draws from a guide, block by block of datapoints."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pyrogaps.density.local import Draws, LocalGuide
from pyrogaps.streams import BLOCK, Chunk, particle_blocks, reseed


@runtime_checkable
class Posterior(Protocol):
    """Anything that gives a guide at some datapoints: a `GuideDensity`, or what refinement returns."""

    def at(self, indices: Tensor) -> LocalGuide: ...


class BlockedGuide:
    """A guide at the datapoints of a chunk, drawn from with each block's own stream.

    `offset` is the datapoint that `posterior` counts from. Draws use torch's global generators: call it inside
    `streams.seeded`, which restores them.
    """

    def __init__(self, posterior: Posterior, chunk: Chunk, offset: int = 0) -> None:
        self.blocks = [(block, posterior.at(block.indices - offset)) for block in chunk.blocks()]

    def sample(self, num_particles: int, seed: int, purpose: str, first: int = 0, *, antithetic: bool = False) -> Draws:
        """Draws `z` `(S, B, dim)` and log q `(S, B)`: particle block `first` of the stream called `purpose`."""
        pairs = []
        for block, local in self.blocks:
            reseed(seed, purpose, block.start // BLOCK, first)
            pairs.append(local.sample(num_particles, antithetic))
        return _join(pairs)

    def sample_all(self, num_particles: int, seed: int, purpose: str) -> Draws:
        """`num_particles` draws, in particle blocks, without gradients."""
        with torch.no_grad():
            parts = [self.sample(size, seed, purpose, i) for i, size in enumerate(particle_blocks(num_particles))]
        return torch.cat([z for z, _ in parts]), torch.cat([log_q for _, log_q in parts])

    def log_prob(self, z: Tensor) -> Tensor:
        """log q `(S, B)` of `z` `(S, B, dim)`."""
        start, parts = 0, []
        for block, local in self.blocks:
            parts.append(local.log_prob(z[:, start : start + len(block)]))
            start += len(block)
        return torch.cat(parts, 1)


def _join(pairs: list[Draws]) -> Draws:
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([z for z, _ in pairs], 1), torch.cat([log_q for _, log_q in pairs], 1)
