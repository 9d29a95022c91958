"""`train`: stochastic variational inference of a model and a guide."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pyro.infer import ELBO
from torch.optim import Optimizer

from pyrogaps.density.data import Data
from pyrogaps.density.forms import as_given, check_present
from pyrogaps.density.reading import finite_arguments
from pyrogaps.density.runs import Program, check_callable
from pyrogaps.errors import InputError
from pyrogaps.guard import ProgramError, guarded
from pyrogaps.settings import Count, Device, File, Positive, Seed, Whole, checked
from pyrogaps.training.placing import modes_restored
from pyrogaps.training.settings import Training, TrainingResult
from pyrogaps.training.trainer import Trainer


@guarded
@checked()
def train(
    model: Program,
    guide: Program,
    data: Data | None = None,
    *,
    num_epochs: Count = 100,
    batch_size: Count = 100,
    learning_rate: Positive = 1e-3,
    schedule: Callable[[int], float] | None = None,
    optimizer: type[Optimizer] = torch.optim.Adam,
    optimizer_options: dict[str, Any] | None = None,
    kl_warmup: Whole = 0,
    entropy_annealing: Whole = 0,
    clip_norm: Positive | None = None,
    num_particles: Count = 1,
    patience: Count | None = None,
    validation: Data | None = None,
    freeze_model: bool = False,
    objective: ELBO | None = None,
    guide_steps: Whole = 0,
    mode: Literal["eager", "captured"] = "captured",
    checkpoint: File | None = None,
    callback: Callable[[int, dict[str, list[float]]], Any] | None = None,
    seed: Seed = 0,
    device: Device | None = None,
    progress: bool = True,
) -> TrainingResult:
    """Train a Pyro model and guide by stochastic variational inference on minibatches.

    In epoch e (from 0), `optimizer` takes one step per minibatch, with learning rate `learning_rate * schedule(e)` and
    options `optimizer_options` such as `{"eps": 1e-4}`. It maximises the mean over the minibatch's datapoints of

        E_q[log p(x|z) + beta (log p(z) - lambda log q(z|x))]        (nats per datapoint, `num_particles` draws),

    with beta = min(1, e / `kl_warmup`) and lambda = min(1, e / `entropy_annealing`), each 1 if its length is 0.
    `clip_norm` bounds the norm of the whole gradient of that mean. The parameters are those that the programs register
    with Pyro, and those of the `nn.Module`s behind the model and the guide. `freeze_model` trains only the guide's.

    `objective` replaces the ELBO by another bound, such as `IWAE_ELBO(10)`: any loss for `pyro.infer.SVI` with a method
    `differentiable_loss`, summed over the data plate as Pyro's losses are. "ELBO" below then means this bound. An
    objective that makes its own minibatches of indices, such as `MAPA_ELBO`, is a mean over the data it was built with.
    It needs `data` to be the same data and does not allow validation data.

    With `guide_steps`, up to that many steps of the guide alone precede each step of the model, on random minibatches,
    until the bound (its mean over ten steps) stops rising. This ends when the mutual information of data and latents
    under the guide, measured on the validation data if there are any, falls from one epoch to the next; from then on
    both step together. It helps if the guide lags so far behind that the model learns to ignore its latents (He et
    al., 2019, arXiv:1901.05534).

    With `validation` data, their ELBO is measured after every epoch, in evaluation mode and with the same noise each
    time. The best weights among epochs trained on the ELBO itself (beta = lambda = 1) are kept, and training stops
    after `patience` such epochs without a new best. Without validation data the last weights are kept.

    Mode "eager" takes every step through Pyro. Mode "captured" takes the first steps through Pyro, then records the
    tensor operations of one step for each minibatch shape and replays them. Records are compared with Pyro when they
    are new and from time to time. Steps stay eager if they cannot be recorded (value-dependent control flow, recurrent
    networks, state that steps change), if the record is no faster than Pyro, and for objectives other than the ELBO and
    `IWAE_ELBO`; the result's `mode` reports which mode was used. The two modes differ only by rounding.

    `checkpoint` is a file from which an interrupted run resumes, to the same weights bit for bit on a CPU;
    `num_epochs` and `patience` may change in between.

    `callback(epoch, history)` is called after every epoch, counted from 1, with a copy of the result's `history` so
    far; `GapMonitor` is one. Model and guide then hold the weights of that epoch. What it returns is ignored; an
    exception of its own ends the training. A resumed run calls it for the epochs that are trained again.

    `device` moves modules and minibatches there. The caller's
    random state, train/eval modes and validation setting are put back.

    If `torch.distributed` is initialised, each process takes its share of every minibatch and all take the same steps,
    through Pyro; `data` must be the same in all processes. Reported values cover all processes, and the first process
    writes the checkpoint. The data plate must then weight the latents outside the minibatch correctly: declare its full
    size and let a minibatch be a subsample. `guide_steps` and objectives that make their own minibatches need a single
    process. Batch statistics are computed from shares; at the end of an epoch all take those of the first process.
    `callback` is called in every process.

    Raises `InputError` for settings, data, guide or checkpoint that do not fit together, and `FloatingPointError` if
    the loss or the gradient becomes infinite or NaN, or `InputError` where the data contain NaN themselves; model and
    guide then hold the best weights so far.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> result = pg.train(model, guide, x, num_epochs=3, learning_rate=1e-2, progress=False)
        >>> len(result.history["train_elbo"])
        3
    """
    for program, what in ((model, "model"), (guide, "guide")):
        check_callable(program, what)
    check_present(model, data, "Pass the data that the model is called with")
    settings = Training(
        num_epochs, batch_size, learning_rate, schedule, optimizer, optimizer_options or {},
        kl_warmup, entropy_annealing, clip_norm, num_particles, patience, freeze_model, objective, guide_steps, mode,
    )  # fmt: skip
    if patience is not None and validation is None:
        raise InputError("training: patience needs validation data. Pass validation=, or leave patience out.")
    parts = {"data": data, "validation": validation}
    with modes_restored(model, guide), torch.enable_grad(), _blaming(parts, model):  # the caller may have none enabled
        trainer = Trainer(model, guide, data, validation, settings, seed, device)
        return trainer.run(checkpoint, callback, progress)


@guarded
def rehearse_training(
    model: Program, guide: Program, data: Data | None, validation: Data | None, settings: Training, seed: int
) -> None:
    """Raise what `train` would raise before its first step is taken. Model and guide may get their parameters here."""
    parts = {"data": data, "validation": validation}
    with modes_restored(model, guide), torch.enable_grad(), _blaming(parts, model):
        Trainer(model, guide, data, validation, settings, seed, None).rehearse()


@contextmanager
def _blaming(parts: dict[str, Data | None], model: Program) -> Iterator[None]:
    """Say of a training that fails, or diverges, on data with NaN that these are why. Models may take NaN, too."""
    try:
        yield
    except (ValueError, RuntimeError, ArithmeticError) as error:  # an exception of a callback may be any other
        if isinstance(error, InputError) and not isinstance(error, ProgramError):
            raise
        for name, part in parts.items():
            args = as_given(part, model).in_memory
            if args is not None:
                try:
                    finite_arguments(args, name)
                except InputError as reason:
                    raise reason from error
        raise


@contextmanager
def section_named(section: str) -> Iterator[None]:
    """Say in which section of a recipe the settings of a training are that fails."""
    try:
        yield
    except InputError as error:
        if not str(error).startswith("training: "):
            raise
        raise InputError(f"{section}: {str(error).removeprefix('training: ')}") from error
    except FloatingPointError as error:
        raise InputError(f"{section}: the first loss is not finite ({error})") from error
