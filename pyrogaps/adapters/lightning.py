"""`gap_callback`: gaps while Lightning trains, by a `GapMonitor` over the networks of a LightningModule."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from pyrogaps.density import Data
from pyrogaps.errors import InputError
from pyrogaps.monitor import GapMonitor

# One library by two names. A trainer of the one does not take a module of the other.
PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def gap_callback(pair: Callable[[Any], tuple[Any, Any]], data: Data, **settings: Any) -> Any:
    """A callback for Lightning's `Trainer` that measures gaps after epochs of `fit`.

    ```
    pair = lambda lit: pg.from_torch(lit.encoder, lit.decoder, likelihood="bernoulli", second="log_variance")
    callback = gap_callback(pair, x_val, every=5)
    Trainer(max_epochs=20, callbacks=[callback]).fit(lit, loader)
    print(callback.monitor)
    ```

    Training is not changed by it. What is measured goes to the trainer's loggers too, by the names that `GapMonitor`
    gives to writers, such as "gaps/inference_gap".

    Args:
        pair: a function from the LightningModule to a model and a guide of its networks, such as `from_torch` makes.
        data: as for `GapMonitor`; tensors are moved to the device of the module.
        settings: those of `GapMonitor`. `every` counts epochs.

    Returns:
        The callback. Its `monitor` is the `GapMonitor`, or None before `fit`.

    Raises:
        InputError: where Lightning is not installed; what `GapMonitor` refuses, when `fit` begins.
    """

    class GapCallback(_library().Callback):  # type: ignore[misc]
        """See `gap_callback`."""

        def __init__(self) -> None:
            self.monitor: GapMonitor | None = None

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            there = tree_map_only(Tensor, lambda tensor: tensor.to(pl_module.device), data)
            self.monitor = GapMonitor(*pair(pl_module), there, **settings)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            step = trainer.current_epoch + 1
            assert self.monitor is not None
            self.monitor(step)
            records = self.monitor.records
            if records and records[-1].step == step:
                pl_module.log_dict(records[-1].scalars())

    return GapCallback()


def _library() -> Any:
    """The package of Lightning that is in use, or that can be imported."""
    for name in sorted(PACKAGES, key=lambda name: name not in sys.modules):
        try:
            return import_module(name)
        except ImportError:
            continue
    raise InputError("gap_callback: Lightning is not installed. Run: pip install lightning")
