"""Further findings on inference suboptimality (Cremer, Li and Duvenaud, arXiv:1801.03558): three small studies.

`python -m benchmarks.suboptimality_studies` trains and measures, column by column,

- `decoder`: MNIST, FFG, decoders of 0, 2 and 4 hidden layers: does a larger decoder lower the approximation gap?
- `frozen`: three guides for one decoder, that of the column mnist-ffg: what does a larger encoder do, what a flow?
- `cifar`: a convolutional model of a subset of CIFAR-10 (coded as JPEG in between), FFG and flow.

It writes `results/suboptimality_studies.csv` and `.md` after every column. Every stage of a column is kept in `--runs`:
a run that was stopped continues. How encoders overfit is measured by `python -m benchmarks.training_curves`.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

import pyrogaps as pg
from benchmarks.inference_suboptimality import (
    FILES,
    PARTS,
    RUNS,
    certified,
    column_recipe,
    evaluated,
    kept_recipe,
    means,
    settings_of,
    trained,
)
from benchmarks.reporting import RESULTS, keep_noted, machine
from benchmarks.reporting import write as write_file
from benchmarks.suboptimality_page import AMORTIZATION, APPROXIMATION, LABELS, Margin, Table, several, verdict
from pyrogaps import GapLedger
from pyrogaps.cli.documents import read_document
from pyrogaps.cli.recipe import Recipe, resolve

NAME = "suboptimality_studies"
QUANTITIES = ("log_evidence", "elbo_refined", "elbo", APPROXIMATION, AMORTIZATION, "inference_gap")
HEADS = {**LABELS, "elbo_refined": "L[q*], own family"}


@dataclass(frozen=True)
class Study:
    """Some columns, what is asked of them, and the differences that answer it: (words, quantity, column, column)."""

    title: str
    question: str
    columns: tuple[str, ...]
    differences: tuple[tuple[str, str, str, str], ...]


STUDIES = {
    "decoder": Study(
        "Decoder size",
        "A larger decoder lowers the approximation gap. MNIST, FFG, decoders with 0, 2 and 4 hidden layers of 200.",
        ("mnist-decoder-0", "mnist-decoder-2", "mnist-decoder-4"),
        (
            ("0 - 2 layers", APPROXIMATION, "mnist-decoder-0", "mnist-decoder-2"),
            ("2 - 4 layers", APPROXIMATION, "mnist-decoder-2", "mnist-decoder-4"),
        ),
    ),
    "frozen": Study(
        "Encoder capacity against flow, on a frozen decoder",
        "A larger encoder lowers the amortization gap; a flow lowers both gaps. The decoder is that of mnist-ffg in "
        "[the table](inference_suboptimality.md), trained no further; the guides are trained for it on the plain ELBO.",
        ("frozen-ffg", "frozen-ffg-large", "frozen-flow"),
        (
            ("FFG - large FFG", AMORTIZATION, "frozen-ffg", "frozen-ffg-large"),
            ("FFG - flow", AMORTIZATION, "frozen-ffg", "frozen-flow"),
            ("FFG - flow", APPROXIMATION, "frozen-ffg", "frozen-flow"),
        ),
    ),
    "cifar": Study(
        "A subset of CIFAR-10",
        "One bit per channel, a convolutional model, 9,000 training images that were coded as JPEG: for the shape of "
        "the result, not for comparison of nats with others.",
        ("cifar-ffg", "cifar-flow"),
        (
            ("FFG - flow", APPROXIMATION, "cifar-ffg", "cifar-flow"),
            ("FFG - flow", AMORTIZATION, "cifar-ffg", "cifar-flow"),
        ),
    ),
}


def study_recipe(study: str, column: str, options: argparse.Namespace) -> Recipe:
    """The recipe of a column: its own family alone is refined, for the number of epochs and images asked for."""
    recipe = column_recipe(column.replace("frozen-", "mnist-"), options.num_epochs, options.num_images)
    assert recipe.training is not None
    if study == "frozen":
        training = replace(recipe.training, freeze_model=True, entropy_annealing=0)
        recipe = replace(recipe, training=training, model_checkpoint=str(options.decoder))
    if study == "cifar":
        recipe = column_recipe(column, options.num_epochs or 30, options.num_images or 64)
        # A convolutional decoder makes an image some fifty times as expensive.
        refinement = replace(recipe.refinement, num_steps=300)
        recipe = replace(recipe, data=resolve(read_document("cifar-subset")).data, refinement=refinement)
    return replace(recipe, families={})


def row(study: str, column: str, recipe: Recipe, options: argparse.Namespace) -> dict[str, object]:
    """A column as a row of the CSV. One whose training diverged has its reason in place of numbers."""
    folder = options.runs / column
    facts = {"study": study, "column": column, "status": "done", **settings_of(recipe)}
    try:
        model, guide, data = trained(recipe, folder, progress=False)
        numbers: dict[str, object] = {}
        for part in PARTS:
            ledger = evaluated(recipe, folder, model, guide, data, part)
            numbers |= {f"{part}_{key}": value for key, value in own_statistics(ledger)}
        numbers |= certified(recipe, folder, model, guide, data, options.num_simulated)
    except (FloatingPointError, pg.InputError) as error:
        return {**facts, "status": " ".join(str(error).split())}
    return {**facts, **numbers, "machine": keep_noted(folder / "machine.txt", machine)}


def own_statistics(ledger: GapLedger) -> Iterator[tuple[str, float]]:
    """Means over images of the tree's quantities."""
    per = ledger.per_datapoint.sel(family="own")
    yield from means({name: (per[name].values, per[f"{name}_mcse"].values) for name in QUANTITIES})
    yield "num_images", len(per["datapoint"])
    yield "converged", float(per["converged"].mean())


