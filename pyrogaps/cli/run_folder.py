"""The folder of one run: its recipe, its results, and the files to continue from."""

import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from pyrogaps import processes
from pyrogaps.cli.recipe import resolve
from pyrogaps.errors import InputError
from pyrogaps.files import hold, in_place_of

RESULTS = ("recipe.yaml", "checkpoint.pt", "ledger.nc", "summary.csv", "gaps.png")
TRAINING, REFERENCE, MAPA, PARTS = "training.pt", "reference-training.pt", "mapa-training.pt", "parts"
CHECKPOINTS = (TRAINING, REFERENCE, MAPA)


class RunFolder:
    """Results of one recipe, and the files from which an unfinished run continues.

    Of processes that share a run, the first one writes; its errors are raised on all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: weakref.finalize[Any, Any] | None = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def holds(self, name: str) -> bool:
        """Whether the folder has a file of that name, as the first process sees it."""
        return processes.first((self / name).exists)

    def claim(self, recipe: str, *, overwrite: bool) -> None:
        """Reserve the folder for `recipe` (as YAML); creates it where it is missing.

        Other processes cannot write to it until it is released or this object is deleted. Raises `InputError` where
        another process is writing there, where the folder holds another recipe's run and `overwrite` is false, where
        it cannot be written, or where some process does not see it.
        """
        processes.first(lambda: self._claim(recipe, overwrite=overwrite))
        processes.together(self._check_visible)

    def _check_visible(self) -> None:
        """Processes on several machines go on from each other's files."""
        if not (self / "recipe.yaml").exists():
            raise InputError(
                f"{self.path}: rank {processes.rank()} cannot find the files that rank 0 wrote there. Choose an --out "
                "on a file system that all machines share"
            )

    def _claim(self, recipe: str, *, overwrite: bool) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._held is None:
                held = hold(self.path, "Wait for it, or choose another --out")
                self._held = None if held is None else weakref.finalize(self, os.close, held)
            if overwrite:
                self._clear()
            self._refuse_other(yaml.safe_load(recipe))
            if not (self / "recipe.yaml").exists():
                self._write("recipe.yaml", lambda path: path.write_text(recipe, "utf-8"))
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {error.strerror or error}. Choose another --out") from error

    def release(self) -> None:
        """Let other processes write to the folder."""
        if self._held is not None:
            self._held()
            self._held = None

    def write(self, name: str, save: Callable[[Path], Any]) -> None:
        """Write a file `name` with `save`, in one step.

        Raises `InputError` where it cannot be written; an existing file of that name is then unchanged.
        """
        processes.first(lambda: self._write(name, save))

    def _write(self, name: str, save: Callable[[Path], Any]) -> None:
        target = self / name
        try:
            with in_place_of(target) as temporary:
                save(temporary)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(
                f"{target}: cannot be written: {reason}. Fix this and run the same command again to continue from there"
            ) from error

    def finish(self) -> None:
        """Remove the files that only an unfinished run needs."""
        processes.first(self._finish)

    def _finish(self) -> None:
        for name in CHECKPOINTS:
            (self / name).unlink(missing_ok=True)
        for path in self.path.glob(".*.tmp"):  # of processes that were killed
            path.unlink(missing_ok=True)
        shutil.rmtree(self / PARTS, ignore_errors=True)

    def _clear(self) -> None:
        for name in RESULTS:
            (self / name).unlink(missing_ok=True)
        self._finish()

    def _refuse_other(self, recipe: dict[str, Any]) -> None:
        remedy = "Choose another folder with --out, or replace the run with --overwrite"
        recipe_file = self / "recipe.yaml"
        results = [
            name
            for name in (*RESULTS, TRAINING, REFERENCE, MAPA, PARTS)
            if name != "recipe.yaml" and (self / name).exists()
        ]
        if not results:  # nothing was computed yet, so nothing is lost
            recipe_file.unlink(missing_ok=True)
            return
        if not recipe_file.exists():
            raise InputError(f"{self.path} contains {', '.join(results)} but no recipe.yaml. {remedy}")
        try:
            other = yaml.safe_load(recipe_file.read_text("utf-8"))
            if isinstance(other, dict):
                other = yaml.safe_load(resolve(other).to_yaml())  # with the defaults of fields that came later
        except (yaml.YAMLError, UnicodeDecodeError):
            other = None
        except InputError:
            pass  # not a recipe of this version, so it differs
        if other != recipe:
            differing = ", ".join(_differing(other, recipe)) if isinstance(other, dict) else "it cannot be read"
            raise InputError(f"{self.path} contains the run of a different recipe ({differing}). {remedy}")


def _differing(first: dict[str, Any], second: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two documents differ."""
    names = []
    for key in dict.fromkeys([*first, *second]):
        left, right = first.get(key), second.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            names += _differing(left, right, f"{prefix}{key}.")
        elif left != right:
            names.append(f"{prefix}{key}")
    return names
