"""Deep Markov models of Bach's chorales, trained with a filter, with a lookahead and with a smoother.

What a guide is not shown costs its own bound; trained together with it, it also costs the model. The second is told
apart from the first by a bound that no longer depends on the guide a model was trained with: IWAE of a smoother that
was trained for the frozen model afterwards.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import pyro
from torch import Tensor

import pyrogaps as pg
from benchmarks.conditioning.rows import Options, Row
from benchmarks.reporting import keep_trained
from pyrogaps.datasets import Chorales
from pyrogaps.guides.sequential import StructuredNormal
from pyrogaps.models.dmm import DeepMarkovModel

LATENT, HIDDEN, RNN = 32, 64, 128
LOOKAHEADS = (0, 2, math.inf)
NUM_EPOCHS, NUM_PARTICLES = 200, 1000
# Krishnan, Shalit and Sontag (arXiv:1609.09869): nats per step, by importance sampling and (the bound).
PUBLISHED = {0: (7.020, 7.519), math.inf: (6.605, 7.033)}

Sequences = tuple[Tensor, Tensor]


def trimmed(sequences: Sequences) -> pg.IndexedData:
    """The chorales, each minibatch padded to its own longest: training is a loop over steps."""
    x, lengths = sequences

    def fetch(indices: Tensor) -> Sequences:
        chosen = lengths[indices]
        return x[indices, : int(chosen.max())], chosen

    return pg.IndexedData(len(x), fetch)


def rows(options: Options) -> Iterator[Row]:
    """Bounds of log p(x) per step on the test chorales, as negative log-likelihoods, lower is better."""
    chorales = Chorales()
    test = tuple(part[:8] for part in chorales.test) if options.quick else chorales.test
    for lookahead in LOOKAHEADS:
        folder = options.runs / "chorales" / f"lookahead-{lookahead}"
        model, guide = trained(chorales, lookahead, folder, options)
        smoother = guide if lookahead == math.inf else smoother_for(model, chorales, folder, options)
        particles = 8 if options.quick else NUM_PARTICLES
        bounds = {
            "-L[q] per step": pg.elbo(model, guide, test, num_particles=particles // 8 or 2).value,
            "-IWAE of a smoother per step": pg.iwae(model, smoother, test, num_particles=particles).value,
        }
        published = PUBLISHED.get(lookahead, (None, None))
        for (quantity, bound), known in zip(bounds.items(), reversed(published), strict=True):
            yield per_step("DMM, JSB chorales", f"trained with lookahead {lookahead}", quantity, -bound, test[1], known)


def per_step(setting: str, guide: str, quantity: str, values: Tensor, lengths: Tensor, known: float | None) -> Row:
    """The ratio of means, nats to steps, with its standard error over chorales by the delta method."""
    ratio = values.sum() / lengths.sum()
    residuals = values - ratio * lengths
    error = residuals.std() * len(values) ** 0.5 / lengths.sum()
    return Row("chorales", setting, guide, quantity, float(ratio), float(error), known)


def trained(
    chorales: Chorales, lookahead: float, folder: Path, options: Options
) -> tuple[DeepMarkovModel, StructuredNormal]:
    """A model and a guide of that lookahead, trained together, stopped early on the validation chorales."""
    pyro.set_rng_seed(options.seed)
    model = DeepMarkovModel(88, LATENT, HIDDEN, HIDDEN)
    guide = StructuredNormal(88, LATENT, RNN, lookahead=lookahead)
    _train(model, guide, chorales, folder / "pair", options, kl_warmup=NUM_EPOCHS // 10, freeze_model=False)
    return model, guide


def smoother_for(model: DeepMarkovModel, chorales: Chorales, folder: Path, options: Options) -> StructuredNormal:
    """A smoother trained for the frozen model on the training chorales."""
    pyro.set_rng_seed(options.seed)
    guide = StructuredNormal(88, LATENT, RNN, lookahead=math.inf)
    _train(model, guide, chorales, folder / "smoother", options, kl_warmup=0, freeze_model=True)
    return guide


def _train(
    model: DeepMarkovModel,
    guide: StructuredNormal,
    chorales: Chorales,
    folder: Path,
    options: Options,
    *,
    kl_warmup: int,
    freeze_model: bool,
) -> None:
    data = trimmed(chorales.train)

    def train() -> None:
        pg.train(
            model,
            guide,
            pg.IndexedData(4, data.fetch) if options.quick else data,
            num_epochs=1 if options.quick else NUM_EPOCHS,
            batch_size=20,
            learning_rate=2e-3,
            clip_norm=10.0,
            kl_warmup=0 if options.quick else kl_warmup,
            validation=pg.IndexedData(2, data.fetch) if options.quick else trimmed(chorales.validation),
            patience=40,
            freeze_model=freeze_model,
            checkpoint=folder / "training.pt",
            seed=options.seed,
        )

    keep_trained(folder / "checkpoint.pt", model, guide, chorales.train, train)
