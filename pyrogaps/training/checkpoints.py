"""The state of a training run between epochs, and its checkpoint on disk."""

import hashlib
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyro.infer import ELBO
from torch import Tensor

from pyrogaps.density.data import IndexedData, evenly_spaced
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.processes import first
from pyrogaps.settings import File
from pyrogaps.training.parameters import JointOptimizer
from pyrogaps.training.settings import Training
from pyrogaps.training.steps import EagerSteps
from pyrogaps.training.weights import Weights, copy_weights, put_weights, read_file, write_file

# Settings that may change when a run is resumed: they do not affect finished epochs, or only by rounding (mode).
_CHANGEABLE = {"num_epochs", "patience", "mode"}
# Settings of later versions. At these values they are omitted, so that older checkpoints stay valid.
_ADDED_DEFAULTS = {"objective": None, "guide_steps": 0}
# Largest share of the running time spent on writing checkpoints.
_MAX_OVERHEAD = 0.05


@dataclass
class State:
    """Progress of a run: number of epochs, history, and the best weights with their epoch and score."""

    best: Weights
    epoch: int = 0
    best_epoch: int = 0
    best_score: float = float("-inf")
    history: dict[str, list[float]] = field(default_factory=dict)

    def finish_epoch(self, best: Weights | None, score: float) -> None:
        """Count an epoch; `best` are its weights where they are the best so far, with their score."""
        self.epoch += 1
        if best is not None:
            self.best, self.best_epoch, self.best_score = best, self.epoch, score


class Checkpoint:
    """The checkpoint of one run at `path`; does nothing if `path` is None.

    A run can be resumed only with an equal `fingerprint`. No random state is stored: the stream of an epoch is derived
    from the seed and the epoch's number.
    """

    def __init__(self, path: File | None, model: Program, guide: Program, fingerprint: dict[str, str]) -> None:
        self.path = None if path is None else Path(path)
        self.model, self.guide, self.fingerprint = model, guide, fingerprint
        self._written, self._cost = time.monotonic(), 0.0

    def save(self, state: State, optimizer: JointOptimizer, steps: EagerSteps, *, now: bool = False) -> None:
        """Write the checkpoint if it is due or `now` is set; writing takes at most 5% of the running time.

        The first process writes. If it fails, all processes raise its `InputError`.
        """
        if self.path is not None:
            first(lambda: self._save(state, optimizer, steps, now))

    def _save(self, state: State, optimizer: JointOptimizer, steps: EagerSteps, now: bool) -> None:
        start = time.monotonic()
        if self.path is None or not (now or (start - self._written) * _MAX_OVERHEAD >= self._cost):
            return
        progress = {name: getattr(state, name) for name in ("epoch", "best_epoch", "best_score", "history")}
        parts = {"optimizer": optimizer.get_state(), "steps": steps.get_state()}
        run = {**progress, "current": copy_weights(self.model, self.guide), **parts}
        write_file(self.path, {"weights": state.best, "run": run, "fingerprint": self.fingerprint})
        self._written = time.monotonic()
        self._cost = self._written - start

    def resume(self, state: State, optimizer: JointOptimizer, steps: EagerSteps) -> State:
        """Restore weights, optimizer and steps; returns the state in the file, or `state` if there is no file.

        Raises `InputError` if the file is damaged or belongs to other settings, data, model or guide.
        """
        content = first(self._content)
        if content is None:
            return state
        if "run" not in content:
            raise InputError(
                f"checkpoint {self.path}: contains weights but no training run. Load it with load_weights, or use "
                "another file."
            )
        self._check(content["fingerprint"])
        run = content["run"]
        try:
            put_weights(run["current"], self.model, self.guide)
            optimizer.set_state(run["optimizer"])
            steps.set_state(run.get("steps", {}))
        except InputError as error:
            raise InputError(f"checkpoint {self.path}: {error}") from error
        return State(content["weights"], run["epoch"], run["best_epoch"], run["best_score"], run["history"])

    def _content(self) -> dict[str, Any] | None:
        return None if self.path is None or not self.path.exists() else read_file(self.path)

    def _check(self, stored: dict[str, str]) -> None:
        differing = sorted(name for name in stored | self.fingerprint if stored.get(name) != self.fingerprint.get(name))
        if differing:
            pairs = ", ".join(f"{name} {stored.get(name)} (now {self.fingerprint.get(name)})" for name in differing)
            raise InputError(
                f"checkpoint {self.path}: was made with different settings: {pairs}. Use the checkpoint's settings, or "
                "another file."
            )


def fingerprint(settings: Training, *, seed: int, **data: IndexedData | None) -> dict[str, str]:
    """Descriptions of settings, data and seed that must be equal when a run is resumed."""
    fixed = {name: value for name, value in vars(settings).items() if name not in _CHANGEABLE}
    described = {
        name: _describe(value)
        for name, value in fixed.items()
        if name not in _ADDED_DEFAULTS or value != _ADDED_DEFAULTS[name]
    }
    digests = {name: "none" if item is None else _digest(item) for name, item in data.items()}
    return {**described, **digests, "seed": str(seed)}


def _describe(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    if isinstance(value, ELBO) and type(value).__repr__ is object.__repr__:
        plain = {key: item for key, item in vars(value).items() if item is None or isinstance(item, int | float | str)}
        return f"{type(value).__name__}({', '.join(f'{key}={item}' for key, item in sorted(plain.items()))})"
    return f"{value.__module__}.{name}" if name else re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _digest(data: IndexedData) -> str:
    """The number of datapoints and a hash of up to 16 of them."""
    indices = evenly_spaced(len(data), 16)
    digest = hashlib.blake2b(digest_size=4)
    for item in data.fetch(indices):
        if isinstance(item, Tensor):
            digest.update(repr(tuple(item.shape)).encode())
            digest.update(item.detach().cpu().double().contiguous().numpy().tobytes())
    return f"{len(data)} datapoints #{digest.hexdigest()}"
