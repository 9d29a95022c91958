"""Chorales as sequences of chords: which of a piano's 88 keys sound at every step."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrogaps.datasets.folder import locate, reading
from pyrogaps.errors import InputError

LOWEST, HIGHEST = 21, 108
# A part's name in the file, and its name here.
PARTS = {"train": "train", "valid": "validation", "test": "test"}

Sequences = tuple[Tensor, Tensor]


@dataclass(kw_only=True, eq=False)
class Chorales:
    """Bach's chorales in quarter notes (Boulanger-Lewandowski et al., arXiv:1206.6392), or a file of their form.

    The file is JSON: "train", "valid" and "test", each a list of chorales, a chorale a list of time steps, a step the
    list of the MIDI notes that sound, from 21 to 108; none sound in a rest.

    `.train`, `.validation` and `.test` are pairs `(x, lengths)`, as sequence models take them: `x` `(N, T, 88)` floats,
    1 where a note sounds, and the `lengths` `(N,)` in steps. All three are padded, with zeros, to the length T of the
    longest chorale of any.

    Args:
        path: the file; where it is not found from the current folder, it is looked for in the data folder.
        data_root: the data folder; None takes the environment variable PYROGAPS_DATA.

    Raises `InputError` for a file that is not there or not of this form, naming part, chorale and step.
    """

    path: str = "jsb-chorales-quarter.json"
    data_root: str | None = None
    train: Sequences = field(init=False, repr=False)
    validation: Sequences = field(init=False, repr=False)
    test: Sequences = field(init=False, repr=False)

    def __post_init__(self) -> None:
        path = locate("Chorales", self.path, self.data_root)
        with reading("Chorales", path, "is it whole, and JSON?"):
            content = json.loads(path.read_text("utf-8"))
        parts = {ours: _chorales(path, content, theirs) for theirs, ours in PARTS.items()}
        longest = max(len(chorale) for chorales in parts.values() for chorale in chorales)
        for name, chorales in parts.items():
            setattr(self, name, _padded(chorales, longest))


def _chorales(path: Path, content: Any, part: str) -> list[list[list[int]]]:
    """The chorales of one part, checked."""
    chorales = content.get(part) if isinstance(content, dict) else None
    if not isinstance(chorales, list) or not chorales:
        raise InputError(
            f"Chorales: {path} has no chorales called '{part}'; it must have {', '.join(PARTS)}, none empty"
        )
    for number, chorale in enumerate(chorales):
        if not isinstance(chorale, list) or not chorale:
            raise InputError(f"Chorales: {path}: {part} chorale {number} has no time steps; leave it out")
        for step, notes in enumerate(chorale):
            if not isinstance(notes, list) or not all(type(n) is int and LOWEST <= n <= HIGHEST for n in notes):
                raise InputError(
                    f"Chorales: {path}: {part} chorale {number}, step {step}: a step is a list of MIDI notes from "
                    f"{LOWEST} to {HIGHEST}, got {notes}; transpose or remove what lies outside"
                )
    return chorales


def _padded(chorales: list[list[list[int]]], longest: int) -> Sequences:
    """`x` `(N, longest, 88)` and `lengths` `(N,)`."""
    x = torch.zeros(len(chorales), longest, HIGHEST - LOWEST + 1)
    for number, chorale in enumerate(chorales):
        for step, notes in enumerate(chorale):
            x[number, step, [note - LOWEST for note in notes]] = 1.0
    return x, torch.tensor([len(chorale) for chorale in chorales])
