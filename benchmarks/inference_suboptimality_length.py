"""How the claims of "Inference Suboptimality in Variational Autoencoders" move with the length of training.

`python -m benchmarks.inference_suboptimality_length` trains four columns of the paper's Table 1 on the authors' own
schedule: learning rate 1e-3 x 10^(-i/7) for 3^i epochs, i = 0 .. 7, and entropy annealing over 400 epochs. They are
MNIST with the regular encoder, FFG and flow, annealed and not. At the ends of stages, after 40, 121, 364, 1,093 and
3,280 epochs, it measures their gaps and writes `results/inference_suboptimality_length.csv`, `.png` and `.md`.

All columns reach a stage before any goes on to the next. A run that was killed continues from the last checkpoint, and
`--num_epochs` may grow from one call to the next. The weights at the end of every stage are kept, so that
`--only measure` can work on them while `--only train` goes on.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import pyrogaps as pg
from benchmarks.inference_suboptimality import (
    FILES,
    RUNS,
    certified,
    column_recipe,
    evaluated,
    settings_of,
    statistics,
    status,
    untrained,
)
from benchmarks.reporting import RESULTS, keep_noted, machine
from benchmarks.reporting import write as write_file
from benchmarks.suboptimality_page import (
    AMORTIZATION,
    APPROXIMATION,
    DIFFERENCE,
    LABELS,
    Margin,
    Table,
    annealing_matters,
    balanced,
    generator_adapts,
    several,
    verdict,
)
from pyrogaps.cli.recipe import Recipe
from pyrogaps.cli.run_folder import RunFolder
from pyrogaps.files import replacing
from pyrogaps.plots.source import SHADES, tidy
from pyrogaps.training import Staircase, load_weights, save_weights

NAME = "inference_suboptimality_length"
COLUMNS = ("mnist-ffg", "mnist-flow", "mnist-ffg-no-anneal", "mnist-flow-no-anneal")
STAGES = (40, 121, 364, 1093, 3280)
ANNEALING = 400  # epochs, as the authors'
QUANTITIES = ("log_evidence", "elbo_refined_flow", "elbo_refined_ffg", "elbo", APPROXIMATION, AMORTIZATION, DIFFERENCE)
CLAIMS = {
    "1. On MNIST both gaps contribute about equally.": (COLUMNS[:2], partial(balanced, columns=COLUMNS[:2])),
    "3. The generator adapts to the approximation.": (COLUMNS[:2], partial(generator_adapts, pairs=(COLUMNS[:2],))),
    "4. Without entropy annealing that difference is much smaller.": (
        COLUMNS[1::2],
        partial(annealing_matters, columns=("mnist-flow",)),
    ),
}


def length_recipe(name: str, num_images: int | None = None) -> Recipe:
    """The recipe of a column at the authors' full length, on their schedule."""
    recipe = column_recipe(name, None, num_images)
    assert recipe.training is not None
    annealing = ANNEALING if recipe.training.entropy_annealing else 0
    training = replace(recipe.training, num_epochs=STAGES[-1], schedule=Staircase(), entropy_annealing=annealing)
    return replace(recipe, training=training)


def weights_at(folder: Path, epoch: int) -> Path:
    return folder / "training" / f"weights-{epoch}.pt"


def train_to(epoch: int, recipe: Recipe, folder: Path) -> None:
    """Train a column on to the end of a stage and keep its weights there.

    There are no validation data: the weights are the last, as the authors' are, and not the best of several epochs.
    """
    if weights_at(folder, epoch).exists():
        return
    # What is measured of a column may change while it is trained.
    own = RunFolder(folder / "training")
    own.claim(replace(recipe, families={}, evaluate=type(recipe.evaluate)()).to_yaml(), overwrite=False)
    model, guide, data = untrained(recipe)
    assert recipe.training is not None
    settings = {**vars(recipe.training), "num_epochs": epoch}
    pg.train(
        model,
        guide,
        data.train,
        **settings,
        checkpoint=folder / "training" / "training.pt",
        seed=recipe.seed,
        progress=sys.stderr.isatty(),
    )
    save_weights(weights_at(folder, epoch), model, guide)
    keep_noted(folder / "training" / "machine.txt", machine)
    own.release()


