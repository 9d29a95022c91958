"""One way to train every method: the same decoder, steps, minibatches and optimizer under another loss."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, SVI
from torch import Tensor, nn

import pyrogaps as pg
from benchmarks.mapa.priors import transports, with_transport
from benchmarks.mapa.uniform import uniform_posterior
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.guides.delta import AmortizedDelta
from pyrogaps.mapa import empiricalized_posterior
from pyrogaps.models.curves import ACTIVATION, HIDDEN
from pyrogaps.models.synthetic import SyntheticData, SyntheticModel
from pyrogaps.streams import derive_seed, seeded
from pyrogaps.training import Cosine
from pyrogaps.training.parameters import JointOptimizer, trainable_parameters

VAE, IWAE, MAPA, MAPA_GT, MAPA_NAIVE = "VAE", "IWAE", "MAPA", "MAPA-GT", "MAPA-naive"
BATCH_SIZE = 100
LEARNING_RATE = 0.03
# K: of the S terms of a MAPA bound, how many are the most probable explanations.
NUM_TOP = 1


@dataclass
class Passes:
    """Rows that went through a network."""

    rows: int = 0

    @contextmanager
    def counted(self, network: nn.Module) -> Iterator[None]:
        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.rows += output.shape[:-1].numel()

        handle = network.register_forward_hook(count)
        try:
            yield
        finally:
            handle.remove()


@dataclass(frozen=True)
class Trained:
    """A generative model with prior N(0, 1), and what its training cost: passes per datapoint and step, CPU seconds."""

    model: SyntheticModel
    num_pieces: int | None
    validation: float
    decoder_passes: float
    encoder_passes: float
    seconds: float


def trained(method: str, num_samples: int, data: SyntheticData, num_steps: int, seed: int) -> Trained:
    """`method` with S = `num_samples`, trained from a start of its own for `num_steps`.

    `validation` is the mean log p(x) of the validation data, by quadrature, in nats. Raises `FloatingPointError` where
    training diverges, `InputError` where the decoder is too steep for quadrature.
    """
    found = fitted(method, num_samples, data, num_steps, seed)
    made = [(found.model, None)] if method in (VAE, IWAE) else _with_priors(found, data.train)
    scores = [float(candidate.log_evidence(data.validation, tolerance=1e-3).mean()) for candidate, _ in made]
    best = max(range(len(made)), key=lambda number: scores[number])
    return Trained(*made[best], scores[best], found.decoder_passes, found.encoder_passes, found.seconds)


@dataclass(frozen=True)
class Fitted:
    """What training leaves, before a prior is recovered, and what it cost: see `Trained`."""

    model: SyntheticModel
    guide: AmortizedNormal | AmortizedDelta
    decoder_passes: float
    encoder_passes: float
    seconds: float


def fitted(method: str, num_samples: int, data: SyntheticData, num_steps: int, seed: int) -> Fitted:
    """Train a pair from a start of its own. Raises `FloatingPointError` where training diverges."""
    with seeded(seed, "mapa benchmark"), pyro.validation_enabled(False):
        model, guide = untrained(method, data)
        decoded, encoded, started = Passes(), Passes(), time.process_time()
        with decoded.counted(model.decoder), encoded.counted(guide.encoder):
            num_rows = fit(model, guide, loss_of(method, num_samples, data, seed), data.train, num_steps)
        seconds = time.process_time() - started
    return Fitted(model, guide, decoded.rows / num_rows, encoded.rows / num_rows, seconds)


def _with_priors(found: Fitted, x: Tensor) -> list[tuple[SyntheticModel, int]]:
    """Models with a prior each, and the numbers of pieces of their transports."""
    latents = latents_of(found, x)
    made = [transport for _, transport in transports(found.model, latents, x)]
    return [(with_transport(found.model, transport), len(transport.coefficients)) for transport in made]


def latents_of(found: Fitted, x: Tensor) -> Tensor:
    """h(x) of `x` `(N, 2)`, `(N, 1)`."""
    with torch.no_grad():
        latents: Tensor = found.guide.encoder(x)
    return latents


def untrained(method: str, data: SyntheticData) -> tuple[SyntheticModel, AmortizedNormal | AmortizedDelta]:
    """The decoder that all methods share, and the encoder that the method wants."""
    guide = (
        AmortizedNormal(2, 1, HIDDEN, ACTIVATION) if method in (VAE, IWAE) else AmortizedDelta(2, 1, HIDDEN, ACTIVATION)
    )
    return SyntheticModel(data.truth.curve), guide


def loss_of(method: str, num_samples: int, data: SyntheticData, seed: int) -> ELBO:
    """The method's loss. A VAE's is the bound with one sample; the S terms of MAPA's count the most probable in."""
    if method in (VAE, IWAE):
        loss = pg.IWAE_ELBO(num_samples, vectorize_particles=num_samples > 1, plate="data")
        loss.max_plate_nesting = 2  # the particles' plate and the data's: Pyro would run the pair once more to find out
        return loss
    if method == MAPA:
        posterior = pg.mapa_posterior(data.train, "gaussian", bandwidth=float(data.truth.variance))
    elif method == MAPA_GT:
        posterior = empiricalized_posterior(data.truth, data.latents["train"], data.train)
    else:
        generator = torch.Generator().manual_seed(derive_seed(seed, "uniform"))
        posterior = uniform_posterior(data.train, generator=generator)
    return pg.MAPA_ELBO(posterior, num_top=NUM_TOP, num_samples=num_samples - NUM_TOP, plate="data")


def fit(model: nn.Module, guide: nn.Module, loss: ELBO, x: Tensor, num_steps: int) -> int:
    """Take `num_steps`; returns the number of datapoints in all their minibatches."""
    named = trainable_parameters(model, guide, (x[:BATCH_SIZE],), freeze_model=False)
    optimizer = JointOptimizer(torch.optim.Adam, {"lr": LEARNING_RATE, "fused": True}, named, fixed=True)
    svi = SVI(model, guide, optimizer, loss=loss)
    rate, num_rows = Cosine(num_steps, final=0.01), 0
    for step, indices in enumerate(_minibatches(len(x), num_steps)):
        optimizer.set_rate(LEARNING_RATE * rate(step))
        svi.step(indices if isinstance(loss, pg.MAPA_ELBO) else x[indices])
        num_rows += len(indices)
    return num_rows


def _minibatches(number: int, num_steps: int) -> Iterator[Tensor]:
    while num_steps > 0:
        for indices in torch.randperm(number).split(BATCH_SIZE)[:num_steps]:
            yield indices
            num_steps -= 1
