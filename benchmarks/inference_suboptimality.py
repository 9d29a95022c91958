"""Table 1 of Cremer, Li and Duvenaud, "Inference Suboptimality in Variational Autoencoders" (arXiv:1801.03558), anew.

`python -m benchmarks.inference_suboptimality` trains every column, measures its gaps on 1,000 test and 1,000 training
images, certifies the evidence, and writes `results/inference_suboptimality.csv`, one row per column, and the page
`results/inference_suboptimality.md`, which sets it beside the paper's and judges its claims. Every stage of a column
lies in `--runs` when it is done, so that a run that was stopped continues, and columns can be made one by one.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
from torch import Tensor

import pyrogaps as pg
from benchmarks.reporting import RESULTS, keep_trained, kept_ledger, machine
from benchmarks.suboptimality_page import page
from pyrogaps import GapLedger
from pyrogaps.building import DataSet, build_data, build_families, build_programs
from pyrogaps.density.runs import Program
from pyrogaps.recipe import Recipe, override, read_document, resolve
from pyrogaps.run_folder import RunFolder

COLUMNS = tuple(
    f"{data}-{guide}{setting}"
    for data in ("mnist", "fashion")
    for setting in ("", "-large", "-no-anneal")
    for guide in ("ffg", "flow")
)
PARTS = ("test", "train")
RUNS = Path("benchmarks/runs/inference_suboptimality")
LEDGER = ("log_evidence", "iwae_5000", "elbo", "approximation_gap", "amortization_gap", "inference_gap")
NUM_IWAE, NUM_SIMULATED = 5000, 256


def column_recipe(name: str, num_epochs: int | None = None, num_images: int | None = None) -> Recipe:
    """The recipe of a column, for `num_epochs` in place of its own: schedule and annealing keep their proportions."""
    document = read_document(name)
    if num_epochs is not None:
        training = document["training"]
        annealing = training.get("entropy_annealing", 0) * num_epochs / training["num_epochs"]
        override(document, "training.entropy_annealing", round(annealing))
        override(document, "training.schedule.init_args.num_epochs", num_epochs)
        override(document, "training.num_epochs", num_epochs)
    if num_images is not None:
        override(document, "split.num_datapoints", num_images)
    return resolve(document)


def untrained(recipe: Recipe) -> tuple[Program, Program, DataSet]:
    """The pair of `recipe` with the weights that its seed gives, and the data."""
    data, _ = build_data(recipe)
    pyro.clear_param_store()
    pyro.set_rng_seed(recipe.seed)
    return *build_programs(recipe), data


def trained(recipe: Recipe, folder: Path, *, progress: bool) -> tuple[Program, Program, DataSet]:
    """The pair of `recipe` with its weights, trained where `folder` does not hold them yet, and the data.

    Raises `InputError` where `folder` holds what another recipe made.
    """
    RunFolder(folder).claim(recipe.to_yaml(), overwrite=False)
    model, guide, data = untrained(recipe)
    assert recipe.training is not None
    settings = vars(recipe.training)

    def train() -> None:
        pg.train(
            model,
            guide,
            data.train,
            **settings,
            validation=data.validation,
            checkpoint=folder / "training.pt",
            seed=recipe.seed,
            progress=progress,
        )

    keep_trained(folder / "checkpoint.pt", model, guide, data.train, train)
    return model, guide, data


def evaluated(recipe: Recipe, folder: Path, model: Program, guide: Program, data: DataSet, part: str) -> GapLedger:
    """The ledger of the recipe's number of "test" or "train" images, computed where `folder` does not hold it yet."""

    def measure() -> GapLedger:
        source = data.evaluated if part == "test" else data.train
        assert isinstance(source, Tensor)
        ledger = decomposed(recipe, model, guide, source[: recipe.split.num_datapoints], cache=folder / f"{part}-parts")
        bound = pg.iwae(
            model, guide, source[: recipe.split.num_datapoints], num_particles=NUM_IWAE, seed=recipe.seed + 1
        )
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
    )


