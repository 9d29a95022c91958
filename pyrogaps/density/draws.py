"""Reproducible draws from a guide, block by block of datapoints."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyrogaps.density.joint import JointDensity
from pyrogaps.density.local import Draws, FactorisedGuide, LocalGuide
from pyrogaps.density.paths import Enumerates, KnowsPath, Paths
from pyrogaps.memory import free_cycles
from pyrogaps.streams import BLOCK, Chunk, Stream, particle_blocks, seeded


@runtime_checkable
class Posterior(Protocol):
    """A guide that can be taken at some datapoints: a `GuideDensity`, or the result of a refinement.

    `joint` is the density of the space that its draws lie in.
    """

    @property
    def joint(self) -> JointDensity: ...

    def at(self, indices: Tensor) -> LocalGuide: ...


def is_posterior(guide: Any) -> bool:
    """Whether this is a posterior per datapoint already, such as what `refine` returns.

    A caller's guide may well have a method `at`, of another meaning.
    """
    return isinstance(guide, Posterior)


class BlockedGuide:
    """A guide at the datapoints of a chunk; each block has its own random numbers.

    Draws use torch's global generators: call it inside `streams.seeded`, which restores them.
    """

    def __init__(self, posterior: Posterior, chunk: Chunk) -> None:
        self.blocks = [(block, posterior.at(block.indices)) for block in chunk.blocks()]

    def sample(self, num_particles: int, stream: Stream, first: int = 0, *, antithetic: bool = False) -> Draws:
        """Draws `z` `(S, B, dim)` and log q `(S, B)`: particle block `first` of the stream."""
        z, log_q = self.sample_extended(num_particles, stream, first, antithetic=antithetic)
        return z[..., : self.blocks[0][1].joint.dim], log_q

    def sample_extended(self, num_particles: int, stream: Stream, first: int = 0, *, antithetic: bool = False) -> Draws:
        """As `sample`, with the auxiliary variables after the latents."""
        pairs = []
        for block, local in self.blocks:
            stream.reseed(block.start // BLOCK, first)
            draw = local.sample_extended if isinstance(local, FactorisedGuide) else local.sample
            pairs.append(draw(num_particles, antithetic))
        return _join(pairs)

    def sample_path(
        self, num_particles: int, stream: Stream, first: int = 0, *, antithetic: bool = False
    ) -> Paths | None:
        """As `sample`, with log q as a function of the draws alone, for guides that know it from one run; else None."""
        if (paths := self.sample_paths(num_particles, stream, first, antithetic=antithetic)) is not None:
            return paths
        if not all(isinstance(local, KnowsPath) for _, local in self.blocks):
            return None
        pairs = []
        for block, local in self.blocks:
            assert isinstance(local, KnowsPath)
            stream.reseed(block.start // BLOCK, first)
            pairs.append(local.sample_path(num_particles, antithetic))
        return Paths(*_join(pairs))

    def sample_paths(
        self, num_particles: int, stream: Stream, first: int = 0, *, antithetic: bool = False
    ) -> Paths | None:
        """As `sample_path`, with all joint states of discrete sites, for guides that enumerate these; else None."""
        parts = []
        for block, local in self.blocks:
            if not isinstance(local, Enumerates):
                return None
            stream.reseed(block.start // BLOCK, first)
            parts.append(local.sample_paths(num_particles, antithetic))
        return Paths.joined(parts)

    def sample_all(self, num_particles: int, stream: Stream) -> Draws:
        """`num_particles` draws, in particle blocks, without gradients."""
        parts = list(self.in_blocks(num_particles, stream))
        return torch.cat([z for z, _ in parts]), torch.cat([log_q for _, log_q in parts])

    def in_blocks(self, num_particles: int, stream: Stream) -> Iterator[Draws]:
        """The same draws, one particle block at a time."""
        for first, size in enumerate(particle_blocks(num_particles)):
            with torch.no_grad():
                draws = self.sample(size, stream, first)
            yield draws
        free_cycles()

    def moments(self, num_particles: int, stream: Stream) -> Draws:
        """Mean and standard deviation `(B, dim)`: exact where known, else from `num_particles` draws."""
        if (known := self.exact_moments()) is not None:
            return known
        draws, _ = self.sample_all(num_particles, stream)
        return draws.mean(0), draws.std(0)

    def exact_moments(self) -> Draws | None:
        """Exact mean and standard deviation `(B, dim)`; None where they are not known."""
        exact = [local.moments() if isinstance(local, FactorisedGuide) else None for _, local in self.blocks]
        known = [pair for pair in exact if pair is not None]
        if len(known) < len(exact):
            return None
        with torch.no_grad():
            return torch.cat([mean for mean, _ in known]), torch.cat([scale for _, scale in known])

    @property
    def mean_field(self) -> bool:
        """Whether every coordinate is known to be independent of the others."""
        return all(getattr(local, "mean_field", False) for _, local in self.blocks)

    def log_prob(self, z: Tensor) -> Tensor:
        """log q `(S, B)` of `z` `(S, B, dim)`."""
        start, parts = 0, []
        for block, local in self.blocks:
            parts.append(local.log_prob(z[:, start : start + len(block)]))
            start += len(block)
        return torch.cat(parts, 1)

    def log_reverse(self, z: Tensor) -> Tensor | None:
        """log r(v|z) `(S, B)` of extended draws; None for a guide without auxiliary variables."""
        start, parts = 0, []
        for block, local in self.blocks:
            rows = z[:, start : start + len(block)]
            parts.append(local.log_reverse(rows) if isinstance(local, FactorisedGuide) else None)
            start += len(block)
        return torch.cat([part for part in parts if part is not None], 1) if parts[0] is not None else None


def probe(posterior: Posterior, joint: JointDensity, chunk: Chunk) -> Tensor:
    """A draw for every datapoint of `chunk`, its log q and its density under `joint`, flat, in double precision.

    The result is the same in every process and changes with the data and with the parameters of guide and model. It
    uses a draw, not a fixed point, because a guide with auxiliary variables can score only its own draws.
    """
    with seeded(0, "probe", device=joint.device), torch.no_grad():
        z, log_q = BlockedGuide(posterior, chunk).sample_extended(1, Stream(0, "probe"))
        log_joint = joint(z[..., : joint.dim], chunk.indices)
    return torch.cat([part.double().flatten() for part in (z, log_q, log_joint)])


def _join(pairs: list[Draws]) -> Draws:
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([z for z, _ in pairs], 1), torch.cat([log_q for _, log_q in pairs], 1)
