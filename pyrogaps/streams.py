"""Random number streams for fixed blocks of datapoints.

The random numbers of a datapoint depend only on the seed: each block of `BLOCK` consecutive datapoints has its own
generator, seeded by (seed, purpose, block), and draws of a guide come in sub-blocks of `PARTICLE_BLOCK` particles.
They do not depend on memory limits, chunk sizes or the number of processes.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
PARTICLE_BLOCK = 128


def derive_seed(seed: int, *labels: str | int) -> int:
    """A 63-bit seed for the stream that `labels` name under the user's one `seed`."""
    digest = hashlib.blake2b(repr((seed, *labels)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(seed: int, *labels: str | int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's global generators by `derive_seed(seed, *labels)` within the block; their state is restored."""
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        reseed(seed, *labels)
        yield


def reseed(seed: int, *labels: str | int) -> None:
    """Seed torch's global generators; call it inside `seeded`, which restores the caller's state.

    If CUDA is not initialised, `torch.manual_seed` queues a call for it, which takes longer than a gradient.
    """
    value = derive_seed(seed, *labels)
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)


@dataclass(frozen=True)
class Chunk:
    """Consecutive datapoints `start .. stop - 1`, in whole blocks (the data set's last block may be short)."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def indices(self) -> Tensor:
        return torch.arange(self.start, self.stop)

    def blocks(self) -> Iterator["Chunk"]:
        for start in range(self.start, self.stop, BLOCK):
            yield Chunk(start, min(start + BLOCK, self.stop))


def chunks(num_datapoints: int, batch_size: int) -> list[Chunk]:
    """Cut `0 .. N - 1` into chunks of about `batch_size` datapoints, rounded up to whole blocks."""
    size = max(1, -(-batch_size // BLOCK)) * BLOCK
    return [Chunk(start, min(start + size, num_datapoints)) for start in range(0, num_datapoints, size)]


def particle_blocks(num_particles: int) -> list[int]:
    """Sizes of the sub-blocks that `num_particles` draws come in."""
    whole, rest = divmod(num_particles, PARTICLE_BLOCK)
    return [PARTICLE_BLOCK] * whole + [rest] * (rest > 0)


@dataclass(frozen=True)
class Stream:
    """Random numbers for one purpose, with a separate sequence for every block of datapoints and of particles."""

    seed: int
    purpose: str

    def reseed(self, *labels: int) -> None:
        """Seed torch's global generators for the block of datapoints, and of particles, numbered by `labels`."""
        reseed(self.seed, self.purpose, *labels)

    def seed_of(self, *labels: int) -> int:
        """The seed of the block of datapoints, and of particles, numbered by `labels`."""
        return derive_seed(self.seed, self.purpose, *labels)

    @contextmanager
    def seeded(self, *labels: int, device: torch.device | str = "cpu") -> Iterator[None]:
        """Like `reseed`, within a `with` block; the caller's random state is restored."""
        with seeded(self.seed, self.purpose, *labels, device=device):
            yield

    def noise(self, chunk: Chunk, *, dtype: torch.dtype, device: torch.device) -> "Noise":
        """Standard noise for the datapoints of `chunk`."""
        return Noise(self, chunk, dtype=dtype, device=device)


class Noise:
    """Standard noise for the datapoints of a chunk, with one generator per block."""

    def __init__(self, stream: Stream, chunk: Chunk, *, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._blocks = []
        for block in chunk.blocks():
            generator = torch.Generator(device)
            generator.manual_seed(derive_seed(stream.seed, stream.purpose, block.start // BLOCK))
            self._blocks.append((len(block), generator))

    def normal(self, num_particles: int, *shape: int) -> Tensor:
        """Independent N(0, 1), shape `(S, B, *shape)`."""
        return self._draw(torch.randn, num_particles, shape)

    def uniform(self, num_particles: int, *shape: int) -> Tensor:
        """Independent U(0, 1), shape `(S, B, *shape)`."""
        return self._draw(torch.rand, num_particles, shape)

    def _draw(self, sampler, num_particles: int, shape: tuple[int, ...]) -> Tensor:  # type: ignore[no-untyped-def]
        parts = [
            sampler(num_particles, size, *shape, generator=generator, dtype=self.dtype, device=self.device)
            for size, generator in self._blocks
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