def certified(recipe: Recipe, folder: Path, model: Program, guide: Program, data: DataSet) -> dict[str, float]:
    """BDMC on images simulated from the model, its width, with the anchor and settings that measured the evidence."""
    path = folder / "sandwich.json"
    if not path.exists():
        assert isinstance(data.evaluated, Tensor)
        sandwich = pg.bdmc(
            model,
            data.evaluated[:NUM_SIMULATED],
            guide_or_family=guide,
            settings=recipe.evidence,
            refinement=recipe.refinement,
            batch_size=recipe.batch_size or 64,
            seed=recipe.seed,
        )
        result = {"sandwich_width": sandwich.width, "sandwich_width_mcse": sandwich.width_mcse}
        RunFolder(folder).write(path.name, lambda to: to.write_text(json.dumps(result)))
    found: dict[str, float] = json.loads(path.read_text())
    return found


def row(recipe: Recipe, name: str, runs: Path) -> dict[str, object]:
    """A column of the table as a row of the CSV; one whose training diverged has its reason in place of numbers."""
    training = recipe.training
    assert training is not None
    told = {"column": name, "status": "done", "num_epochs": training.num_epochs, "seed": recipe.seed}
    told |= {"entropy_annealing": training.entropy_annealing}
    folder = runs / name
    try:
        model, guide, data = trained(recipe, folder, progress=True)
        numbers: dict[str, object] = {}
        for part in PARTS:
            numbers |= {
                f"{part}_{key}": value for key, value in statistics(evaluated(recipe, folder, model, guide, data, part))
            }
        numbers |= certified(recipe, folder, model, guide, data)
    except (FloatingPointError, pg.InputError) as error:
        return {**told, "status": " ".join(str(error).split())}
    return {**told, **numbers}


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
    for name, (values, errors) in quantities.items():
        yield name, float(values.mean())
        yield f"{name}_se", float(values.std(ddof=1) / len(values) ** 0.5)
        yield f"{name}_mcse", float(np.sqrt((errors**2).sum()) / len(errors))
    yield "num_images", len(per["datapoint"])
    for name, family in (("flow", flow), ("ffg", mean_field)):
        yield f"converged_{name}", float(per["converged"].sel(family=family).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("columns", nargs="*", help=f"which columns, of {', '.join(COLUMNS)} (default: all)")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--num_epochs", type=int, help="in place of the recipes' own")
    parser.add_argument("--num_images", type=int, help="of each of test and train, in place of the recipes' own")
    parser.add_argument("--train_only", action="store_true", help="stop when the columns are trained")
    parser.add_argument("--write_only", action="store_true", help="write the table of the columns that are finished")
    arguments = parser.parse_args()
    if unknown := sorted({*arguments.columns} - {*COLUMNS}):
        parser.error(f"no column {unknown[0]}; there are {', '.join(COLUMNS)}")
    rows = []
    for name in arguments.columns or COLUMNS:
        recipe = column_recipe(name, arguments.num_epochs, arguments.num_images)
        if arguments.train_only:
            trained(recipe, arguments.runs / name, progress=True)
        elif not arguments.write_only or (arguments.runs / name / "sandwich.json").exists():
            rows.append(row(recipe, name, arguments.runs))
            write(rows)
    if rows:
        print((RESULTS / "inference_suboptimality.md").read_text())


def write(rows: list[dict[str, object]]) -> None:
    """The CSV of the columns so far, and the page made of it."""
    table = pd.DataFrame(rows)
    table["machine"] = machine()
    RESULTS.mkdir(exist_ok=True)
    results = RunFolder(RESULTS)
    results.write("inference_suboptimality.csv", lambda to: table.to_csv(to, index=False))
    results.write("inference_suboptimality.md", lambda to: to.write_text(page(table)))


if __name__ == "__main__":
    main()