def measured(epoch: int, name: str, recipe: Recipe, folder: Path, num_simulated: int) -> dict[str, object]:
    """A row of the CSV: a column at the end of a stage, from the ledger that `folder` keeps or measured now."""
    model, guide, data = untrained(recipe)
    load_weights(weights_at(folder, epoch), model, guide, data.train)
    at = folder / f"{epoch}-epochs"
    at.mkdir(parents=True, exist_ok=True)
    ledger = evaluated(recipe, at, model, guide, data, "test")
    numbers = {f"test_{key}": value for key, value in statistics(ledger)}
    certificate = certified(recipe, at, model, guide, data, num_simulated)
    assert recipe.training is not None
    facts = {"column": name, "epoch": epoch, "schedule": "staircase", "status": status(numbers), **settings_of(recipe)}
    facts |= {"num_epochs": epoch, "entropy_weight": recipe.training.entropy_weight(epoch - 1)}
    return {**facts, **numbers, **certificate, "machine": keep_noted(at / "machine.txt", machine)}


def is_measured(epoch: int, folder: Path) -> bool:
    return all((folder / f"{epoch}-epochs" / file).exists() for file in ("test.nc", "sandwich.json"))


def compressed() -> pd.DataFrame:
    """The rows of these columns in the table of the short schedule, where it has been made."""
    path = RESULTS / f"{FILES['auxiliary']}.csv"
    if not path.exists():
        return pd.DataFrame()
    table = pd.read_csv(path)
    rows = table[table["column"].isin(COLUMNS) & (table["status"] == "done")].copy()
    rows["epoch"], rows["schedule"] = rows["num_epochs"], "compressed"
    rows["entropy_weight"] = 1.0
    return rows


def write(rows: list[dict[str, object]]) -> None:
    """The CSV of what is measured so far, the figure and the page."""
    table = pd.concat([pd.DataFrame(rows), compressed()], ignore_index=True)
    write_file(RESULTS / f"{NAME}.csv", table.to_csv(index=False).encode())
    figure = Figure(layout="constrained", figsize=(11, 3.2))
    draw(table, figure)
    with replacing(RESULTS / f"{NAME}.png", "figure") as file:
        figure.savefig(file, dpi=200, format="png")
    write_file(RESULTS / f"{NAME}.md", page(table).encode())


def draw(table: pd.DataFrame, figure: Figure) -> None:
    """Gaps against epochs. Lines: the staircase; hollow markers: the compressed schedule; bars: standard errors."""
    axes = figure.subplots(1, 4)
    for ax, column in zip(axes[:2], COLUMNS[:2], strict=True):
        for colour, gap in zip(SHADES, (APPROXIMATION, AMORTIZATION), strict=False):
            _line(ax, table[table["column"] == column], gap, colour, LABELS[gap])
        ax.set_title(f"claim 1: {column}", loc="left", fontsize=9)
    names = {"mnist-ffg": "FFG", "mnist-flow": "flow"}
    for colour, (column, label) in zip(SHADES, names.items(), strict=False):
        _line(axes[2], table[table["column"] == column], DIFFERENCE, colour, f"trained with {label}")
    for limit in (2.2, 10.0):
        axes[2].axhline(limit, color="0.6", lw=0.8, ls=":")
    axes[2].set_title("claim 3: L[q*_Flow] - L[q*_FFG]", loc="left", fontsize=9)
    names = {"mnist-flow": "annealed", "mnist-flow-no-anneal": "not annealed"}
    for colour, (column, label) in zip(SHADES, names.items(), strict=False):
        _line(axes[3], table[table["column"] == column], DIFFERENCE, colour, f"flow, {label}")
    axes[3].set_title("claim 4: L[q*_Flow] - L[q*_FFG]", loc="left", fontsize=9)
    for ax in axes:
        ax.set_xscale("log")
        ax.set_xticks(STAGES, [f"{stage:,}" for stage in STAGES], fontsize=7)
        ax.minorticks_off()
        ax.set_xlim(STAGES[0] * 0.7, STAGES[-1] * 1.4)
        ax.set_xlabel("epochs")
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
        ax.grid(axis="y", color="0.92", lw=0.8)
        tidy(ax)
        ax.legend(frameon=False, fontsize=7, loc="best")
    axes[0].set_ylabel("nats")


