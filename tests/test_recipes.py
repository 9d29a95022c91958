"""Recipes that extend others, and what the command says to flows that cannot be used."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from pyrogaps.cli.building import build_families, build_programs
from pyrogaps.cli.documents import read_document
from pyrogaps.cli.recipe import resolve
from pyrogaps.cli.run_folder import RunFolder
from pyrogaps.errors import InputError
from pyrogaps.eval import main
from pyrogaps.gaps import GapLedger
from pyrogaps.guides.auxiliary_flows import AmortizedAuxiliaryFlow, AutoLocalAuxiliaryFlow
from pyrogaps.guides.flows import AmortizedFlow

DATA = "--data.init_args.num_train 60 --data.init_args.num_validation 10 --data.init_args.num_test 4"
SMALL = f"{DATA} --evaluate.num_datapoints 4 --quiet"
FLOW = "--guide.class_path pyrogaps.guides.flows.AmortizedFlow"


def recipe_file(folder: Path, name: str, document: object) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


def test_mappings_merge_and_everything_else_is_replaced(tmp_path: Path) -> None:
    path = recipe_file(
        tmp_path,
        "mine",
        {
            "extends": "digits",
            "guide": {"class_path": "pyrogaps.guides.flows.AmortizedFlow", "init_args": {"hidden": [16, 16]}},
            "training": {"num_epochs": 3},
            "families": {"full-covariance": None},
        },
    )
    recipe, base = resolve(read_document(path)), resolve(read_document("digits"))
    assert recipe.guide is not None
    assert recipe.guide.init_args == {"data_dim": 64, "latent_dim": 8, "hidden": [16, 16]}
    assert recipe.training is not None
    assert (recipe.training.num_epochs, recipe.training.kl_warmup) == (3, 20)
    assert list(recipe.families) == ["mean-field"]
    assert recipe.model == base.model


def test_files_extend_files_beside_them(tmp_path: Path) -> None:
    recipe_file(tmp_path, "base", {"extends": "digits", "seed": 3})
    path = recipe_file(tmp_path, "mine", {"extends": "base.yaml", "num_particles": 50})
    recipe = resolve(read_document(path))
    assert (recipe.seed, recipe.num_particles, recipe.batch_size) == (3, 50, None)


def test_a_circle_is_refused(tmp_path: Path) -> None:
    recipe_file(tmp_path, "one", {"extends": "two.yaml"})
    path = recipe_file(tmp_path, "two", {"extends": "one.yaml"})
    with pytest.raises(InputError, match="extends itself"):
        read_document(path)


@pytest.mark.parametrize(("base", "said"), [("nothing", "no recipe 'nothing'"), (3, "extends: expected the name")])
def test_bases_that_are_none(base: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        read_document(recipe_file(tmp_path, "mine", {"extends": base}))


@pytest.mark.parametrize("data", ["mnist", "fashion"])
@pytest.mark.parametrize("setting", ["", "-large", "-no-anneal"])
@pytest.mark.parametrize(("flow", "guide"), [("flow", AmortizedAuxiliaryFlow), ("coupling", AmortizedFlow)])
def test_columns_differ_as_they_should(data: str, setting: str, flow: str, guide: type) -> None:
    ffg, column = (resolve(read_document(f"{data}-{name}{setting}")) for name in ("ffg", flow))
    assert (ffg.data, ffg.model, ffg.training) == (column.data, column.model, column.training)
    assert (list(ffg.families), list(column.families)) == (["flow"], ["mean-field"])
    assert isinstance(build_programs(column)[1], guide)
    assert ffg.training is not None
    assert ffg.training.entropy_annealing == (0 if setting == "-no-anneal" else 12)


@pytest.mark.parametrize(("data", "setting"), [("mnist", ""), ("fashion", "-large"), ("cifar", "")])
def test_the_optimal_flow_is_of_one_family_in_every_column(data: str, setting: str) -> None:
    """L[q*_Flow] of a model trained with FFG is of the family that the flow's own column is trained with."""
    ffg, flow = (resolve(read_document(f"{data}-{name}{setting}")) for name in ("ffg", "flow"))
    model, guide = build_programs(flow)
    further = build_families(ffg)["flow"](model)
    assert isinstance(guide, AmortizedAuxiliaryFlow)
    own = guide.local_family(model)
    assert isinstance(further, AutoLocalAuxiliaryFlow)
    assert (further._num_steps, further._hidden) == (own._num_steps, own._hidden) == (2, 200)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--guide.class_path pyrogaps.guides.flows.AmortisedFlow", "Did you mean 'AmortizedFlow'?"),
        (f"{FLOW} --guide.init_args.num_steps 0", "a flow needs at least one step"),
        (f"{FLOW} --training.learning_rate 1e9 --training.num_epochs 20", "training diverged (epoch"),
    ],
)
def test_flows_that_cannot_be_used(options: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["digits", *SMALL.split(), *options.split(), "--out", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1]
    assert sum(line.startswith("pyrogaps:") for line in lines) == 1
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.name not in ("recipe.yaml", "run.json")]


