"""Every random number that torch draws, under the name of the stream that it came from.

What is compared are the words that a generator handed out, so that neither the distribution, the number of draws nor
their precision hide that two streams share noise, nor labels that they do not.
"""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyrogaps import streams

Name = tuple[str | int, ...]
UNNAMED: Name = ("unnamed",)


class RecordedDraws(TorchDispatchMode):
    """A context that records the random words of the CPU generators.

    A stream's name are the user's seed and all labels under it, such as `(7, "elbo", 0, 1)`. `draws` has an entry for
    every call of a random operation: the name, and one key for each word that it used, made of that word and the next
    one. Two calls share a key where they share a word (by chance once in 2^62 pairs).
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.draws: list[tuple[Name, np.ndarray]] = []
        self._names: dict[int, Name] = {}
        self._spy(monkeypatch)

    def _spy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take down the labels of every seed that is derived, whichever module asks for it."""
        original = streams.derive_seed

        def derive_seed(seed: int, *labels: str | int) -> int:
            value = original(seed, *labels)
            self._names[value] = (*self._names.get(seed, (seed,)), *labels)
            return value

        for name, module in list(sys.modules.items()):
            if name.startswith("pyrogaps") and getattr(module, "derive_seed", None) is original:
                monkeypatch.setattr(module, "derive_seed", derive_seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        generator = kwargs.get("generator") or torch.default_generator
        before = generator.get_state()
        result = func(*args, **kwargs)
        words = words_between(before, generator.get_state())
        keys = words[:-1] << 31 | words[1:]
        self.draws.append((self._names.get(generator.initial_seed(), UNNAMED), keys))
        return result

    @property
    def names(self) -> set[Name]:
        """The streams that anything was drawn from."""
        return {name for name, _ in self.draws}

    def shared(self) -> set[tuple[Name, Name]]:
        """Pairs of streams with a word in common; a stream with itself where its words were drawn more than once."""
        keys = np.concatenate([keys for _, keys in self.draws])
        owners = np.repeat(np.arange(len(self.draws)), [len(keys) for _, keys in self.draws])
        order = np.argsort(keys, kind="stable")
        again = np.flatnonzero(np.diff(keys[order]) == 0)
        pairs = np.unique(np.stack([owners[order[again]], owners[order[again + 1]]]), axis=1).T
        return {(self.draws[first][0], self.draws[second][0]) for first, second in pairs.tolist()}


def words_between(before: torch.Tensor, after: torch.Tensor) -> np.ndarray:
    """The words that took a generator from one state to another, and the one that comes next."""
    generator = torch.Generator()
    generator.set_state(before)
    parts = []
    generation, left = _position(before)
    last_generation, last_left = _position(after)
    while generation != last_generation:
        parts.append(_words(generator, max(left - 1, 1)))
        generation, left = _position(generator.get_state())
    return np.concatenate([*parts, _words(generator, left - last_left + 1)])


def _position(state: torch.Tensor) -> tuple[bytes, int]:
    """The 624 words that a Mersenne twister is handing out, and how many are left: as torch lays its state out."""
    held = state.numpy().tobytes()
    return held[24 : 24 + 8 * 624], int(np.frombuffer(held[8:12], np.int32)[0])


def _words(generator: torch.Generator, number: int) -> np.ndarray:
    return torch.empty(number, dtype=torch.int32).random_(generator=generator).numpy().astype(np.int64)


def purpose_of(name: Name) -> str:
    """What a stream is for: its labels without numbers."""
    return " / ".join(label for label in name if isinstance(label, str))


def blocks_of(names: set[Name]) -> dict[str, set[int]]:
    """By purpose, the first number after the last label: the block of datapoints, where the stream is a block's."""
    blocks: dict[str, set[int]] = {}
    for name in names:
        last = max(place for place, label in enumerate(name) if isinstance(label, str))
        blocks.setdefault(purpose_of(name), set()).update(name[last + 1 : last + 2])  # type: ignore[arg-type]
    return blocks
