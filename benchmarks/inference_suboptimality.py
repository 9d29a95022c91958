"""Table 1 of Cremer, Li and Duvenaud, "Inference Suboptimality in Variational Autoencoders" (arXiv:1801.03558), anew.

`python -m benchmarks.inference_suboptimality` trains every column, measures its gaps on test and training images,
certifies the evidence, and writes `results/inference_suboptimality.csv`, one row per column, and the page
`results/inference_suboptimality.md`, which sets it beside the paper's and judges its claims. Every stage of a column
is kept in `--runs` when it is done: a run that was stopped continues, and columns can be made one by one. Table and
page are written after every column, from all columns that are finished, here or, as the table says, before.

The flow is the paper's, Real NVP with an auxiliary variable. `--flow coupling` makes the same table with the plain flow
on halves of z, in files of its own.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
from torch import Tensor

import pyrogaps as pg
from benchmarks.reporting import RESULTS, keep_noted, kept_ledger, machine
from benchmarks.reporting import write as write_file
from benchmarks.suboptimality_page import page
from pyrogaps import GapLedger
from pyrogaps.cli.building import DataSet, build_data, build_families, build_programs
from pyrogaps.cli.documents import override, read_document
from pyrogaps.cli.recipe import Recipe, resolve
from pyrogaps.cli.run_folder import RunFolder
from pyrogaps.density.runs import Program
from pyrogaps.training import load_model_weights, load_weights
from pyrogaps.training.weights import dump, weights_alone

# By name of the flow: how columns with it are called, and the files of its table.
GUIDES = {"auxiliary": "flow", "coupling": "coupling"}
FILES = {"auxiliary": "inference_suboptimality", "coupling": "inference_suboptimality_coupling"}


def columns_of(flow: str) -> tuple[str, ...]:
    """The twelve columns of the table with this flow; each is the name of a recipe."""
    return tuple(
        f"{data}-{guide}{setting}"
        for data in ("mnist", "fashion")
        for setting in ("", "-large", "-no-anneal")
        for guide in ("ffg", GUIDES[flow])
    )


PARTS = ("test", "train")
RUNS = Path("benchmarks/runs")
LEDGER = ("log_evidence", "iwae_5000", "elbo", "approximation_gap", "amortization_gap", "inference_gap")
NUM_IWAE, NUM_SIMULATED = 5000, 256
# L[q*_Flow] may lie below L[q*_FFG] by no more than this, in nats (mean over images): a flow contains the FFG.
TOLERANCE = 0.02


def column_recipe(
    name: str, num_epochs: int | None = None, num_images: int | None = None, flow: str = "auxiliary"
) -> Recipe:
    """The recipe of a column, for `num_epochs` in place of its own: schedule and annealing keep their proportions.

    With `flow` "coupling" the further family of a column trained with FFG is the plain flow.
    """
    document = read_document(name)
    if flow == "coupling" and document["families"].get("flow") is not None:
        override(document, "families.flow", "pyrogaps.guides.flows.AutoLocalFlow")
    if num_epochs is not None:
        training = document["training"]
        annealing = training.get("entropy_annealing", 0) * num_epochs / training["num_epochs"]
        override(document, "training.entropy_annealing", round(annealing))
        override(document, "training.schedule.init_args.num_epochs", num_epochs)
        override(document, "training.num_epochs", num_epochs)
    if num_images is not None:
        override(document, "evaluate.num_datapoints", num_images)
    return resolve(document)


def kept_recipe(folder: Path) -> Recipe:
    """The recipe that `folder` was made with, whatever is asked for now."""
    return resolve(read_document(str(folder / "recipe.yaml")))


def untrained(recipe: Recipe) -> tuple[Program, Program, DataSet]:
    """The pair of `recipe` with the weights that its seed gives, and the data."""
    data, _ = build_data(recipe)
    pyro.clear_param_store()
    pyro.set_rng_seed(recipe.seed)
    return *build_programs(recipe), data


def trained(recipe: Recipe, folder: Path, *, progress: bool) -> tuple[Program, Program, DataSet]:
    """The pair of `recipe` with its weights, trained where `folder` does not hold them yet, and the data.

    Training starts from the model's weights in `recipe.model_checkpoint`, where it names a file.

    Raises `InputError` where `folder` holds what another recipe made.
    """
    own = RunFolder(folder)
    own.claim(recipe.to_yaml(), overwrite=False)
    model, guide, data = untrained(recipe)
    assert recipe.training is not None
    if own.holds("checkpoint.pt"):
        load_weights(folder / "checkpoint.pt", model, guide, data.train)
        return model, guide, data
    if recipe.model_checkpoint is not None:
        load_model_weights(recipe.model_checkpoint, model, guide, data.train)
    pg.train(
        model,
        guide,
        data.train,
        **vars(recipe.training),
        validation=data.validation,
        checkpoint=folder / "training.pt",
        seed=recipe.seed,
        progress=progress,
    )
    own.write("checkpoint.pt", lambda file: dump(file, weights_alone(model, guide)))
    return model, guide, data


def evaluated(
    recipe: Recipe,
    folder: Path,
    model: Program,
    guide: Program,
    data: DataSet,
    part: str,
    num_images: int | None = None,
) -> GapLedger:
    """The ledger of "test" or "train" images, by default the recipe's number; `folder` keeps it."""

    def measure() -> GapLedger:
        source = data.evaluated if part == "test" else data.train
        assert isinstance(source, Tensor)
        images = source[: num_images or recipe.evaluate.num_datapoints]
        ledger = decomposed(recipe, model, guide, images, cache=folder / f"{part}-parts")
        bound = pg.iwae(model, guide, images, num_particles=NUM_IWAE, seed=recipe.seed + 1)
        ledger.per_datapoint["iwae_5000"] = "datapoint", bound.value.cpu().numpy()
        ledger.per_datapoint["iwae_5000_mcse"] = "datapoint", bound.mcse.cpu().numpy()
        return ledger

    return kept_ledger(folder / f"{part}.nc", measure)


