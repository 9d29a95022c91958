"""The benchmarks whose runs take hours, on digits and for seconds: that they run, continue, and write what they say."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from benchmarks import (
    half_images,
    inference_suboptimality,
    inference_suboptimality_length,
    peers,
    reporting,
    scvi_cells,
    suboptimality_studies,
    training,
    training_curves,
    two_dimensions,
)
from benchmarks.conditioning import __main__ as conditioning
from benchmarks.conditioning import chain, chorales, ledgers
from pyrogaps.cli.recipe import Recipe


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in the place of `benchmarks/results`."""
    for module in (
        conditioning,
        half_images,
        inference_suboptimality,
        inference_suboptimality_length,
        ledgers,
        reporting,
        scvi_cells,
        suboptimality_studies,
        training_curves,
        two_dimensions,
    ):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def small(column_recipe: Callable[..., Recipe], **settings: float) -> Callable[..., Recipe]:
    """Recipes of the same form as `column_recipe` makes, on digits, for one epoch and eight images."""

    def recipe(name: str, *options: object) -> Recipe:
        of = training_curves.on_digits(column_recipe(name, 1, 8, *options[2:]))
        assert of.model is not None
        assert of.training is not None
        data = replace(of.data, init_args={"num_train": 200, "num_validation": 50})
        return replace(of, data=data, training=replace(of.training, **settings))

    return recipe