def page(table: pd.DataFrame) -> str:
    """The studies in Markdown, for the columns that are measured."""
    shown = table[table["status"] == "done"]
    total = sum(len(study.columns) for study in STUDIES.values())
    lines = [
        "# Further findings on inference suboptimality",
        "",
        f"By `python -m benchmarks.{NAME}`. **{len(shown)} of {total} columns measured.** In nats; ± is the standard "
        "error over images; gaps are those of the guide's own family. A difference is positive where a finding holds; "
        "it holds where all its differences on test images lie two standard errors above 0.",
        "",
        f"- Seed {several(table, 'seed')}. Made on: {several(table, 'machine', '; ') or 'nothing measured yet'}.",
        "",
    ]
    for name, study in STUDIES.items():
        lines += [f"## {study.title}", "", study.question, "", *_study(shown[shown["study"] == name], study), ""]
    flagged = table[table["status"] != "done"]
    lines += [f"- {row['column']}: {row['status']}" for _, row in flagged.iterrows()]
    return "\n".join(lines).rstrip() + "\n"


def _study(rows: pd.DataFrame, study: Study) -> Iterator[str]:
    if not len(rows):
        yield "Not measured yet."
        return
    budget = "{} epochs, {} test and {} training images, {} refinement steps".format(
        *(several(rows, key) for key in ("num_epochs", "test_num_images", "train_num_images", "refinement_steps"))
    )
    flow = several(rows, "flow_hidden")
    yield f"Budget: {budget}" + (f"; coupling networks of the flow {flow}." if flow else ".")
    head = ["column", "images", "encoder", *(HEADS[name] for name in QUANTITIES), "converged", "BDMC sandwich"]
    yield from ("", "| " + " | ".join(head) + " |", "|" + "---|" * len(head))
    for _, row in rows.iterrows():
        for part in PARTS:
            cells = [f"{row[f'{part}_{name}']:.2f} ± {row[f'{part}_{name}_se']:.2f}" for name in QUANTITIES]
            cells.append(f"{row[f'{part}_converged']:.0%}")
            cells.append(f"{row['sandwich_width']:.3f} ± {row['sandwich_width_mcse']:.3f}" if part == "test" else "")
            yield f"| {row['column']} | {part} | {row['encoder_hidden']} | " + " | ".join(cells) + " |"
    yield ""
    missing = [column for column in study.columns if column not in set(rows["column"])]
    if missing:
        yield f"Not judged: {', '.join(missing)} not measured yet."
        return
    test, train = Table(rows, "test"), Table(rows, "train")
    found: list[Margin] = []
    lines = ["| difference | test images | training images |", "|---|---|---|"]
    for words, quantity, first, second in study.differences:
        terms = (1, first, quantity), (-1, second, quantity)
        pair = [of.combined(f"{words}, {LABELS[quantity]}", *terms) for of in (test, train)]
        lines.append(f"| {pair[0].what} | " + " | ".join(f"{one.value:.2f} ± {one.error:.2f}" for one in pair) + " |")
        found.append(pair[0])
    yield from (f"**{verdict(found)}**", "", *lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", help=f"of {', '.join(STUDIES)} (default: all)")
    parser.add_argument("--runs", type=Path, default=RUNS / NAME)
    parser.add_argument(
        "--decoder",
        type=Path,
        default=RUNS / FILES["auxiliary"] / "mnist-ffg" / "checkpoint.pt",
        help="weights of the frozen decoder (default: those of the table's column mnist-ffg)",
    )
    parser.add_argument("--num_epochs", type=int, help="in place of 100 (MNIST) and 30 (CIFAR-10)")
    parser.add_argument("--num_images", type=int, help="of each part, in place of 1,000 (MNIST) and 64 (CIFAR-10)")
    parser.add_argument("--num_simulated", type=int, default=64, help="images simulated for the BDMC sandwich")
    options = parser.parse_args()
    if unknown := sorted({*options.studies} - {*STUDIES}):
        parser.error(f"no study {unknown[0]}; there are {', '.join(STUDIES)}")
    rows: dict[tuple[str, str], dict[str, object]] = {}
    for chosen in (False, True):
        for study, settings in STUDIES.items():
            for column in settings.columns:
                finished = (options.runs / column / "sandwich.json").exists()
                # Finished columns of other studies first: they are in every table that is written.
                if (study in (options.studies or STUDIES)) is chosen and (chosen or finished):
                    wanted = study_recipe(study, column, options)
                    recipe = wanted if chosen else kept_recipe(options.runs / column)
                    rows[study, column] = row(study, column, recipe, options)
                    write(rows)


def write(rows: dict[tuple[str, str], dict[str, object]]) -> None:
    """The CSV and the page of the columns so far, in the order of the studies."""
    order = [(study, column) for study, settings in STUDIES.items() for column in settings.columns]
    table = pd.DataFrame([rows[key] for key in order if key in rows])
    write_file(RESULTS / f"{NAME}.csv", table.to_csv(index=False).encode())
    write_file(RESULTS / f"{NAME}.md", page(table).encode())
    print(f"{len(table)} columns", flush=True)


if __name__ == "__main__":
    main()
