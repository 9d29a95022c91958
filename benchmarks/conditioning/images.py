"""MNIST of which the guide sees the upper half: what the lower half's absence costs, and what the encoder does."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyro
import torch
from torch import Tensor

import pyrogaps as pg
from benchmarks.conditioning.rows import Options, Row, mean_row
from benchmarks.inference_suboptimality import RUNS, column_recipe, trained
from benchmarks.reporting import keep_trained, kept_ledger
from pyrogaps.cli.building import DataSet
from pyrogaps.cli.recipe import Recipe
from pyrogaps.density.runs import Program
from pyrogaps.guides.partial import PartialNormal
from pyrogaps.training import Cosine

MODEL = "mnist-ffg"
NUM_IMAGES, NUM_EPOCHS = 200, 30
# The chains are as many as completions, so that temperatures are what time is spent on.
EVIDENCE, CONDITIONING = pg.AIS(num_temperatures=30, num_leapfrog=5), pg.Conditioning(256, 256)
SETTING = f"{MODEL}, upper half"
QUANTITIES = (
    *("log_evidence", "elbo_refined[own]", "elbo_shared", "elbo_on_completions", "elbo"),
    *("inference_gap", "approximation_gap", "conditioning_gap", "amortization_gap"),
)


def rows(options: Options) -> Iterator[Row]:
    """The ledger of the upper half of the first test images, for the model of the table's first column, frozen."""
    recipe, folder = column_recipe(MODEL, 1 if options.quick else None), options.runs / "images"
    model, _, data = trained(recipe, folder / "model" if options.quick else RUNS / MODEL, progress=True)
    assert isinstance(data.evaluated, Tensor)
    guide = half_guide(recipe, model, data, folder, options)
    number = 8 if options.quick else NUM_IMAGES
    ledger = kept_ledger(
        folder / f"ledger-{number}.nc",
        lambda: pg.decompose(
            model,
            guide,
            data.evaluated[:number],
            evidence=pg.AIS(num_chains=2, num_temperatures=3) if options.quick else EVIDENCE,
            refinement=pg.Refinement(num_steps=5) if options.quick else recipe.refinement,
            conditioning=pg.Conditioning(4, 4) if options.quick else CONDITIONING,
            num_particles=recipe.num_particles,
            seed=options.seed,
            cache=folder / "parts",
        ),
    )
    print(ledger)
    summary = ledger.summary()
    for quantity in QUANTITIES:
        line = summary.loc[quantity]
        error = (float(line["standard_error"]) ** 2 + float(line["mcse"]) ** 2) ** 0.5
        yield Row("images", SETTING, "PartialNormal", quantity, float(line["mean"]), error)
    # Half of it is how much too large the conditioning gap is.
    yield mean_row(
        "images", SETTING, "PartialNormal", "overfitting", torch.tensor(ledger.per_datapoint["overfitting"].values)
    )


def half_guide(recipe: Recipe, model: Program, data: DataSet, folder: Path, options: Options) -> PartialNormal:
    """An encoder of the upper half, trained for the frozen model on its training images, with its run in `folder`."""
    assert recipe.guide is not None
    assert recipe.training is not None
    pyro.set_rng_seed(options.seed)
    guide = PartialNormal(**recipe.guide.init_args, shown=recipe.guide.init_args["data_dim"] // 2)
    num_epochs = 1 if options.quick else NUM_EPOCHS
    settings = replace(
        recipe.training,
        num_epochs=num_epochs,
        schedule=Cosine(num_epochs, final=0.01),
        entropy_annealing=0,
        freeze_model=True,
    )

    def train() -> None:
        pg.train(model, guide, data.train, **vars(settings), checkpoint=folder / "half-training.pt", seed=options.seed)

    keep_trained(folder / "half.pt", model, guide, data.train, train)
    return guide