def run(module: object, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", *map(str, arguments)])
    module.main()  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("flow", ["auxiliary", "coupling"])
def test_table_holds_every_column_and_computes_none_again(
    flow: str, monkeypatch: pytest.MonkeyPatch, results: Path, tmp_path: Path
) -> None:
    module = inference_suboptimality
    monkeypatch.setattr(module, "column_recipe", small(module.column_recipe))
    monkeypatch.setattr(module, "NUM_IWAE", 50)
    monkeypatch.setattr(module, "NUM_SIMULATED", 8)
    columns = module.columns_of(flow)[:2]
    options = "--flow", flow, "--runs", tmp_path / "runs", "--num_training_images", 5
    for column in columns:
        run(module, monkeypatch, column, *options)
    file = results / f"{module.FILES[flow]}.csv"
    table = pd.read_csv(file).set_index("column")
    assert tuple(table.index) == columns
    assert table["status"].str.startswith(("done", "flow not refined enough")).all()
    assert table[["test_num_images", "train_num_images"]].to_numpy().tolist() == [[8, 5], [8, 5]]
    for part in ("test", "train"):
        whole = table[f"{part}_approximation_gap"] + table[f"{part}_amortization_gap"]
        assert (whole - table[f"{part}_inference_gap"]).abs().max() < 1e-4
    page = file.with_suffix(".md").read_text()
    assert columns[1] in page
    assert "**2 of 12 columns measured.**" in page

    def again(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    for name in ("train", "decompose", "iwae", "bdmc"):
        monkeypatch.setattr(module.pg, name, again)
    for arguments in (columns, ["--write_only"]):
        run(module, monkeypatch, *arguments, *options)
        pd.testing.assert_frame_equal(pd.read_csv(file).set_index("column"), table)


def test_a_flow_below_the_ffg_is_not_done() -> None:
    numbers = {"test_flow_minus_ffg": -0.019, "train_flow_minus_ffg": 0.3}
    assert inference_suboptimality.status(numbers) == "done"
    assert "(test -0.021)" in inference_suboptimality.status({**numbers, "test_flow_minus_ffg": -0.021})
    assert "(train nan)" in inference_suboptimality.status({**numbers, "train_flow_minus_ffg": float("nan")})


def test_columns_measured_on_another_machine_stay(
    monkeypatch: pytest.MonkeyPatch, results: Path, tmp_path: Path
) -> None:
    module = inference_suboptimality
    monkeypatch.setattr(module, "column_recipe", small(module.column_recipe, learning_rate=1e30))
    for column, runs in (("mnist-flow", "there"), ("mnist-ffg", "here")):
        run(module, monkeypatch, column, "--runs", tmp_path / runs)
    table = pd.read_csv(results / "inference_suboptimality.csv")
    assert table["column"].tolist() == ["mnist-ffg", "mnist-flow"]


def test_column_that_diverged_is_flagged(monkeypatch: pytest.MonkeyPatch, results: Path, tmp_path: Path) -> None:
    module = inference_suboptimality
    monkeypatch.setattr(module, "column_recipe", small(module.column_recipe, learning_rate=1e30))
    run(module, monkeypatch, "mnist-ffg", "--runs", tmp_path / "runs")
    (status,) = pd.read_csv(results / "inference_suboptimality.csv")["status"]
    assert "the loss is nan" in status
    assert not (tmp_path / "runs" / "mnist-ffg" / "checkpoint.pt").exists()


@pytest.mark.slow
def test_length_of_training(monkeypatch: pytest.MonkeyPatch, results: Path, tmp_path: Path) -> None:
    """Stages are measured as they are reached, training goes on from the last one, and nothing is done again."""
    module = inference_suboptimality_length
    monkeypatch.setattr(module, "column_recipe", small(inference_suboptimality.column_recipe))
    monkeypatch.setattr(inference_suboptimality, "NUM_IWAE", 50)
    monkeypatch.setattr(module, "STAGES", (1, 2))
    monkeypatch.setattr(module, "ANNEALING", 1)
    options = "--num_simulated", 8, "--runs", tmp_path / "runs"
    run(module, monkeypatch, "--only", "train", "--num_epochs", 1, "--columns", "mnist-ffg", *options)
    run(module, monkeypatch, "--only", "train", "--num_epochs", 2, "--columns", "mnist-ffg", "mnist-flow", *options)
    run(module, monkeypatch, "--only", "measure", "--num_epochs", 1, *options)
    table = pd.read_csv(results / "inference_suboptimality_length.csv")
    assert table[["column", "epoch"]].to_numpy().tolist() == [["mnist-ffg", 1], ["mnist-flow", 1]]
    monkeypatch.setattr(module.pg, "train", None)
    run(module, monkeypatch, "--num_epochs", 2, "--columns", "mnist-ffg", *options)
    table = pd.read_csv(results / "inference_suboptimality_length.csv")
    assert table[["column", "epoch"]].to_numpy().tolist() == [["mnist-ffg", 1], ["mnist-ffg", 2], ["mnist-flow", 1]]
    text = (results / "inference_suboptimality_length.md").read_text()
    assert "**3 of 8 points measured.**" in text
    assert text.count("Not measured yet.") == 3
    assert (results / "inference_suboptimality_length.png").stat().st_size > 0
    history = torch.load(tmp_path / "runs" / "mnist-ffg" / "training" / "training.pt", weights_only=True)["run"]
    assert history["epoch"] == 2


def test_schedule_of_the_length_study_is_the_papers() -> None:
    recipe = inference_suboptimality_length.length_recipe("mnist-flow")
    training = recipe.training
    assert training is not None
    rates = [training.rate(epoch) for epoch in (0, 1, 3, 4, 1092, 1093, 3279)]
    assert rates == pytest.approx([1e-3 * 10 ** (-stage / 7) for stage in (0, 1, 1, 2, 6, 7, 7)])
    assert training.entropy_weight(200) == 0.5
    assert not inference_suboptimality_length.length_recipe("mnist-ffg-no-anneal").training.entropy_annealing


@pytest.mark.slow
def test_studies(monkeypatch: pytest.MonkeyPatch, results: Path, tmp_path: Path) -> None:
    """A guide for a frozen decoder; a study that is finished stays in the table."""
    module = suboptimality_studies
    monkeypatch.setattr(module, "column_recipe", small(inference_suboptimality.column_recipe))
    monkeypatch.setattr(inference_suboptimality, "NUM_IWAE", 50)
    studies = {"decoder": ("mnist-decoder-2",), "frozen": ("frozen-flow",)}
    for name, columns in studies.items():
        pairs = tuple(difference for difference in module.STUDIES[name].differences if {*difference[2:]} <= {*columns})
        monkeypatch.setitem(module.STUDIES, name, replace(module.STUDIES[name], columns=columns, differences=pairs))
    monkeypatch.delitem(module.STUDIES, "cifar")
    runs = tmp_path / "runs"
    options = "--num_simulated", 8, "--runs", runs, "--decoder", runs / "mnist-decoder-2" / "checkpoint.pt"
    run(module, monkeypatch, "decoder", *options)
    run(module, monkeypatch, "frozen", *options)
    table = pd.read_csv(results / "suboptimality_studies.csv")
    assert table["column"].tolist() == ["mnist-decoder-2", "frozen-flow"]
    assert (table["status"] == "done").all()
    decoders = []
    for column in table["column"]:
        modules = torch.load(runs / column / "checkpoint.pt", weights_only=True)["weights"]["modules"]
        decoders.append(next(iter(modules[0].values())))
    assert torch.equal(decoders[0], decoders[1])
    text = (results / "suboptimality_studies.md").read_text()
    assert "**2 of 2 columns measured.**" in text


def test_page_of_the_studies_judges_what_is_measured() -> None:
    module = suboptimality_studies
    rows = []
    for column, gap in (("mnist-decoder-0", 3.0), ("mnist-decoder-2", 2.0), ("mnist-decoder-4", 1.0), ("cifar-ffg", 1)):
        study = "cifar" if "cifar" in column else "decoder"
        facts = {"study": study, "column": column, "status": "done", "encoder_hidden": "200-200", "machine": "one"}
        facts |= {"sandwich_width": 0.1, "sandwich_width_mcse": 0.01, "seed": 0}
        for part in ("test", "train"):
            for name in module.QUANTITIES:
                facts |= {f"{part}_{name}": gap, f"{part}_{name}_se": 0.1}
            facts |= {f"{part}_num_images": 1000, f"{part}_converged": 1.0}
        rows.append(facts)
    text = module.page(pd.DataFrame(rows))
    assert "| 0 - 2 layers, approximation gap | 1.00 ± 0.14 | 1.00 ± 0.14 |" in text
    assert text.count("**holds**") == 1
    assert "Not judged: cifar-flow not measured yet." in text
    assert "Not measured yet." in text


@pytest.mark.usefixtures("brief_check")
def test_training_curves(monkeypatch: pytest.MonkeyPatch, results: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(training_curves, "PAIRS", {"standard": "mnist-ffg"})
    run(training_curves, monkeypatch, "--quick", "--runs", tmp_path / "runs")
    table = pd.read_csv(results / "training_curves-quick.csv")
    assert set(table["part"]) == {"train", "validation"}
    assert sorted(set(table["epoch"])) == [1, 2]
    assert (tmp_path / "runs" / "quick" / "training_curves.png").stat().st_size > 0


def in_the_plane(*_: object) -> Recipe:
    """The recipe mnist-2d on digits."""
    of = small(inference_suboptimality.column_recipe)("mnist-2d")
    plane = {"data_dim": 64, "latent_dim": 2}
    assert of.model is not None
    assert of.guide is not None
    return replace(
        of,
        model=replace(of.model, init_args={**of.model.init_args, **plane}),
        guide=replace(of.guide, init_args={**of.guide.init_args, **plane}),
        refinement=replace(of.refinement, num_steps=300),
    )


def test_training_speed(monkeypatch: pytest.MonkeyPatch, results: Path) -> None:
    """Every implementation trains the same networks to the same bound, at some speed."""
    run(training, monkeypatch, "--quick")
    table = pd.read_csv(results / "training-quick.csv")
    assert len(table) == 5
    assert (table[["median", "/ by hand", "/ SVI"]] > 0).all(axis=None)
    assert table["ELBO"].max() - table["ELBO"].min() < 0.02 * table["ELBO"].abs().max()


@pytest.mark.slow
def test_two_dimensions(monkeypatch: pytest.MonkeyPatch, results: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(two_dimensions, "column_recipe", in_the_plane)
    run(two_dimensions, monkeypatch, "--quick", "--runs", tmp_path / "runs")
    table = pd.read_csv(results / "two_dimensions-quick.csv")
    assert len(table) == 4
    assert (tmp_path / "runs" / "quick" / "two_dimensions.png").stat().st_size > 0


@pytest.mark.slow
def test_half_images(monkeypatch: pytest.MonkeyPatch, results: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(half_images, "column_recipe", in_the_plane)
    run(half_images, monkeypatch, "--quick", "--runs", tmp_path / "runs")
    table = pd.read_csv(results / "half_images-quick.csv")
    assert table["chosen for"].tolist() == ["largest gap", "upper quartile", "median", "least gap"]
    children = table[[f"{part}_gap, quadrature" for part in ("approximation", "conditioning", "amortization")]]
    assert (children.sum(axis=1) - table["inference_gap, quadrature"]).abs().max() < 1e-3
    assert (tmp_path / "runs" / "quick" / "half_images.png").stat().st_size > 0


@pytest.mark.slow
def test_ledgers_of_chorales(monkeypatch: pytest.MonkeyPatch, results: Path, tmp_path: Path) -> None:
    """On chorales made up: a row for each and every guide, and a conditioning gap for those that are not shown all."""
    part = torch.bernoulli(torch.full((4, 8, 88), 0.05)), torch.tensor([8, 3, 5, 8])
    made_up = SimpleNamespace(train=part, validation=part, test=part)
    monkeypatch.setattr(ledgers, "GROUPS", (5, 8))
    for module in (chorales, ledgers):
        monkeypatch.setattr(module, "Chorales", lambda: made_up)
    run(conditioning, monkeypatch, "--quick", "chorales", "ledgers", "--runs", tmp_path / "runs")
    table = pd.read_csv(results / "conditioning-quick.csv")
    gaps = table[table["quantity"] == "conditioning_gap per chorale"]
    assert gaps["guide"].tolist() == ["trained with lookahead 0", "trained with lookahead 2"]
    every = pd.read_csv(tmp_path / "runs" / "quick" / "chorales.csv")
    assert every.groupby("guide")["length"].apply(list).map(sorted).tolist() == 3 * [[3, 5, 8, 8]]
    gap = every["approximation_gap"] + every["conditioning_gap"].fillna(0) + every["amortization_gap"]
    assert (gap - every["inference_gap"]).abs().max() < 0.1  # as printed, five digits of some hundreds


def test_conditioning(monkeypatch: pytest.MonkeyPatch, results: Path, tmp_path: Path) -> None:
    """The chain alone: rows for what is finished, and none made again."""
    monkeypatch.setattr(chain, "CHAINS", {"unit": (1.0, 1.0, 1.0, 1.0, 1.0)})
    monkeypatch.setattr(chain, "LOOKAHEADS", (0,))
    for _ in range(2):
        run(conditioning, monkeypatch, "--quick", "chain", "--runs", tmp_path / "runs")
        table = pd.read_csv(results / "conditioning-quick.csv")
        assert len(table) == 3
        monkeypatch.setattr(chain, "rows", None)
    assert (tmp_path / "runs" / "quick" / "conditioning.png").stat().st_size > 0
    assert table["known"].round(4).tolist() == [0.6044, 0.6044, 0.0]


@pytest.mark.slow
def test_peers_are_measured_in_turns(monkeypatch: pytest.MonkeyPatch, results: Path, tmp_path: Path) -> None:
    """On digits; BlackJAX where it is installed."""
    cores = os.sched_getaffinity(0)
    run(peers, monkeypatch, "--quick", "--runs", tmp_path / "runs")
    assert os.sched_getaffinity(0) == cores
    table = pd.read_csv(results / "peers-quick.csv", index_col=0)
    own = {"ladder", "bridge sampling", "AIS from the prior (BDMC)", "IWAE from the guide", "IWAE-128 from the guide"}
    assert own <= {*table.index}
    assert table.loc["ladder", "error / ladder's"] == 1.0
    assert (table["rms error"] < 2).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::(?!pyrogaps)")
def test_cells_run(monkeypatch: pytest.MonkeyPatch, results: Path, tmp_path: Path) -> None:
    pytest.importorskip("scvi")
    run(scvi_cells, monkeypatch, "--quick", "--runs", tmp_path)
    table = pd.read_csv(results / "scvi_cells-quick.csv")
    assert table["model"].tolist() == list(scvi_cells.MODELS)
    assert (table["get_elbo"] - table["get_marginal_ll"] < 0).all()
    page = (results / "scvi_cells-quick.md").read_text()
    assert all(words in page for words in ("held out", "get_marginal_ll", *scvi_cells.MODELS))
