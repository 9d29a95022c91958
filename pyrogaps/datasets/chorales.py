"""Bach's chorales as sequences over the 88 keys of a piano."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrogaps.datasets.folder import locate, reading
from pyrogaps.errors import InputError

LOWEST, HIGHEST = 21, 108
# Names of the parts in the file, and here.
PARTS = {"train": "train", "valid": "validation", "test": "test"}

Sequences = tuple[Tensor, Tensor]


@dataclass(kw_only=True, eq=False)
class Chorales:
    """Bach's chorales in quarter notes (Boulanger-Lewandowski et al., arXiv:1206.6392), or a file in their format.

    The file is JSON with the lists "train", "valid" and "test" of chorales. A chorale is a list of time steps, a step
    is the list of MIDI notes that sound, from 21 to 108; it is empty in a rest.

    `.train`, `.validation` and `.test` are pairs `(x, lengths)` for sequence models: `x` `(N, T, 88)` floats, 1 for a
    note that sounds, and `lengths` `(N,)` in steps. All three are padded with zeros to the length T of the longest
    chorale.

    Args:
        path: the file, relative to the current folder or else to the data folder.
        data_root: the data folder; None uses the environment variable PYROGAPS_DATA.

    Raises `InputError`, naming part, chorale and step, if the file is missing or has another format.
    """

    path: str = "jsb-chorales-quarter.json"
    data_root: str | None = None
    train: Sequences = field(init=False, repr=False)
    validation: Sequences = field(init=False, repr=False)
    test: Sequences = field(init=False, repr=False)

    def __post_init__(self) -> None:
        path = locate("Chorales", self.path, self.data_root)
        with reading("Chorales", path, "Check that the file is complete and JSON."):
            content = json.loads(path.read_text("utf-8"))
        parts = {name: _chorales(path, content, key) for key, name in PARTS.items()}
        longest = max(len(chorale) for chorales in parts.values() for chorale in chorales)
        for name, chorales in parts.items():
            setattr(self, name, _padded(chorales, longest))


def _chorales(path: Path, content: Any, part: str) -> list[list[list[int]]]:
    """The chorales of one part, checked."""
    chorales = content.get(part) if isinstance(content, dict) else None
    if not isinstance(chorales, list) or not chorales:
        raise InputError(
            f"Chorales: {path}: the list '{part}' is missing or empty. The file needs non-empty lists "
            f"{', '.join(PARTS)}."
        )
    for number, chorale in enumerate(chorales):
        if not isinstance(chorale, list) or not chorale:
            raise InputError(f"Chorales: {path}: {part} chorale {number} has no time steps. Leave it out.")
        for step, notes in enumerate(chorale):
            if not isinstance(notes, list) or not all(type(n) is int and LOWEST <= n <= HIGHEST for n in notes):
                raise InputError(
                    f"Chorales: {path}: {part} chorale {number}, step {step}: expected a list of MIDI notes from "
                    f"{LOWEST} to {HIGHEST}, got {notes}. Transpose or remove notes outside this range."
                )
    return chorales


def _padded(chorales: list[list[list[int]]], longest: int) -> Sequences:
    """`x` `(N, longest, 88)` and `lengths` `(N,)`."""
    x = torch.zeros(len(chorales), longest, HIGHEST - LOWEST + 1)
    for number, chorale in enumerate(chorales):
        for step, notes in enumerate(chorale):
            x[number, step, [note - LOWEST for note in notes]] = 1.0
    return x, torch.tensor([len(chorale) for chorale in chorales])
