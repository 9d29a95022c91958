"""Where numbers along a training go: TensorBoard, Weights & Biases, MLflow, or anything with a method `log`.

Each library is imported when its writer is made, and none is needed without one.
"""

from collections.abc import Mapping
from importlib import import_module
from os import PathLike, fspath
from typing import Any, Protocol, runtime_checkable

from pyrogaps.errors import InputError
from pyrogaps.processes import is_reporting


@runtime_checkable
class Writer(Protocol):
    """Anything that takes numbers by name; `GapMonitor(writers=[...])` calls it at every step that it measures.

    Where several processes share the work, the first one alone calls it.
    """

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take the values of a step. All are finite; what was not measured is left out."""


class TensorBoard:
    """Writes to TensorBoard; needs `pip install tensorboard`.

    Args:
        target: the folder of the event files, or a `SummaryWriter` of your own, which then may close it.

    Raises `InputError` where TensorBoard is not installed.
    """

    def __init__(self, target: str | PathLike[str] | Any) -> None:
        self._make = _library("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._target: Any = target if hasattr(target, "add_scalar") else fspath(target)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the values as scalars, and flush."""
        if isinstance(self._target, str):  # made by the process that writes, so that others leave no files
            self._target = self._make(self._target)
        for name, value in scalars.items():
            self._target.add_scalar(name, value, global_step=step)
        self._target.flush()


class WandB:
    """Writes to a run of Weights & Biases; needs `pip install wandb`.

    The values are drawn against the monitor's own step, `gaps/step`: Weights & Biases drops values whose step is below
    that of earlier calls of `wandb.log`, and a training loop has its own.

    Args:
        run: what `wandb.init` returned; None takes the active run.

    Raises `InputError` where the library is not installed, and where there is no run.
    """

    STEP = "gaps/step"

    def __init__(self, run: Any = None) -> None:
        self._run = _library("wandb", "wandb").run if run is None else run
        if self._run is None and is_reporting():
            raise InputError("writers: there is no active run of Weights & Biases. Call wandb.init() first")
        if self._run is not None:
            self._run.define_metric("gaps/*", step_metric=self.STEP)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log the values."""
        self._run.log({**scalars, self.STEP: step})


class MLflow:
    """Writes metrics to MLflow; needs `pip install mlflow`.

    Args:
        run_id: the run to write to; None takes the active run, or starts one, as `mlflow.log_metrics` does.

    Raises `InputError` where the library is not installed.
    """

    def __init__(self, run_id: str | None = None) -> None:
        self._library, self._run_id = _library("mlflow", "mlflow"), run_id

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log the values as metrics."""
        self._library.log_metrics(dict(scalars), step=step, run_id=self._run_id)


def _library(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package
        problem = "is not installed" if missing else f"cannot be imported ({error})"
        raise InputError(f"writers: {package} {problem}. Run: pip install {package}") from error
