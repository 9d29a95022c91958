"""Deep Markov models of Bach's chorales, trained with a filter, with a lookahead and with a smoother.

What a guide is not shown costs its own bound; trained together with it, it also costs the model. The second is told
apart from the first by bounds of log p(x) that no longer depend on what the guide is shown: IWAE of a smoother, trained
for the frozen model on chorales that it draws, here, and AIS in `ledgers`.
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
from pyrogaps.training import Cosine

LATENT, HIDDEN, RNN = 32, 64, 128
LOOKAHEADS = (0, 2, math.inf)
KL_WARMUP, NUM_PARTICLES = 20, 1000
# All begin on a plateau where the model ignores its latents; with lookahead 2 it lasted 200 epochs longer.
NUM_EPOCHS = {0: 420, 2: 620, math.inf: 420}
# Of the chorales that are drawn to train a guide, no more steps than these: a median chorale has 57.
DRAWN_STEPS, NUM_DRAWN_EPOCHS = 64, 150
# Krishnan, Shalit and Sontag (arXiv:1609.09869): nats per step, by importance sampling and (the bound).
PUBLISHED = {0: (7.020, 7.519), math.inf: (6.605, 7.033)}

SETTING = "DMM, JSB chorales"

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
    test = some_of(chorales.test, options)
    for lookahead in LOOKAHEADS:
        folder = options.runs / "chorales" / f"lookahead-{lookahead}"
        model, guide = trained(chorales, lookahead, folder, options)
        smoother = drawn(model, guide, math.inf, chorales, folder, options)
        particles = 8 if options.quick else NUM_PARTICLES
        # A smoother's own pair is weighed once.
        weighed = {of: pg.iwae(model, of, test, num_particles=particles).value for of in {guide, smoother}}
        bounds = {
            "-L[q] per step": pg.elbo(model, guide, test, num_particles=particles // 8 or 2).value,
            f"-IWAE-{particles} per step": weighed[guide],
            f"-IWAE-{particles} of a smoother per step": weighed[smoother],
        }
        evidence, bound = PUBLISHED.get(lookahead, (None, None))
        for (quantity, nats), known in zip(bounds.items(), (bound, evidence, None), strict=True):
            yield per_step("chorales", f"trained with lookahead {lookahead}", quantity, -nats, test[1], known)


def some_of(sequences: Sequences, options: Options) -> Sequences:
    """All, or a few where the run is quick."""
    x, lengths = sequences
    return (x[:4, :8], lengths[:4].clamp(max=8)) if options.quick else sequences


def per_step(
    experiment: str, guide: str, quantity: str, values: Tensor, lengths: Tensor, known: float | None = None
) -> Row:
    """The ratio of means, nats to steps, with its standard error over chorales by the delta method."""
    ratio = values.sum() / lengths.sum()
    residuals = values - ratio * lengths
    error = residuals.std() * len(values) ** 0.5 / lengths.sum()
    return Row(experiment, SETTING, guide, quantity, float(ratio), float(error), known)


def trained(
    chorales: Chorales, lookahead: float, folder: Path, options: Options
) -> tuple[DeepMarkovModel, StructuredNormal]:
    """A model and a guide of that lookahead, trained together, stopped early on the validation chorales."""
    pyro.set_rng_seed(options.seed)
    model = DeepMarkovModel(88, LATENT, HIDDEN, HIDDEN)
    guide = StructuredNormal(88, LATENT, RNN, lookahead=lookahead)
    data = trimmed(chorales.train)

    def train() -> None:
        pg.train(
            model,
            guide,
            pg.IndexedData(4, data.fetch) if options.quick else data,
            num_epochs=1 if options.quick else NUM_EPOCHS[lookahead],
            batch_size=20,
            learning_rate=2e-3,
            clip_norm=10.0,
            kl_warmup=0 if options.quick else KL_WARMUP,
            validation=pg.IndexedData(2, data.fetch) if options.quick else trimmed(chorales.validation),
            patience=40,
            checkpoint=folder / "pair" / "training.pt",
            seed=options.seed,
        )

    keep_trained(folder / "pair" / "checkpoint.pt", model, guide, chorales.train, train)
    return model, guide


def drawn(
    model: DeepMarkovModel,
    guide: StructuredNormal,
    lookahead: float,
    chorales: Chorales,
    folder: Path,
    options: Options,
) -> StructuredNormal:
    """A guide of that lookahead, trained for the frozen model on chorales that it draws, from the weights of `guide`.

    All lookaheads have the same parameters. The model's own smoother stays as it is: it has been trained for it.
    """
    if guide.lookahead == lookahead == math.inf:
        return guide
    x, lengths = some_of(chorales.train, options)
    shape = x[:, :DRAWN_STEPS], lengths.clamp(max=DRAWN_STEPS)
    num_epochs = 1 if options.quick else NUM_DRAWN_EPOCHS
    found = StructuredNormal(88, LATENT, RNN, lookahead=lookahead)
    found.load_state_dict(guide.state_dict())

    def train() -> None:
        reference = pg.reference_guide(
            model,
            found,
            shape,
            num_epochs=num_epochs,
            batch_size=20,
            learning_rate=1e-3,
            schedule=Cosine(num_epochs, final=0.01),
            clip_norm=10.0,
            checkpoint=folder / f"drawn-{lookahead}-training.pt",
            seed=options.seed,
        )
        assert isinstance(reference, StructuredNormal)
        found.load_state_dict(reference.state_dict())

    keep_trained(folder / f"drawn-{lookahead}.pt", model, found, shape, train)
    return found
