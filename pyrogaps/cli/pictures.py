"""Pictures in files whose ending says their form."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyrogaps.files import replacing, with_ending

# Metadata without the time: the same numbers make the same file.
FORMS: dict[str, dict[str, Any]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def check_picture(path: str | None) -> Path | None:
    """The path of a picture; raises `InputError` for an ending that is none of `FORMS`."""
    return None if path is None else with_ending(path, FORMS, "--picture")


def write_picture(path: Path, draw: Callable[[Any], Any], size: tuple[float, float]) -> None:
    """Write what `draw` draws in a figure of `size` inches, whole or not at all."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure, suffix = Figure(figsize=size, layout="constrained"), path.suffix.lower()
    draw(figure)
    with replacing(path, "picture", ". Choose another --picture") as file, rc_context({"svg.hashsalt": "pyrogaps"}):
        figure.savefig(file, dpi=150, format=suffix[1:], metadata=FORMS[suffix])
