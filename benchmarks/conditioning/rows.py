"""What the experiments share: rows of the table, and guides trained as well as can be for a frozen model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

import pyrogaps as pg
from benchmarks.reporting import keep_trained
from pyrogaps.density.runs import Program
from pyrogaps.training import Cosine


@dataclass(frozen=True)
class Row:
    """A line of the table: a mean over datapoints in nats, its standard error, and what theory or others say of it."""

    experiment: str
    setting: str
    guide: str
    quantity: str
    value: float
    standard_error: float
    known: float | None = None


@dataclass(frozen=True)
class Options:
    """Where runs lie, and how long they are."""

    runs: Path
    quick: bool
    num_epochs: int
    num_test: int
    seed: int


def mean_row(
    experiment: str, setting: str, guide: str, quantity: str, values: Tensor, known: float | None = None
) -> Row:
    """The row of a quantity that every datapoint has, `(N,)`."""
    error = float(values.std() / len(values) ** 0.5)
    return Row(experiment, setting, guide, quantity, float(values.mean()), error, known)


def trained_for(
    model: Program, make: Callable[[], Any], shape: Any, folder: Path, options: Options, *, batch_size: int = 256
) -> Any:
    """The guide that `make` builds, trained on data without end from the frozen `model`, in the shape of `shape`.

    An epoch is 50 minibatches. Its weights lie in `folder` when it is done; a run that was stopped continues.
    """
    pyro.set_rng_seed(options.seed)
    guide = make()

    def train() -> None:
        pg.train(
            model,
            guide,
            pg.SimulatedData(model, shape, num_datapoints=50 * batch_size),
            num_epochs=options.num_epochs,
            batch_size=batch_size,
            learning_rate=5e-3,
            schedule=Cosine(options.num_epochs, final=0.01),
            clip_norm=10.0,
            freeze_model=True,
            checkpoint=folder / "training.pt",
            seed=options.seed,
        )

    keep_trained(folder / "checkpoint.pt", model, guide, shape, train)
    return guide


def simulated(model: Program, shape: Any, number: int, seed: int) -> Any:
    """`number` datapoints of the model, the same for every guide that is compared on them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = pg.SimulatedData(model, shape, num_datapoints=number).fetch(torch.arange(number))
    return drawn[0] if len(drawn) == 1 else drawn