def _line(ax: Axes, rows: pd.DataFrame, quantity: str, colour: str, label: str) -> None:
    for schedule, form, face in (("staircase", "o-", colour), ("compressed", "s", "white")):
        of = rows[rows["schedule"] == schedule].sort_values("epoch")
        epochs, mean, error = (of[key].to_numpy(float) for key in ("epoch", f"test_{quantity}", f"test_{quantity}_se"))
        named = label if schedule == "staircase" else None
        ax.errorbar(epochs, mean, error, fmt=form, color=colour, mfc=face, ms=4, lw=1.3, capsize=2, label=named)


def page(table: pd.DataFrame) -> str:
    """How the claims move with training, for the columns and stages that are measured."""
    staircase = table[table["schedule"] == "staircase"]
    total = len(COLUMNS) * len(STAGES)
    lines = [
        "# The claims along training",
        "",
        "Four columns of Table 1 of Cremer, Li and Duvenaud (arXiv:1801.03558), MNIST with the regular encoder, on the "
        "authors' own schedule: learning rate 1e-3 x 10^(-i/7) for 3^i epochs, i = 0 .. 7; entropy annealing over 400 "
        "epochs in the annealed columns. Measured at the ends of stages, with the weights of that epoch. By `python -m "
        f"benchmarks.{NAME}`. **{len(staircase)} of {total} points measured.** In nats; ± is the standard error over "
        "images.",
        "",
        f"- Budget: {several(staircase, 'epoch')} epochs (the paper's table: 3,280), "
        f"{several(staircase, 'test_num_images')} test images, {several(staircase, 'refinement_steps')} refinement "
        f"steps; seed {several(staircase, 'seed')}.",
        f"- Hidden sizes: encoder {several(staircase, 'encoder_hidden')}; coupling networks of the amortized flow "
        f"{several(staircase, 'flow_hidden')}; those of L[q*_Flow] {several(staircase, 'local_flow_hidden')}.",
        f"- Made on: {several(staircase, 'machine', '; ')}.",
        "- Rows with the compressed schedule are those of [the table](inference_suboptimality.md): the same staircase "
        "shrunk to 100 epochs, annealing over 12.",
        "- lambda is the weight of the entropy in the last epoch. Below 1 the model is still trained on another "
        "objective than the ELBO.",
        "- The approximation gap of the flow, and log p(x) - L[q*_Flow], include E KL(q(v|z, x) || r(v|z, x)), v being "
        "the flow's auxiliary variable.",
        "",
        f"![Gaps along training]({NAME}.png)",
        "",
        "Lines: the authors' schedule. Hollow squares: the compressed one. Dotted: the limits of claim 3.",
        "",
        *_numbers(table),
        "## The claims",
        "",
        "Criteria as in `benchmarks/suboptimality_page.py`, for these columns alone. A cell is the margin by which a "
        "criterion is met (negative: missed).",
        "",
    ]
    done = table[table["status"] == "done"]
    for claim, (columns, margins) in CLAIMS.items():
        lines += [f"### {claim}", "", *_claim(done, columns, margins), ""]
    flagged = table[table["status"] != "done"]
    lines += [
        f"- Not judged: {row['column']}, {row['epoch']:,.0f} epochs: {row['status']}" for _, row in flagged.iterrows()
    ]
    return "\n".join(lines).rstrip() + "\n"


