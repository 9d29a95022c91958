"""Why a model cannot be recorded: the line of the user's code that prevents it, and what to write instead."""

import linecache
import re
from pathlib import Path

from pyrogaps.guard import innermost_place, warn

# What a line holds that reads values, and what to write instead. The first that fits is named.
INSTEAD = (
    (r"one_hot\(", "F.one_hot reads the values of its argument. Write torch.eye(num_classes)[k]"),
    (r"^assert\b", "An assertion reads values. Leave it out, or check the data once before"),
    (r"^(if|elif|while)\b|\bif\b.*\belse\b", "A branch reads a value. Write torch.where(condition, a, b)"),
    (r"\.item\(|\.tolist\(|\bfloat\(|\bint\(|\bbool\(", "It reads a value into Python. Keep it a tensor"),
    (r"nonzero|unique|masked_select|argwhere", "Its result's shape depends on values. Write torch.where over all rows"),
    (r"numpy|\bnp\.", "NumPy reads values. Write it with torch"),
)
OTHERWISE = "It reads values of tensors. Write operations whose shapes and branches do not depend on values"
WRONG = (
    "a record of it gives other values than Pyro. It computes with values outside torch (NumPy, .tolist()) or with "
    "something that changed meanwhile and is neither an argument nor a parameter. Write it with torch, on these"
)


class WrongRecord(ValueError):
    """A record that gives other values than the program it was made of."""


def warn_of(error: Exception, mode: str, *, eager: bool) -> None:
    """Warn that a model runs in a slower mode than `mode`, and why; once for each line of a program."""
    cost = (
        "Every evaluation therefore runs it through Pyro, often several times slower"
        if eager
        else "Its record is replayed without torch.compile, which is slower"
    )
    place = None if isinstance(error, WrongRecord) else innermost_place(error.__cause__ or error)
    warn(f"model: cannot be {mode}, because {_reason(error, place)}. {cost}.", place)


def _reason(error: Exception, place: tuple[str, int] | None) -> str:
    """The reason in words; `place` is the file and the line of the user's code, where one is to blame."""
    if isinstance(error, WrongRecord):
        return WRONG
    if place is None:
        return f"recording it ended in a {type(error).__name__}"
    file, number = place
    source = linecache.getline(file, number).strip()
    instead = next((remedy for pattern, remedy in INSTEAD if re.search(pattern, source)), OTHERWISE)
    shown = f", `{source if len(source) <= 80 else source[:77] + '...'}`" if source else ""
    return f"of line {number} of {Path(file).name}{shown}. {instead}"