def decomposed(recipe: Recipe, model: Program, guide: Program, x: Tensor, *, cache: Path | None = None) -> GapLedger:
    """The ledger of `x` as `recipe` asks for it; `cache` is a folder for its finished chunks."""
    return pg.decompose(
        model,
        guide,
        x,
        families=build_families(recipe),
        evidence=recipe.evidence,
        refinement=recipe.refinement,
        num_particles=recipe.num_particles,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        cache=cache,
        progress=sys.stderr.isatty(),
    )


def certified(
    recipe: Recipe, folder: Path, model: Program, guide: Program, data: DataSet, num_simulated: int | None = None
) -> dict[str, float]:
    """BDMC on images simulated from the model: the width of the evidence, as the ledgers measure it."""
    path = folder / "sandwich.json"
    if not path.exists():
        assert isinstance(data.evaluated, Tensor)
        sandwich = pg.bdmc(
            model,
            data.evaluated[: num_simulated or NUM_SIMULATED],
            guide_or_family=guide,
            settings=recipe.evidence,
            refinement=recipe.refinement,
            batch_size=recipe.batch_size or 64,
            seed=recipe.seed,
        )
        result = {
            "sandwich_width": sandwich.width,
            "sandwich_width_mcse": sandwich.width_mcse,
            "num_simulated": num_simulated or NUM_SIMULATED,
        }
        write_file(path, json.dumps(result).encode())
    found: dict[str, float] = json.loads(path.read_text())
    return found


def row(
    recipe: Recipe, name: str, runs: Path, num_training_images: int | None = None, num_simulated: int | None = None
) -> dict[str, object]:
    """A column of the table as a row of the CSV. One whose training diverged has its reason in place of numbers."""
    folder = runs / name
    facts = {"column": name, "status": "done", **settings_of(recipe)}
    try:
        model, guide, data = trained(recipe, folder, progress=sys.stderr.isatty())
    except (FloatingPointError, pg.InputError) as error:
        return {**facts, "status": " ".join(str(error).split())}
    numbers: dict[str, object] = {}
    for part in PARTS:
        number = num_training_images if part == "train" else None
        ledger = evaluated(recipe, folder, model, guide, data, part, number)
        numbers |= {f"{part}_{key}": value for key, value in statistics(ledger)}
    numbers |= certified(recipe, folder, model, guide, data, num_simulated)
    numbers["machine"] = keep_noted(folder / "machine.txt", machine)
    return {**facts, "status": status(numbers), **numbers}


def settings_of(recipe: Recipe) -> dict[str, object]:
    """Budget, seed and sizes of a column. Hidden sizes of flows are those of the guide and of L[q*_Flow]."""
    training, guide = recipe.training, recipe.guide
    assert training is not None
    assert guide is not None
    own = guide.init_args.get("flow_hidden")
    further = recipe.families["flow"].init_args.get("hidden") if "flow" in recipe.families else None
    return {
        "num_epochs": training.num_epochs,
        "seed": recipe.seed,
        "entropy_annealing": training.entropy_annealing,
        "encoder_hidden": "-".join(map(str, guide.init_args["hidden"])),
        "flow_hidden": own,
        "local_flow_hidden": further or own,
        "refinement_steps": recipe.refinement.num_steps,
        "evidence": type(recipe.evidence).__name__,
    }


