"""`Training`, the settings of a training run, and `TrainingResult`, its outcome."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pyro.infer import ELBO, TraceEnum_ELBO
from torch.optim import Optimizer

from pyrogaps.errors import InputError
from pyrogaps.settings import Count, NonNegative, Positive, Whole, checked, conform


@checked("training")
@dataclass(frozen=True)
class Training:
    """The settings of `train`, documented there; apply them by `train(model, guide, data, **vars(settings))`.

    Raises `InputError` for a setting out of range.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> settings = pg.Training(num_epochs=2, learning_rate=2e-3)
        >>> pg.train(model, guide, x, **vars(settings), progress=False).num_epochs
        2
    """

    num_epochs: Count = 100
    batch_size: Count = 100
    learning_rate: Positive = 1e-3
    schedule: Callable[[int], float] | None = None
    optimizer: type[Optimizer] = torch.optim.Adam
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    kl_warmup: Whole = 0
    entropy_annealing: Whole = 0
    clip_norm: Positive | None = None
    num_particles: Count = 1
    patience: Count | None = None
    freeze_model: bool = False
    objective: ELBO | None = None
    guide_steps: Whole = 0
    mode: Literal["eager", "captured"] = "captured"

    def __post_init__(self) -> None:
        if self.guide_steps and self.freeze_model:
            raise InputError(
                "training: guide_steps has no effect with freeze_model, because the model takes no steps. Set "
                "guide_steps to 0, or freeze_model to False."
            )
        self._check_optimizer(self.optimizer.__name__)
        if self.objective is not None:
            self._check_objective(type(self.objective).__name__)

    def _check_optimizer(self, name: str) -> None:
        if self.optimizer in (torch.optim.LBFGS, torch.optim.SparseAdam):
            raise InputError(
                f"training: optimizer {name} does not support noisy, dense gradients. Use Adam or another."
            )
        try:
            self.optimizer(
                [torch.zeros(1, 1, requires_grad=True)], **{"lr": self.learning_rate, **self.optimizer_options}
            )
        except (TypeError, ValueError) as error:
            raise InputError(
                f"training: optimizer {name} refuses optimizer_options {self.optimizer_options}: {error}. Change them."
            ) from error

    def _check_objective(self, name: str) -> None:
        if not hasattr(self.objective, "differentiable_loss"):
            raise InputError(
                f"training: objective {name} has no method differentiable_loss. Use one that has, such as "
                "pyrogaps.IWAE_ELBO."
            )
        if isinstance(self.objective, TraceEnum_ELBO):
            raise InputError(
                f"training: objective {name} is for discrete latents, which are not summed out here. Use "
                "pyro.infer.Trace_ELBO with a guide that draws them, or train with Pyro's SVI."
            )
        if self.num_particles != 1:
            raise InputError(f"training: num_particles does not apply to objective {name}. Set it on the objective.")
        if self.kl_warmup or self.entropy_annealing:
            raise InputError(
                f"training: kl_warmup and entropy_annealing do not apply to objective {name}, only to the ELBO. Leave "
                "them at 0."
            )

    def rate(self, epoch: int) -> float:
        """The learning rate in `epoch`, counted from 0."""
        factor = 1.0 if self.schedule is None else self.schedule(epoch)
        return self.learning_rate * float(conform(f"training.schedule({epoch})", NonNegative, factor))

    def beta(self, epoch: int) -> float:
        """The weight of log p(z) - log q(z|x) in `epoch`: 0 in the first, 1 from epoch `kl_warmup` on."""
        return _ramp(epoch, self.kl_warmup)

    def entropy_weight(self, epoch: int) -> float:
        """The weight lambda of -log q(z|x) in `epoch`: 0 in the first, 1 from epoch `entropy_annealing` on."""
        return _ramp(epoch, self.entropy_annealing)

    def annealed(self, epoch: int) -> bool:
        """Whether `epoch` is trained on the ELBO itself."""
        return epoch >= max(self.kl_warmup, self.entropy_annealing)


def _ramp(epoch: int, length: int) -> float:
    return min(1.0, epoch / length) if length else 1.0


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of a training run.

    `history` has one entry per epoch under each key: `train_elbo`, the ELBO in nats per datapoint, averaged over the
    epoch's minibatches while the weights were moving; `validation_elbo`, that of the weights at the epoch's end, if
    there are validation data; `learning_rate`. Both are plain ELBOs, without warm-up or annealing weights, or values of
    the `objective` that was trained. `mutual_information` has one entry for each epoch with `guide_steps`. `best_epoch`
    is the epoch, counted from 1, whose weights the model and the guide now hold. `mode` is the mode of most steps at
    the end of training: through Pyro ("eager"), or by replaying a recorded step ("captured").
    """

    history: dict[str, list[float]] = field(repr=False)
    best_epoch: int
    num_epochs: int
    stopped_early: bool
    mode: Literal["eager", "captured"] = "eager"

    @property
    def train_elbo(self) -> float:
        """The training ELBO of `best_epoch`, nats per datapoint."""
        return self.history["train_elbo"][self.best_epoch - 1]

    @property
    def validation_elbo(self) -> float | None:
        """The validation ELBO of `best_epoch`, nats per datapoint; None without validation data."""
        values = self.history.get("validation_elbo")
        return values[self.best_epoch - 1] if values else None