def _numbers(table: pd.DataFrame) -> Iterator[str]:
    labels = [LABELS.get(name, "L[q*_Flow] - L[q*_FFG]") for name in QUANTITIES]
    for column in COLUMNS:
        yield from (f"## {column}", "")
        rows = table[table["column"] == column].sort_values(["schedule", "epoch"], ascending=[False, True])
        if not len(rows):
            yield from ("Not measured yet.", "")
            continue
        head = ["epochs", "lambda", *labels, "BDMC sandwich"]
        yield "| " + " | ".join(head) + " |"
        yield "|" + "---|" * len(head)
        for _, row in rows.iterrows():
            epochs = f"{row['epoch']:,.0f}" + ("" if row["schedule"] == "staircase" else " (compressed)")
            cells = [f"{row[f'test_{name}']:.2f} ± {row[f'test_{name}_se']:.2f}" for name in QUANTITIES]
            cells.append(f"{row['sandwich_width']:.3f} ± {row['sandwich_width_mcse']:.3f}")
            yield f"| {epochs} | {row['entropy_weight']:.2f} | " + " | ".join(cells) + " |"
        yield ""


def _claim(table: pd.DataFrame, columns: tuple[str, ...], margins: "partial[list[Margin]]") -> Iterator[str]:
    """A row for every length of training at which the claim's columns are measured."""
    lines: list[str] = []
    for (schedule, epoch), rows in sorted(table.groupby(["schedule", "epoch"]), key=lambda item: item[0][1]):
        if not set(columns) <= set(rows["column"]):
            continue
        found = margins(Table(rows, "test"))
        if not lines:
            lines = [
                "| epochs | " + " | ".join(margin.what for margin in found) + " | |",
                "|---|" + "---|" * len(found),
            ]
            lines[1] += "---|"
        name = f"{epoch:,.0f}" + ("" if schedule == "staircase" else " (compressed)")
        cells = [f"{margin.value:.2f} ± {margin.error:.2f}" for margin in found]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | **{verdict(found)}** |")
    yield from lines or ["Not measured yet."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=COLUMNS, metavar="COLUMN")
    parser.add_argument("--num_epochs", type=int, default=1093, help="train this far: the end of a stage (1093, 3280)")
    parser.add_argument("--num_images", type=int, help="test images, in place of the recipes' own 1,000")
    parser.add_argument("--num_simulated", type=int, default=64, help="images simulated for the BDMC sandwich")
    parser.add_argument("--only", choices=("train", "measure", "write"), help="one part of the work")
    parser.add_argument("--runs", type=Path, default=RUNS / NAME)
    options = parser.parse_args()
    stages = [stage for stage in STAGES if stage <= options.num_epochs]
    if not stages:
        parser.error(f"--num_epochs: the first stage ends after {STAGES[0]} epochs, got {options.num_epochs}")
    recipes = {name: length_recipe(name, options.num_images) for name in COLUMNS}
    diverged: set[str] = set()
    for epoch in stages:
        for name in (column for column in options.columns if column not in diverged):
            folder = options.runs / name
            if options.only in (None, "train"):
                try:
                    train_to(epoch, recipes[name], folder)
                except FloatingPointError as error:
                    diverged.add(name)
                    print(f"{name}: {error}", file=sys.stderr, flush=True)
                    continue
                print(f"{name}: trained for {epoch} epochs", flush=True)
            wanted = options.only in (None, "measure") and weights_at(folder, epoch).exists()
            if wanted and not is_measured(epoch, folder):
                measured(epoch, name, recipes[name], folder, options.num_simulated)
                write_all(recipes, options)
    if options.only != "train":
        write_all(recipes, options)


def write_all(recipes: dict[str, Recipe], options: argparse.Namespace) -> None:
    """Write what is measured of all columns and stages, whichever this run was asked for."""
    rows = [
        measured(epoch, name, recipes[name], options.runs / name, options.num_simulated)
        for name in COLUMNS
        for epoch in STAGES
        if is_measured(epoch, options.runs / name)
    ]
    if rows:
        write(rows)
    print(f"{len(rows)} points measured", flush=True)


if __name__ == "__main__":
    main()