def test_weights_of_another_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = "--training.num_epochs 1 --evidence.temperatures [2] --refinement.num_steps 2 --num_particles 4"
    run = str(tmp_path / "run")
    assert main(["digits", *SMALL.split(), *short.split(), "--families", "{}", "--out", run]) == 0
    again = [*SMALL.split(), *FLOW.split(), "--checkpoint", f"{run}/checkpoint.pt", "--out", str(tmp_path / "other")]
    assert main(["digits", *again]) == 2
    assert "the file does not fit AmortizedFlow" in capsys.readouterr().err


def test_folder_of_an_older_recipe_is_taken_up(tmp_path: Path) -> None:
    """A field that came later stands at its default in a recipe that does not know it."""
    text = resolve(read_document("digits")).to_yaml()
    older = {name: value for name, value in yaml.safe_load(text).items() if name != "conditioning"}
    folder = RunFolder(tmp_path)
    folder.claim(yaml.safe_dump(older), overwrite=False)
    folder.write("checkpoint.pt", lambda file: file.write(b"weights"))
    folder.claim(text, overwrite=False)
    with pytest.raises(InputError, match=r"another run is writing there\. Wait for it, or choose another --out"):
        RunFolder(tmp_path).claim(text, overwrite=False)
    folder.release()
    with pytest.raises(InputError, match=r"different recipe \(seed\)"):
        RunFolder(tmp_path).claim(text.replace("seed: 0", "seed: 7"), overwrite=False)


@pytest.fixture
def few_chorales(tmp_path: Path) -> list[str]:
    """Options that make of the recipe `chorales` a run of seconds, on a file of short ones."""
    part = [[[60, 64], [62], [], [64, 67]][:steps] for steps in (4, 2, 3, 1)]
    (tmp_path / "few.json").write_text(json.dumps({"train": part, "valid": part, "test": part[:3]}))
    options = {
        "data.init_args.path": tmp_path / "few.json",
        "model.init_args": "{data_dim: 88, latent_dim: 2, emission_dim: 4, transition_dim: 4}",
        "guide.init_args.latent_dim": 2,
        "guide.init_args.rnn_dim": 4,
        "training.num_epochs": 1,
        "reference.num_epochs": 2,
        "evidence.num_temperatures": 2,
        "refinement.num_steps": 2,
        "num_particles": 4,
        "out": tmp_path / "run",
    }
    return ["chorales", "--quiet", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


def test_reference_measures_the_conditioning_gap_of_a_lookahead(few_chorales: list[str], tmp_path: Path) -> None:
    assert main(few_chorales) == 0
    summary = pd.read_csv(tmp_path / "run" / "summary.csv", index_col="quantity")["mean"]
    children = summary[["approximation_gap", "conditioning_gap", "amortization_gap"]]
    assert children.sum() == pytest.approx(summary["inference_gap"], abs=1e-4)
    assert not (tmp_path / "run" / "reference-training.pt").exists()


@pytest.mark.slow
def test_a_smoother_has_no_use_for_a_reference(
    few_chorales: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*few_chorales, "--guide.init_args.lookahead", "inf"]) == 0
    assert "reference has no effect, because the guide declares no finite lookahead" in capsys.readouterr().err
    assert "conditioning_gap" not in (tmp_path / "run" / "summary.csv").read_text()


def test_no_reference_is_the_default_and_null_takes_it_away() -> None:
    assert resolve(read_document("digits")).reference is None
    document = read_document("chorales")
    assert resolve(document).reference is not None
    assert resolve({**document, "reference": None}).reference is None