def status(numbers: dict[str, object]) -> str:
    """Whether L[q*_Flow] is at least L[q*_FFG], as the flow contains the FFG: "done", or by how much it is not."""
    short = {
        part: difference
        for part in PARTS
        if f"{part}_flow_minus_ffg" in numbers
        and not (difference := float(str(numbers[f"{part}_flow_minus_ffg"]))) >= -TOLERANCE
    }
    if not short:
        return "done"
    found = ", ".join(f"{part} {difference:.3f}" for part, difference in short.items())
    return f"flow not refined enough: L[q*_Flow] - L[q*_FFG] below -{TOLERANCE} nats ({found})"


def statistics(ledger: GapLedger) -> Iterator[tuple[str, object]]:
    """Means over images in nats, each with its standard error over images and its Monte Carlo standard error."""
    per = ledger.per_datapoint
    # A column's own family is the one it was trained with.
    flow, mean_field = ("own", "mean-field") if "mean-field" in ledger.families else ("flow", "own")
    refined, refined_mcse = per["elbo_refined"], per["elbo_refined_mcse"]
    quantities = {name: (per[name].values, per[f"{name}_mcse"].values) for name in LEDGER}
    for name, family in (("elbo_refined_flow", flow), ("elbo_refined_ffg", mean_field)):
        quantities[name] = refined.sel(family=family).values, refined_mcse.sel(family=family).values
    (best, best_error), (rest, rest_error) = quantities["elbo_refined_flow"], quantities["elbo_refined_ffg"]
    quantities["flow_minus_ffg"] = best - rest, np.hypot(best_error, rest_error)
    yield from means(quantities)
    yield "num_images", len(per["datapoint"])
    for name, family in (("flow", flow), ("ffg", mean_field)):
        yield f"converged_{name}", float(per["converged"].sel(family=family).mean())


def means(quantities: dict[str, tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[str, float]]:
    """Of values and Monte Carlo errors per image: the mean, its standard error, its Monte Carlo standard error."""
    for name, (values, errors) in quantities.items():
        yield name, float(values.mean())
        yield f"{name}_se", float(values.std(ddof=1) / len(values) ** 0.5)
        yield f"{name}_mcse", float(np.sqrt((errors**2).sum()) / len(errors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("columns", nargs="*", help=f"of {', '.join(columns_of('auxiliary'))} (default: all)")
    parser.add_argument("--flow", choices=GUIDES, default="auxiliary", help="the paper's flow, or the plain one")
    parser.add_argument("--runs", type=Path, help=f"default: {RUNS}/ and the name of the table's files")
    parser.add_argument("--num_epochs", type=int, help="in place of the recipes' own")
    parser.add_argument("--num_images", type=int, help="of test and training images each, in place of the recipes' own")
    parser.add_argument("--num_training_images", type=int, help="of training images, where it is another number")
    parser.add_argument("--num_simulated", type=int, help=f"images for the BDMC sandwich (default: {NUM_SIMULATED})")
    parser.add_argument("--train_only", action="store_true", help="stop when the columns are trained")
    parser.add_argument("--write_only", action="store_true", help="write the table of the columns that are finished")
    options = parser.parse_args()
    columns, runs = columns_of(options.flow), options.runs or RUNS / FILES[options.flow]
    if unknown := sorted({*options.columns} - {*columns}):
        parser.error(f"no column {unknown[0]}; there are {', '.join(columns)}")

    def recipe_of(name: str) -> Recipe:
        return column_recipe(name, options.num_epochs, options.num_images, options.flow)

    chosen = [] if options.write_only else [*(options.columns or columns)]
    rows = published(options.flow)
    for name in columns:
        if name not in chosen and (runs / name / "sandwich.json").exists():
            rows[name] = row(kept_recipe(runs / name), name, runs)
    for name in chosen:
        if options.train_only:
            trained(recipe_of(name), runs / name, progress=sys.stderr.isatty())
            continue
        rows[name] = row(recipe_of(name), name, runs, options.num_training_images, options.num_simulated)
        write([rows[column] for column in columns if column in rows], options.flow)
    if options.write_only and rows:
        write(list(rows.values()), options.flow)
    if rows and not options.train_only:
        print((RESULTS / f"{FILES[options.flow]}.md").read_text())


def published(flow: str) -> dict[str, dict[str, object]]:
    """The rows of the table as it is, by column: those whose runs are on another machine stay as they are."""
    path = RESULTS / f"{FILES[flow]}.csv"
    if not path.exists():
        return {}
    table = pd.read_csv(path)
    return {str(row["column"]): {str(name): value for name, value in row.items()} for row in table.to_dict("records")}


def write(rows: list[dict[str, object]], flow: str) -> None:
    """The CSV of the columns so far, and the page made of it."""
    table = pd.DataFrame(rows)
    write_file(RESULTS / f"{FILES[flow]}.csv", table.to_csv(index=False).encode())
    write_file(RESULTS / f"{FILES[flow]}.md", page(table, flow).encode())


if __name__ == "__main__":
    main()
