"""One way to train every method: the same networks, optimizer and CPU seconds under another loss."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, SVI
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.guides.delta import AmortizedDelta
from pyrogaps.mapa import RecoveredPrior
from pyrogaps.models.vae import VAE
from pyrogaps.streams import seeded
from pyrogaps.training import Cosine, load_weights, save_weights
from pyrogaps.training.parameters import JointOptimizer, trainable_parameters

METHODS = ("VAE", "IWAE-10", "MAPA", "MAPA-IWAE")
BATCH_SIZE, LEARNING_RATE, FINAL = 100, 2e-3, 0.02
NUM_NEIGHBOURS = 100
ALPHA = {"MAPA": 0.8, "MAPA-IWAE": 0.55}
# K and S of the bounds.
EXPLANATIONS: dict[str, dict[str, int]] = {"MAPA": {"num_top": 1, "num_samples": 9}, "MAPA-IWAE": {"num_top": 3}}
# The rate falls with the share of the time that is spent, in so many steps.
STAGES = 1000


@dataclass(frozen=True)
class Task:
    """What a method is trained on and for how long; MAPA's posterior counts."""

    images: Tensor
    latent_dim: int
    hidden: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Cost:
    """What training took: steps, passes over the data, and decoded rows per datapoint and step."""

    steps: int
    epochs: float
    decoder_passes: float


def pair_of(method: str, task: Task) -> tuple[nn.Module, nn.Module]:
    """The model and the amortized Normal that all methods end with."""
    size = task.images[0].numel()
    decoder = VAE(size, task.latent_dim, task.hidden)
    model = RecoveredPrior(decoder, task.latent_dim) if method == "MAPA" else decoder
    return model, AmortizedNormal(size, task.latent_dim, task.hidden)


def trained(method: str, task: Task, weights: Path, seed: int) -> tuple[nn.Module, nn.Module, Cost]:
    """A model and guide trained by `method`, or read from the file `weights`.

    A model that MAPA trained has its prior recovered, and a guide is then trained for as long again: the model alone
    competes on time.
    """
    with seeded(seed, "images", method):
        model, guide = pair_of(method, task)
        if weights.exists():
            load_weights(weights, model, guide)
            return model, guide, Cost(**torch.load(weights.with_suffix(".cost"), weights_only=True))
        encoder = AmortizedDelta(task.images[0].numel(), task.latent_dim, task.hidden) if method == "MAPA" else guide
        started = time.process_time()
        loss = loss_of(method, task)
        cost = fit(model, encoder, loss, task.images, task.seconds - (time.process_time() - started))
        if isinstance(model, RecoveredPrior):
            model.recover(encoder, task.images)
            fit(model, guide, loss_of("VAE", task), task.images, task.seconds, freeze_model=True)
    weights.parent.mkdir(parents=True, exist_ok=True)
    torch.save(vars(cost), weights.with_suffix(".cost"))
    save_weights(weights, model, guide)
    return model, guide, cost


def loss_of(method: str, task: Task) -> Any:
    """The method's loss; a VAE's is the importance-weighted bound of one draw."""
    if method in ("VAE", "IWAE-10"):
        loss = pg.IWAE_ELBO(1 if method == "VAE" else 10, vectorize_particles=method != "VAE")
        loss.max_plate_nesting = 2  # the particles' plate and the data's: Pyro would run the pair once more to find out
        return loss
    posterior = pg.mapa_posterior(task.images, "bernoulli", bandwidth=ALPHA[method], num_neighbours=NUM_NEIGHBOURS)
    bound = pg.MAPA_ELBO if method == "MAPA" else pg.MAPA_IWAE_ELBO
    return bound(posterior, **EXPLANATIONS[method])


def fit(
    model: nn.Module, guide: nn.Module, loss: ELBO, x: Tensor, seconds: float, *, freeze_model: bool = False
) -> Cost:
    """Climb for so many CPU seconds, the learning rate falling along half a cosine."""
    named = trainable_parameters(model, guide, (x[:BATCH_SIZE],), freeze_model=freeze_model)
    optimizer = JointOptimizer(torch.optim.Adam, {"lr": LEARNING_RATE, "fused": True}, named, fixed=True)
    svi = SVI(model, guide, optimizer, loss=loss)
    rate, started, steps, rows = Cosine(STAGES, final=FINAL), time.process_time(), 0, 0
    with pyro.validation_enabled(False):
        for indices in _minibatches(len(x)):
            used = (time.process_time() - started) / seconds
            if used >= 1:
                break
            optimizer.set_rate(LEARNING_RATE * rate(int(used * STAGES)))
            svi.step(indices if isinstance(loss, (pg.MAPA_ELBO, pg.MAPA_IWAE_ELBO)) else x[indices])
            steps, rows = steps + 1, rows + len(indices)
    decoded = loss.num_decoded / loss.num_scored if hasattr(loss, "num_decoded") else float(loss.num_particles)
    return Cost(steps, rows / len(x), decoded)


def _minibatches(number: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(number).split(BATCH_SIZE)