def test_a_reference_that_diverges(few_chorales: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = "--reference.learning_rate 1e30 --reference.num_epochs 20 --reference.clip_norm null"
    assert main([*few_chorales, *options.split()]) == 2
    assert "reference diverged" in capsys.readouterr().err.splitlines()[-1]


def test_rows_of_images_are_sequences() -> None:
    """MNIST as 28 steps: the images' own shape is that of sequences."""
    model, guide = build_programs(resolve(read_document("mnist-rows")))
    x = (torch.rand(2, 28, 28) > 0.5).float()
    assert tuple(guide(x).shape) == tuple(model(x).shape) == (2, 28, 8)


@pytest.fixture
def few_points(tmp_path: Path) -> list[str]:
    """Options that make of a recipe `mapa-…` a run of seconds."""
    options = {
        "data.init_args.num_train": 60,
        "data.init_args.num_validation": 30,
        "data.init_args.num_test": 9,
        "evaluate.num_datapoints": 6,
        "mapa.training.num_epochs": 2,
        "training.num_epochs": 2,
        "evidence": "{num_chains: 16, temperatures: [2]}",
        "refinement": "{num_steps: 3}",
        "num_particles": 8,
        "out": tmp_path / "run",
    }
    return ["--quiet", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


@pytest.mark.parametrize("curve", ["figure-8", "spiral-dots"])
def test_mapa_trains_the_model_and_then_the_guide(curve: str, few_points: list[str], tmp_path: Path) -> None:
    assert main([f"mapa-{curve}", *few_points]) == 0
    summary = pd.read_csv(tmp_path / "run" / "summary.csv", index_col="quantity")["mean"]
    children = summary[["approximation_gap", "amortization_gap"]]
    assert children.sum() == pytest.approx(summary["inference_gap"], abs=1e-4)
    assert not (tmp_path / "run" / "mapa-training.pt").exists()
    held = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["weights"]["modules"]
    recovered = next(module for module in held if "log_weights" in module)
    assert not torch.equal(recovered["means"], torch.zeros_like(recovered["means"]))


def test_without_an_encoder_mapa_trains_the_guide_too(few_points: list[str], tmp_path: Path) -> None:
    options = [*few_points, "--encoder", "null", "--training", "null", "--families", "{}"]
    model = "{class_path: pyrogaps.models.synthetic.SyntheticModel, init_args: {curve: circle}}"
    assert main(["mapa-circle", *options, "--model", model]) == 0
    held = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["weights"]["modules"]
    assert len(held) == 2


def test_mapa_that_does_not_fit(few_points: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for options, said in (
        (["--mapa", "null"], "only mapa uses an encoder. Set mapa too"),
        (["--mapa.bandwidth", "0"], "bandwidth"),
        (["--mapa.num_top", "61"], "num_top=61, but there are only 60 datapoints"),
        (["--encoder.class_path", "pyrogaps.guides.amortized.AmortizedNormal"], "a Normal in the encoder"),
        (["--mapa.training.learning_rate", "1e30", "--mapa.training.num_epochs", "30"], "mapa.training diverged"),
    ):
        assert main(["mapa-circle", *few_points, *options]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_retraining_splits_the_amortization_gap(few_points: list[str], tmp_path: Path) -> None:
    retraining = "{max_rounds: 1, num_datapoints: 20, training: {num_epochs: 1}}"
    assert main(["mapa-circle", *few_points, "--retraining", retraining]) == 0
    summary = pd.read_csv(tmp_path / "run" / "summary.csv", index_col="quantity")["mean"]
    children = summary[["capacity_gap", "optimization_gap", "generalization_gap"]]
    assert children.sum() == pytest.approx(summary["amortization_gap"], abs=1e-6)
    assert resolve(read_document("digits")).retraining is None


@pytest.mark.slow
def test_another_evidence_is_named_by_its_class(few_points: list[str], tmp_path: Path) -> None:
    ladder = ["--evidence.tolerance", "0.2", "--evidence.class_path", "pyrogaps.Ladder"]
    assert main(["mapa-circle", *few_points, *ladder]) == 0
    assert ", tolerance 0.2" in str(GapLedger.load(tmp_path / "run" / "ledger.nc").table("full"))


def test_a_certificate_is_asked_for_and_printed(few_points: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    certificate = "{num_simulated: 4, num_refined_again: 3}"
    assert main(["mapa-circle", *few_points, "--certificate", certificate]) == 0
    printed = capsys.readouterr().out
    assert "Certificate of log p(x), by BDMC on 4 datapoints" in printed
    assert "Certificate of the refinement: 4 times as many steps change the ELBO of 3 datapoints" in printed
