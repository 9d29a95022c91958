"""`train`: stochastic variational inference of a model and a guide."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pyro.infer import ELBO
from torch.optim import Optimizer

from pyrogaps.density.data import Data
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.training.placing import modes_restored
from pyrogaps.training.settings import Training, TrainingResult
from pyrogaps.training.trainer import Trainer


def train(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_epochs: int = 100,
    batch_size: int = 100,
    learning_rate: float = 1e-3,
    schedule: Callable[[int], float] | None = None,
    optimizer: type[Optimizer] = torch.optim.Adam,
    optimizer_options: dict[str, Any] | None = None,
    kl_warmup: int = 0,
    entropy_annealing: int = 0,
    clip_norm: float | None = None,
    num_particles: int = 1,
    patience: int | None = None,
    validation: Data | None = None,
    freeze_model: bool = False,
    objective: ELBO | None = None,
    guide_steps: int = 0,
    mode: Literal["eager", "captured"] = "captured",
    checkpoint: str | Path | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> TrainingResult:
    """Train a Pyro model and guide by stochastic variational inference, on minibatches by index.

    In epoch e (from 0) each minibatch takes one step of `optimizer`, with options `optimizer_options` such as
    `{"eps": 1e-4}` and learning rate `learning_rate * schedule(e)`, uphill on the mean over its datapoints of

        E_q[log p(x|z) + beta (log p(z) - lambda log q(z|x))]        (nats per datapoint, `num_particles` draws),

    beta = min(1, e / `kl_warmup`), lambda = min(1, e / `entropy_annealing`), each 1 where its length is 0. `clip_norm`
    bounds the norm of the whole gradient of that mean. Parameters are what the programs register with Pyro, and those
    of `nn.Module`s that are the model or the guide or own it as a method; `freeze_model` trains the guide's alone.

    `objective` is another bound to climb, such as `IWAE_ELBO(10)`: any loss for `pyro.infer.SVI` with a method
    `differentiable_loss`, summed over the data plate as Pyro's are. It then stands wherever the ELBO does below. One
    that takes indices and makes its own minibatches, as `MAPA_ELBO` does, is a mean over data that it holds itself:
    `data` must be these, and there can be no validation data.

    With `guide_steps`, each step of the model's parameters is preceded by up to so many of the guide's alone, on random
    minibatches, until the bound (its mean over ten steps) rises no more. This lasts until mutual information between
    data and latents under the guide, of the validation data if there are any, falls from one epoch to the next; then
    both step together. It is a remedy for guides so far behind that the model learns to ignore its latents (He et al.,
    2019, arXiv:1901.05534).

    With `validation` data the ELBO on them is measured after every epoch, in evaluation mode and with the same noise
    each time; the best weights among epochs trained on the ELBO itself (beta = lambda = 1) are kept in the end, and
    `patience` such epochs without a new best stop the run. Otherwise the last weights stay.

    Steps are taken through Pyro ("eager"), or, with mode "captured", through Pyro for a while and then by replaying the
    tensor operations that one of them was recorded as, for each shape of minibatch. A record is compared with Pyro when
    it is new and now and then: programs that cannot be recorded (control flow that depends on values, recurrent
    networks, state that steps change) and other objectives than the ELBO and `IWAE_ELBO` stay eager, and so do steps
    whose record is no faster than Pyro; the result's `mode` says which. The two modes differ by rounding.

    `checkpoint` names a file from which a run that was killed continues, to the same weights bit for bit on a CPU;
    `num_epochs` and `patience` may change in between. `device` moves modules and minibatches there. The caller's
    random state, train/eval modes and validation setting are put back.

    In several processes, where `torch.distributed` is initialised, each takes its share of every minibatch and all take
    the same steps, through Pyro; `data` must be the same in all of them. What is reported and kept is that of all, and
    the first one's checkpoint is the run's. The data plate then must give latents outside of it their due (a size of
    its own, of which a minibatch is a subsample); `guide_steps` and bounds that make their own minibatches need one
    process. Batch statistics are those of shares, the first process's at the end of an epoch.

    Raises `InputError` for settings, data, guide or checkpoint that do not go together, and `FloatingPointError` when
    loss or gradient become infinite or NaN; model and guide then hold the best weights so far.
    """
    settings = Training(
        num_epochs, batch_size, learning_rate, schedule, optimizer, optimizer_options or {},
        kl_warmup, entropy_annealing, clip_norm, num_particles, patience, freeze_model, objective, guide_steps, mode,
    )  # fmt: skip
    if patience is not None and validation is None:
        raise InputError("training: patience needs validation data")
    with modes_restored(model, guide):
        trainer = Trainer(model, guide, data, validation, settings, seed, device)
        return trainer.run(checkpoint, progress)
