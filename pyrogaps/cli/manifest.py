"""`run.json`: which files of a folder a run wrote itself, and their SHA-256."""

import hashlib
import json
import os
from pathlib import Path

from pyrogaps.errors import InputError
from pyrogaps.files import replacing, sha256

NAME = "run.json"
FORMAT = "pyrogaps run 1"
# For whoever cannot write to a run's folder.
REMEDY = ". Fix this and run the same command again; it continues from there"
# File names, each with the SHA-256 of its content; None for what an unfinished run may write at any time.
Files = dict[str, str | None]


class Manifest:
    """The manifest of the run in `folder`; every call reads the file, so that it holds for all processes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / NAME

    def read(self) -> Files:
        """The files that a run wrote; none where there is no manifest. Raises `InputError` for any other file."""
        if not os.path.lexists(self.path):
            return {}
        try:
            content = json.loads(self.path.read_bytes())
            files: Files = content["files"]
            if content != _content(files):
                raise ValueError("its checksum differs")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(
                f"{self.path}: is damaged, or not written by pyrogaps, so it is unknown whose files lie there. Choose "
                "another --out"
            ) from error
        return files

    def write(self, files: Files) -> None:
        """Replace the manifest."""
        with replacing(self.path, "manifest", REMEDY) as file:
            file.write(json.dumps(_content(files), indent=1).encode() + b"\n")

    def present(self) -> list[str]:
        """The names of the files that a run wrote and that are still there."""
        return [name for name in self.read() if (self.folder / name).exists()]

    def is_intact(self, name: str) -> bool:
        """Whether a file is, to the bit, the one that a run wrote."""
        path, expected = self.folder / name, self.read().get(name)
        if expected is None or not path.is_file():
            return False
        with path.open("rb") as file:
            return sha256(file) == expected


def _content(files: Files) -> dict[str, object]:
    """What the manifest of `files` contains: also a checksum of its own."""
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return {"format": FORMAT, "files": files, "sha256": own}
