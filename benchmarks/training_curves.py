"""Gaps along training, on images trained on and not: the encoder overfitting of Cremer, Li and Duvenaud, anew.

`python -m benchmarks.training_curves` trains each pair on a small part of MNIST, without early stopping, and takes
the inference gap of training and of held-back validation images apart at checkpoints along the way ("Inference
Suboptimality in Variational Autoencoders", arXiv:1801.03558). `results/training_curves.csv` has the means with their
standard errors over images, `results/training_curves.png` the picture. What is finished is kept in `--runs`, one file
per checkpoint and part, and a run that was stopped continues from there. With `--pairs` the other pairs' rows stay in
the table as they are.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import pyrogaps as pg
from benchmarks.inference_suboptimality import column_recipe, decomposed, untrained
from benchmarks.reporting import RESULTS, kept_ledger, machine, report, write
from pyrogaps.cli.recipe import Recipe
from pyrogaps.cli.typed import Component
from pyrogaps.plots.source import SHADES, tidy

# Another pair is another line: its name in the picture, and its recipe.
PAIRS = {
    "standard": "mnist-ffg",
    "flow": "mnist-flow",
    "coupling flow": "mnist-coupling",
    "larger decoder": "mnist-decoder-4",
    "larger encoder": "mnist-ffg-large",
}
# Of the epochs. Entropy annealing, in the recipes' proportion, is over before the first.
CHECKPOINTS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
PARTS = ("train", "validation")
GAPS = ("approximation_gap", "amortization_gap")
QUANTITIES = ("log_evidence", "elbo_refined[own]", "elbo", *GAPS, "inference_gap")
COLUMNS = (
    *("pair", "part", "epoch", "images"),
    *(f"{name}{suffix}" for name in QUANTITIES for suffix in ("", "_se")),
    *("converged", "training images", "seed"),
)
EVIDENCE = pg.AIS(num_chains=16, num_temperatures=30, num_leapfrog=5)
REFINEMENT = pg.Refinement(num_steps=300)
QUICK_EVIDENCE = pg.AIS(num_chains=4, num_temperatures=5, num_leapfrog=2)
QUICK_REFINEMENT = pg.Refinement(num_steps=20)


def pair_recipe(name: str, options: argparse.Namespace) -> Recipe:
    """The recipe of a pair, for fewer images and a constant learning rate: overfitting shows within minutes."""
    recipe = column_recipe(PAIRS[name], options.num_epochs, options.images)
    assert recipe.training is not None
    sizes = {"num_train": options.num_train, "num_validation": options.images}
    data = replace(recipe.data, init_args={**recipe.data.init_args, **sizes})
    training = replace(recipe.training, schedule=None)
    recipe = replace(
        recipe, data=data, training=training, families={}, evidence=EVIDENCE, refinement=REFINEMENT, seed=options.seed
    )
    return on_digits(recipe) if options.quick else recipe


def on_digits(recipe: Recipe) -> Recipe:
    """A recipe of the same form that runs in seconds."""
    assert recipe.model is not None
    assert recipe.guide is not None
    small = {"data_dim": 64, "latent_dim": 4}
    flow = {"flow_hidden": 8} if "flow_hidden" in recipe.guide.init_args else {}
    families = {
        name: Component(of.class_path, {**of.init_args, "hidden": 8} if "hidden" in of.init_args else of.init_args)
        for name, of in recipe.families.items()
    }
    return replace(
        recipe,
        families=families,
        data=Component("pyrogaps.datasets.Digits", recipe.data.init_args),
        model=Component(recipe.model.class_path, {**recipe.model.init_args, **small}),
        guide=Component(recipe.guide.class_path, {**recipe.guide.init_args, **small, **flow}),
        evidence=QUICK_EVIDENCE,
        refinement=QUICK_REFINEMENT,
        num_particles=100,
    )


def along_training(recipe: Recipe, folder: Path) -> Iterator[tuple[int, str, pg.GapLedger]]:
    """Epoch, part and ledger at every checkpoint; `folder` keeps the ledgers and the run."""
    model, guide, data = untrained(recipe)
    training = recipe.training
    assert training is not None
    for epoch in sorted({max(1, round(share * training.num_epochs)) for share in CHECKPOINTS}):
        files = {part: folder / f"{part}-{epoch}.nc" for part in PARTS}
        if not all(file.exists() for file in files.values()):
            settings = {**vars(training), "num_epochs": epoch}
            pg.train(model, guide, data.train, **settings, checkpoint=folder / "training.pt", seed=recipe.seed)
        for part, file in files.items():
            x = getattr(data, part)
            assert isinstance(x, Tensor)
            some = x[: recipe.evaluate.num_datapoints]
            yield epoch, part, kept_ledger(file, lambda some=some: decomposed(recipe, model, guide, some))


def kept_rows(options: argparse.Namespace) -> pd.DataFrame:
    """The rows of the pairs that are not asked for, from an earlier run with the same settings."""
    path = RESULTS / "training_curves.csv"
    if not options.pairs or options.quick or not path.exists():
        return pd.DataFrame()
    table = pd.read_csv(path)
    alike = (table["training images"] == options.num_train) & (table["seed"] == options.seed)
    alike &= table["images"] == options.images
    return table[alike & table["pair"].isin(set(PAIRS) - {*options.pairs})]


def row(pair: str, part: str, epoch: int, ledger: pg.GapLedger, options: argparse.Namespace) -> list[object]:
    summary, gaps = ledger.summary(), ledger.per_datapoint
    numbers = [float(summary.loc[name, column]) for name in QUANTITIES for column in ("mean", "standard_error")]
    converged = float(gaps["converged"].mean())
    return [pair, part, epoch, gaps.sizes["datapoint"], *numbers, converged, options.num_train, options.seed]


def draw(table: pd.DataFrame, figure: Figure) -> None:
    """A column of panels for each pair, a row for each gap, a line with its standard error for each part."""
    pairs = list(dict.fromkeys(table["pair"]))
    axes = figure.subplots(len(GAPS), len(pairs), sharex=True, sharey="row", squeeze=False)
    for column, pair in enumerate(pairs):
        for ax, gap in zip(axes[:, column], GAPS, strict=True):
            _panel(ax, table[table["pair"] == pair], gap)
        axes[0, column].set_title(pair, loc="left", fontsize=10)
        axes[-1, column].set_xlabel("epoch")
    for ax, gap in zip(axes[:, 0], GAPS, strict=True):
        ax.set_ylabel(f"{gap.removesuffix('_gap')} gap (nats)")
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    figure.align_ylabels(axes[:, 0])
    axes[0, 0].legend(frameon=False, fontsize=8, loc="best")


def _panel(ax: Axes, rows: pd.DataFrame, gap: str) -> None:
    for part, label, colour, form in zip(PARTS, ("training", "validation"), SHADES, ("o--", "s-"), strict=False):
        of = rows[rows["part"] == part].sort_values("epoch")
        epochs, mean, error = (of[name].to_numpy(float) for name in ("epoch", gap, f"{gap}_se"))
        ax.fill_between(epochs, mean - error, mean + error, color=colour, alpha=0.2, lw=0)
        ax.plot(epochs, mean, form, color=colour, ms=3.5, lw=1.4, label=f"{label} images")
    ax.set_xlim(left=0)
    ax.grid(axis="y", color="0.92", lw=0.8)
    tidy(ax)


def overfitting(table: pd.DataFrame) -> Iterator[str]:
    """For every pair, by how much the gaps of validation images exceed those of training images in the end."""
    last = table[table["epoch"] == table["epoch"].max()].set_index(["pair", "part"])
    for pair in dict.fromkeys(table["pair"]):
        train, validation = last.loc[(pair, "train")], last.loc[(pair, "validation")]
        differences = (
            f"{gap.removesuffix('_gap')} {validation[gap] - train[gap]:+.2f} "
            f"± {np.hypot(validation[f'{gap}_se'], train[f'{gap}_se']):.2f}"
            for gap in GAPS
        )
        yield f"{pair}: {', '.join(differences)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny run on digits, to see that it works")
    parser.add_argument("--runs", type=Path, default=Path("benchmarks/runs/training_curves"))
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, metavar="PAIR", help=f"of {', '.join(PAIRS)}")
    parser.add_argument("--num_train", type=int, default=5000, help="images to train on")
    parser.add_argument("--num_epochs", type=int, default=240)
    parser.add_argument("--images", type=int, default=100, help="of each part, at every checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.quick:
        options.runs, options.num_train, options.num_epochs, options.images = options.runs / "quick", 200, 2, 16
    # What makes another run has another folder.
    sizes = f"{options.num_train}-images-{options.num_epochs}-epochs-{options.images}-measured-seed-{options.seed}"
    rows = []
    others = kept_rows(options)
    for pair in options.pairs or PAIRS:
        folder = options.runs / sizes / PAIRS[pair]
        folder.mkdir(parents=True, exist_ok=True)
        for epoch, part, ledger in along_training(pair_recipe(pair, options), folder):
            rows.append(row(pair, part, epoch, ledger, options))
    report("training_curves", "Gaps along training (nats)", COLUMNS, rows, quick=options.quick)

    table = pd.DataFrame(rows, columns=list(COLUMNS))
    if len(others):
        table = pd.concat([table.assign(machine=machine()), others], ignore_index=True)
        table = table.sort_values("pair", key=lambda pairs: pairs.map([*PAIRS].index), kind="stable")
        write(RESULTS / "training_curves.csv", table.to_csv(index=False).encode())
    figure = Figure(layout="constrained", figsize=(2.3 * table["pair"].nunique() + 0.6, 4.6))
    draw(table, figure)
    figure.savefig((options.runs if options.quick else RESULTS) / "training_curves.png", dpi=200)
    print("\nvalidation minus training images in the last epoch, nats")
    print(*overfitting(table), sep="\n")
    print(machine())


if __name__ == "__main__":
    main()
