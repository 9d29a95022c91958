"""`Mapa`: how a model is trained by MAPA before its guide, and `train_by_mapa`, which does it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyrogaps.density import Data
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.mapa.elbo import MAPA_ELBO
from pyrogaps.mapa.iwae import MAPA_IWAE_ELBO
from pyrogaps.mapa.posterior import mapa_posterior
from pyrogaps.problem import Plate
from pyrogaps.training import Training, TrainingResult, train


@dataclass(frozen=True)
class Mapa:
    """Settings of `train_by_mapa`.

    Args:
        likelihood: of the model: gaussian, bernoulli or continuous_bernoulli; see `mapa_posterior`.
        bandwidth: of the kernel: a variance near that of the noise, alpha near 1, a temperature.
        num_neighbours: how many datapoints to keep of each row of the posterior; null: all up to 4,096, else 128.
        num_top: K, how many of the most probable explanations enter the bound.
        num_samples: S, how many of the others are drawn.
        num_draws: R, draws from the guide at each explanation, where the guide takes the encoder's place.
        replacement: whether the S are drawn with replacement, where there is an encoder.
        training: settings of `pyrogaps.train` for the model and the encoder.
    """

    likelihood: str = "gaussian"
    bandwidth: float | None = None
    num_neighbours: int | None = None
    num_top: int = 1
    num_samples: int = 9
    num_draws: int = 1
    replacement: bool = True
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        if self.training.objective is not None:
            raise InputError("mapa.training: the objective is MAPA's bound; leave objective out")
        if self.training.freeze_model:
            raise InputError("mapa.training: the model is what MAPA trains; leave freeze_model false")
        if self.training.patience is not None:
            raise InputError("mapa.training: patience needs validation data, which MAPA's bound cannot be taken of")


def train_by_mapa(
    model: Program,
    encoder: Program | None,
    guide: Program,
    data: Data,
    settings: Mapa,
    *,
    plate: Plate = None,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TrainingResult:
    """Train `model` on `data` against their MAPA posterior.

    With an `encoder`, a guide whose sites are Deltas, by `MAPA_ELBO`; a model with a method `recover`, as
    `RecoveredPrior` has, is then shown the latents. Without one, by `MAPA_IWAE_ELBO` with `guide` in its place.
    `plate` is the data plate's name, where it cannot be found; `checkpoint`, `seed` and `progress` are as for
    `pyrogaps.train`, whose result is returned.

    Raises `InputError` and `FloatingPointError` as `mapa_posterior`, the bound, `train` and `recover` do.
    """
    posterior = mapa_posterior(
        data, settings.likelihood, bandwidth=settings.bandwidth, num_neighbours=settings.num_neighbours
    )
    if plate is False:
        raise InputError("mapa: without a data plate there are no other datapoints to explain one; leave plate null")
    shared: dict[str, Any] = {"num_top": settings.num_top, "num_samples": settings.num_samples, "plate": plate}
    if encoder is None:
        loss: Any = MAPA_IWAE_ELBO(posterior, num_draws=settings.num_draws, **shared)
    else:
        loss = MAPA_ELBO(posterior, replacement=settings.replacement, **shared)
    options = {**vars(settings.training), "objective": loss}
    result = train(
        model, guide if encoder is None else encoder, data, **options, checkpoint=checkpoint, seed=seed,
        progress=progress,
    )  # fmt: skip
    if encoder is not None and hasattr(model, "recover"):
        model.recover(encoder, data, plate=plate, seed=seed)
    return result
