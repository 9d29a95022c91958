"""`Mapa`: settings of training a model by MAPA before its guide; and `train_by_mapa`, which trains it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from pyrogaps.density import Data
from pyrogaps.density.data import part_of
from pyrogaps.density.forms import as_indexed
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.mapa.elbo import MAPA_ELBO
from pyrogaps.mapa.iwae import MAPA_IWAE_ELBO
from pyrogaps.mapa.posterior import MapaPosterior, checked_number, kernel_named, mapa_posterior
from pyrogaps.settings import Count, Plate, Positive, Whole, checked
from pyrogaps.training import Training, TrainingResult, rehearse_training, section_named, train

REHEARSED = 256  # datapoints


@checked("mapa")
@dataclass(frozen=True)
class Mapa:
    """Settings of `train_by_mapa`.

    Args:
        likelihood: that of the model, gaussian, bernoulli or continuous_bernoulli; see `mapa_posterior`.
        bandwidth: that of the kernel, a variance near that of the noise, alpha near 1, or a temperature.
        num_neighbours: number of datapoints to keep in each row of the posterior; null: all up to 4,096, else 128.
        num_top: K, number of most probable explanations in the bound.
        num_samples: S, number of draws from the others.
        num_draws: R, draws from the guide at each explanation, where there is no encoder.
        replacement: whether the S are drawn with replacement, where there is an encoder.
        training: settings of `pyrogaps.train` for the model and the encoder.
    """

    likelihood: Literal["gaussian", "bernoulli", "continuous_bernoulli"] = "gaussian"
    bandwidth: Positive | None = None
    num_neighbours: Count | None = None
    num_top: Whole = 1
    num_samples: Whole = 9
    num_draws: Count = 1
    replacement: bool = True
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        if self.num_top == self.num_samples == 0:
            raise InputError("mapa: num_top and num_samples are both 0. Raise one of them")
        if self.training.objective is not None:
            raise InputError("mapa.training: the objective is always MAPA's bound. Leave objective out")
        if self.training.freeze_model:
            raise InputError("mapa.training: MAPA trains the model. Leave freeze_model false")
        if self.training.patience is not None:
            raise InputError(
                "mapa.training: patience needs validation data, but MAPA's bound is defined for training data alone. "
                "Leave patience out"
            )

    def bound(self, posterior: MapaPosterior, plate: Plate, *, encoded: bool) -> MAPA_ELBO | MAPA_IWAE_ELBO:
        """What is trained on, with an encoder or without; raises `InputError` for sizes that do not fit `posterior`."""
        if plate is False:
            raise InputError("mapa: plate is false, but MAPA needs the datapoints of a data plate. Leave plate null")
        shared: dict[str, Any] = {"num_top": self.num_top, "num_samples": self.num_samples, "plate": plate}
        if encoded:
            return MAPA_ELBO(posterior, replacement=self.replacement, **shared)
        return MAPA_IWAE_ELBO(posterior, num_draws=self.num_draws, **shared)

    def check(self, data: Data, *, encoded: bool, model: Program | None = None) -> None:
        """Raise `InputError` for a bandwidth or sizes that do not fit the data, without searching neighbours."""
        try:
            kernel_named(self.likelihood, self.bandwidth)
        except InputError as error:
            raise InputError(f"mapa.bandwidth: {str(error).removeprefix('bandwidth: ')}") from error
        indexed = as_indexed(data, model)
        try:
            size = len(indexed), checked_number(self.num_neighbours, len(indexed))
            self.bound(MapaPosterior(indexed, *torch.empty(2, *size, device="meta")), None, encoded=encoded)
        except InputError as error:
            raise InputError(f"mapa: {error}") from error


def train_by_mapa(
    model: Program,
    encoder: Program | None,
    guide: Program,
    data: Data,
    settings: Mapa,
    *,
    plate: Plate = None,
    seed: int = 0,
    **options: Any,
) -> TrainingResult:
    """Train `model` on `data` against their MAPA posterior.

    With an `encoder` the bound is `MAPA_ELBO`, and a model with a method `recover`, such as `RecoveredPrior`, then
    recovers its prior. Without an encoder the bound is `MAPA_IWAE_ELBO`, and the guide is trained together with the
    model.

    Args:
        encoder: a guide whose sites are Deltas; None to train the guide instead.
        guide: the model's guide; not used where there is an encoder.
        plate: the data plate's name, where it cannot be found.
        seed, options: as for `pyrogaps.train`, whose result is returned; among them `checkpoint` and `progress`.

    Raises:
        InputError, FloatingPointError: as `mapa_posterior`, the bound, `train` and `recover`.
    """
    data = as_indexed(data, model)
    posterior = mapa_posterior(
        data, settings.likelihood, bandwidth=settings.bandwidth, num_neighbours=settings.num_neighbours
    )
    bound = settings.bound(posterior, plate, encoded=encoder is not None)
    options = {**vars(settings.training), **options, "objective": bound, "seed": seed}
    result = train(model, guide if encoder is None else encoder, data, **options)
    if encoder is not None and hasattr(model, "recover"):
        model.recover(encoder, data, plate=plate, seed=seed)
    return result


def rehearse_mapa(
    model: Program,
    encoder: Program | None,
    guide: Program,
    data: Data,
    settings: Mapa,
    bound: Callable[[MapaPosterior], MAPA_ELBO | MAPA_IWAE_ELBO],
    seed: int,
) -> None:
    """Raise what `train_by_mapa` would raise at its first loss, which is that of `bound` on a part of the data."""
    indexed = as_indexed(data, model)
    number = min(len(indexed), max(REHEARSED, settings.num_top + settings.num_samples + 1))
    part, _ = part_of(indexed, number)
    neighbours = None if settings.num_neighbours is None else min(number, settings.num_neighbours)
    posterior = mapa_posterior(part, settings.likelihood, bandwidth=settings.bandwidth, num_neighbours=neighbours)
    chosen = replace(settings.training, objective=bound(posterior))
    with section_named("mapa.training"):
        rehearse_training(model, guide if encoder is None else encoder, part, None, chosen, seed)
