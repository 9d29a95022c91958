"""The folder of one run: its recipe, its results, and the files to continue from."""

import hashlib
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from pyrogaps import processes
from pyrogaps.chunk_cache import remove_chunks
from pyrogaps.cli import manifest
from pyrogaps.cli.manifest import Manifest
from pyrogaps.cli.recipe import resolve
from pyrogaps.errors import InputError
from pyrogaps.files import hold, remove_leftovers, replacing, sha256

RECIPE, WEIGHTS, LEDGER = "recipe.yaml", "checkpoint.pt", "ledger.nc"
TABLE, PICTURE, PAGE = "summary.csv", "gaps.png", "gaps.html"
RESULTS = (RECIPE, WEIGHTS, LEDGER, TABLE, PICTURE, PAGE)
TRAINING, REFERENCE, MAPA, PARTS = "training.pt", "reference-training.pt", "mapa-training.pt", "parts"
# Fields of a recipe that change no number beyond its rounding, and those that only measuring depends on.
FREE = {"batch_size", "max_memory", "device"}
MEASURING = {"evaluate", "families", "evidence", "refinement", "conditioning", "retraining", "certificate"}
MEASURING |= {"reference", "num_particles", "compile", "shared"}
# Files that nothing makes again but the work itself, and the one that users edit.
ORIGINALS = (RECIPE, WEIGHTS, LEDGER)
UNFINISHED = (TRAINING, REFERENCE, MAPA, PARTS)


class RunFolder:
    """Results of one recipe, and the files from which an unfinished run continues.

    A manifest lists the files that the run wrote. No other file is changed, removed or taken for a result.

    Of processes that share a run, the first one writes; its errors are raised on all.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._manifest = path, Manifest(path)
        self._held: weakref.finalize[Any, Any] | None = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def holds(self, name: str) -> bool:
        """Whether the folder has a file of that name from its run, as the first process sees it."""
        return processes.first(lambda: name in self._manifest.present())

    def is_intact(self, name: str) -> bool:
        """Whether the folder has a file of that name exactly as its run wrote it, as the first process sees it."""
        return processes.first(lambda: self._manifest.is_intact(name))

    def claim(self, recipe: str, *, overwrite: bool) -> None:
        """Reserve the folder for `recipe` (as YAML); creates it where it is missing.

        Other processes cannot write to it until it is released or this object is deleted. Raises `InputError` where
        another process is writing there, where the folder holds another recipe's run and `overwrite` is false, where
        a file is in the way that is not what a run wrote, where it cannot be written, or where some process does not
        see it.
        """
        processes.first(lambda: self._claim(recipe, overwrite=overwrite))
        processes.together(self._check_visible)

    def _check_visible(self) -> None:
        """Processes on several machines go on from each other's files."""
        if not (self / RECIPE).exists():
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
            unfinished = overwrite or LEDGER not in self._manifest.present()
            self._refuse_strangers((*RESULTS, *UNFINISHED) if unfinished else (RECIPE, LEDGER))
            if overwrite:
                self._clear()
            self._refuse_other(recipe)
            remove_leftovers(self.path, {manifest.NAME, *RESULTS, *UNFINISHED}.__contains__)
            if unfinished:
                self._manifest.write({**self._manifest.read(), **dict.fromkeys(UNFINISHED)})
            if not (self / RECIPE).exists():
                self._write(RECIPE, lambda file: file.write(recipe.encode()))
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {error.strerror or error}. Choose another --out") from error

    def release(self) -> None:
        """Let other processes write to the folder."""
        if self._held is not None:
            self._held()
            self._held = None

    def write(self, name: str, save: Callable[[BinaryIO], Any]) -> None:
        """Write a file `name` with `save`, in one step.

        Raises `InputError` where it cannot be written; an existing file of that name is then unchanged.
        """
        processes.first(lambda: self._write(name, save))

    def _write(self, name: str, save: Callable[[BinaryIO], Any]) -> None:
        self._refuse_strangers((name,))
        with replacing(self / name, "result", manifest.REMEDY) as file:
            save(file)
            # Before the file gets its name: no file of the run's is ever without its entry.
            self._manifest.write({**self._manifest.read(), name: sha256(file)})

    def finish(self) -> None:
        """Remove the files that only an unfinished run needs."""
        processes.first(self._finish)

    def _finish(self) -> None:
        files = self._manifest.read()
        own = [name for name in UNFINISHED if name in files]
        for name in own:
            if name == PARTS:
                remove_chunks(self / name)
            else:
                (self / name).unlink(missing_ok=True)
        if own:
            self._manifest.write({name: digest for name, digest in files.items() if name not in own})

    def _clear(self) -> None:
        self._finish()
        for name in reversed(RESULTS):  # the recipe last: without it a folder says nothing of what is left
            if name in self._manifest.read():
                (self / name).unlink(missing_ok=True)
        self._manifest.write({})

    def _refuse_strangers(self, names: tuple[str, ...]) -> None:
        """Refuse to go on where a file of one of `names` is not what a run of this folder wrote."""
        files = self._manifest.read()
        for name in names:
            if os.path.lexists(self / name) and name not in files:
                raise InputError(
                    f"{self / name} is not this run's file ({manifest.NAME} does not list it). Choose another --out"
                )
            if name in ORIGINALS and (self / name).exists() and not self._manifest.is_intact(name):
                again = "with the recipe it began with" if name == RECIPE else "with the same command"
                raise InputError(
                    f"{self / name} is damaged, or was changed after the run wrote it. Choose another --out, or move "
                    f"this file away and run again {again}, which makes it again"
                )

    def _refuse_other(self, text: str) -> None:
        remedy = "Choose another folder with --out, or replace the run with --overwrite"
        recipe, recipe_file = yaml.safe_load(text), self / RECIPE
        results = [name for name in self._manifest.present() if name != RECIPE]
        if not results:  # nothing was computed yet, so nothing is lost
            recipe_file.unlink(missing_ok=True)
            return
        if not recipe_file.exists():
            if self._manifest.read().get(RECIPE) != hashlib.sha256(text.encode()).hexdigest():
                raise InputError(f"{self.path} contains {', '.join(results)} but no {RECIPE}. {remedy}")
            return
        try:
            other = yaml.safe_load(recipe_file.read_text("utf-8"))
            if isinstance(other, dict):
                other = yaml.safe_load(resolve(other).to_yaml())  # with the defaults of fields that came later
        except (yaml.YAMLError, UnicodeDecodeError):
            other = None
        except InputError:
            pass  # not a recipe of this version, so it differs
        if other != recipe:
            differing = _differing(other, recipe) if isinstance(other, dict) else ["it cannot be read"]
            fields = {name.partition(".")[0] for name in differing}
            if fields <= FREE:
                return
            if LEDGER in results or not fields <= FREE | MEASURING:
                raise InputError(
                    f"{self.path} contains the run of a different recipe ({', '.join(differing)}). {remedy}"
                )
            # Its training is kept. Parts that were measured by other settings are measured again.
            if "reference" in fields:
                (self / REFERENCE).unlink(missing_ok=True)
            recipe_file.unlink()


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
