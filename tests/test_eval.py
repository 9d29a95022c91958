"""The command: recipes and overrides, mistakes and their exit codes, whole runs, and runs that are cut short."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import yaml

from pyrogaps.cli import stages
from pyrogaps.cli.building import build_families, build_programs, import_object
from pyrogaps.cli.documents import read_document, shipped
from pyrogaps.cli.recipe import resolve
from pyrogaps.cli.typed import Component
from pyrogaps.errors import InputError
from pyrogaps.eval import main
from pyrogaps.training.weights import read_file
from tests.commands import MODULE, RECIPE, RESULTS, command, ledger, parsed


@pytest.fixture(autouse=True)
def own_import_state(monkeypatch):
    """The command makes folders importable; each test has its own."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    yield
    sys.modules.pop("mine", None)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A user's recipe, beside the module it names, with another folder as the current one."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine.py").write_text(MODULE)
    path = tmp_path / "home" / "linear.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return str(path)


def refused(capsys, *arguments):
    """The one line with which the command turns `arguments` down."""
    assert main([*arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


# Recipes


def test_digits_is_the_default_and_needs_no_network():
    document, (recipe, options) = read_document("digits"), parsed([])
    assert recipe == resolve(document)
    assert str(options.out) == "runs/digits"
    assert recipe.data.class_path == "pyrogaps.datasets.Digits"


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_can_be_built(name):
    recipe = resolve(read_document(name))
    build_programs(recipe)
    build_families(recipe)
    assert callable(import_object("data", recipe.data.class_path))


@pytest.mark.parametrize("name", shipped())
def test_printed_recipe_is_a_recipe(name, tmp_path, capsys):
    changes = ["--training.schedule", "{class_path: pyrogaps.training.Exponential, init_args: {decay: 0.8}}"]
    changes += ["--training.schedule.init_args.decay", "0.9", "--seed=7", "--families.flow", "mine.Flow"]
    assert main([name, *changes, "--print_config"]) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    (again, _), (first, _) = parsed([str(path)]), parsed([name, *changes])
    assert again == first
    assert again.families["flow"] == Component("mine.Flow")
    assert main([str(path), "--print_config"]) == 0
    assert capsys.readouterr().out == printed


def test_printing_a_recipe_runs_nothing(tmp_path, capsys):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    names = {
        "model": "trap.Model", "guide": "trap.Guide", "data": "trap.Data", "families": {"x": "trap.family"},
        "evidence": {"class_path": "trap.Evidence", "init_args": {"depth": 3}},
        "training": {"num_epochs": 3, "schedule": {"class_path": "trap.Schedule"}, "objective": "trap.Objective"},
        "mapa": {"likelihood": "gaussian", "bandwidth": 1.0, "training": {"schedule": "trap.Schedule"}},
    }  # fmt: skip
    path = tmp_path / "strange.yaml"
    path.write_text(yaml.safe_dump(names))
    assert main([str(path), "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["training"]["schedule"] == {"class_path": "trap.Schedule"}
    assert printed["training"]["objective"] == "trap.Objective"
    assert printed["training"]["num_epochs"] == 3
    assert printed["mapa"]["training"]["schedule"] == "trap.Schedule"
    assert printed["evidence"] == names["evidence"]
    assert printed["refinement"]["num_steps"] == parsed(["digits"])[0].refinement.num_steps


@pytest.mark.parametrize(
    "data", ["{class_path: os.system, init_args: {command: touch ran}}", "subprocess.Popen", "builtins.exec"]
)
def test_python_itself_is_no_data_set(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["digits", "--data", data]) == 2
    assert "part of Python itself" in capsys.readouterr().err
    assert not Path("ran").exists()


def test_a_file_beside_a_recipe_takes_no_packages_place(recipe, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('not this one')")
    assert main([recipe, "--quiet"]) == 0


def test_a_recipe_that_extends_itself_by_another_spelling(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("extends: ./b.yaml\n")
    Path("b.yaml").write_text(f"extends: {tmp_path}/../{tmp_path.name}/a.yaml\n")
    assert main(["a.yaml"]) == 2
    assert "extends itself" in capsys.readouterr().err
    assert main(["x" * 5000]) == 2
    assert "no recipe" in capsys.readouterr().err


def test_overrides_reach_every_kind_of_field():
    recipe, options = parsed(
        [
            *("digits", "--training.num_epochs", "3", "--evidence.num_chains=20", "--data.init_args.num_test", "100"),
            *("--guide", "mine.guide", "--model.init_args.hidden", "[5, 6]", "--families", "{}", "--plate", "rows"),
            *(
                "--evaluate.part=train",
                "--training.learning_rate",
                "1e-4",
                "--refinement.num_steps=7",
                "--out",
                "there",
            ),
        ]
    )
    assert (recipe.training.num_epochs, recipe.training.learning_rate) == (3, 1e-4)
    assert (recipe.evidence.num_chains, recipe.refinement.num_steps) == (20, 7)
    assert recipe.data.init_args["num_test"] == 100
    assert recipe.model.init_args == {**read_document("digits")["model"]["init_args"], "hidden": [5, 6]}
    assert (recipe.guide, recipe.families) == (Component("mine.guide"), {})
    assert (recipe.plate, recipe.evaluate.part, options.out) == ("rows", "train", Path("there"))
    assert parsed(["digits", "--training", "null"])[0].training is None


def test_help_lists_recipes_options_and_fields(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in [*shipped(), "--checkpoint", "--overwrite", "--evidence.num_chains", "--training.num_epochs"]:
        assert word in text
    assert "CONFIG" not in text


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nosuch"], "digits"),
        (["digits", "mnist"], "unexpected argument 'mnist'"),
        (["--outt", "x"], "Did you mean --out?"),
        (["--num_epochs", "3"], "Did you mean --training.num_epochs?"),
        (["--training.num_epoch", "3"], "Did you mean 'num_epochs'?"),
        (["--training.num_epochs", "many"], "training.num_epochs: must be a whole number of at least 1, got 'many'"),
        (["--training.num_epochs", "0"], "training.num_epochs: must be a whole number of at least 1, got 0"),
        (["--training", "3"], "training: expected a mapping"),
        (["--training.schedule", "3"], "training.schedule: must be callable or None, got 3"),
        (["--mapa.training.num_epochs", "0"], "mapa.training.num_epochs: must be a whole number of at least 1, got 0"),
        (["--max_memory", "4XB"], "max_memory: must be a number of bytes such as 4GiB or 500MB or None, got '4XB'"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "null"], "seed: must be a whole number of 64 bits, got None"),
        (["--seed", "[1"], "--seed"),
        (["--overwrite=yes"], "takes no value"),
        (["--model", "null"], "a model and a guide are missing"),
        (["--pair", "mine.Pair"], "Set these to null"),
        (["--model", "VAE"], "not a dotted path"),
        (["--model", "nowhere.VAE"], "no module named 'nowhere'"),
        (["--model", "pyrogaps.models.vae.VEA"], "Did you mean 'VAE'?"),
        (["--model.init_args.hiden", "3"], "Did you mean 'hidden'?"),
        (["--model.init_args.latent_dim", "few"], "model.init_args.latent_dim: must be a whole number, got 'few'"),
        (["--families.x", "[1]"], "families.x: expected a dotted path"),
        (["--data", "null"], "data is missing"),
        (["--evaluate.part", "exam"], "has no part 'exam'"),
        (["--evaluate.num_datapoints", "99999"], "got 99999"),
        (["--device", "toaster"], "device: must be a device such as cpu, cuda or cuda:1, got 'toaster'"),
        (["--checkpoint", "missing.pt"], "checkpoint: no file missing.pt"),
        (["--model_checkpoint", "missing.pt"], "model_checkpoint: no file missing.pt"),
        (["--model_checkpoint", "a.pt", "--checkpoint", "b.pt"], "Set only one of checkpoint and model_checkpoint"),
        (["--training.freeze_model", "perhaps"], "training.freeze_model: must be True or False, got 'perhaps'"),
    ],
)
def test_mistakes_are_answered_in_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *arguments)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is not there")
def test_missing_cuda(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "Use --device cpu" in refused(capsys, "--device", "cuda")


@pytest.mark.parametrize(
    ("text", "said"),
    [("model: [", "not valid YAML"), ("- a\n- b", "mapping"), ("modle: x", "Did you mean 'model'?"), ("", "mapping")],
)
def test_bad_recipe_files(text, said, tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert said in refused(capsys, str(path))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "mine.Broken"], "RuntimeError: out of cheese (mine.py, line"),
        (["--model", "mine.Silent"], "cannot be called"),
        (["--model", "mine.Pair"], "Name an object with both .model and .guide under pair"),
        (["--model", "{class_path: mine.model, init_args: {a: 1}}"], "it takes no init_args"),
        (["--guide", "mine.Gide"], "Did you mean 'Guide'?"),
        (["--families.x", "{class_path: mine.autonormal, init_args: {init_scael: 1}}"], "Did you mean 'init_scale'?"),
        (["--data.init_args.scale", "big"], "data.init_args.scale: must be a number, got 'big'"),
    ],
)
def test_mistakes_in_a_users_module(recipe, arguments, said, capsys):
    assert said in refused(capsys, recipe, *arguments)


def test_module_that_cannot_be_imported(recipe, capsys):
    module = Path(recipe).with_name("mine.py")
    module.write_text("1 / 0")
    assert "ZeroDivisionError: division by zero (mine.py, line 1)" in refused(capsys, recipe)
    module.write_text("def f(:")
    assert "SyntaxError" in refused(capsys, recipe)


def test_missing_data_file(recipe, capsys):
    with Path(recipe).with_name("mine.py").open("a") as module:
        module.write("\ndef stored(path: str):\n    return open(path)\n")
    said = refused(capsys, recipe, "--data", "{class_path: mine.stored, init_args: {path: gone.npz}}")
    assert "FileNotFoundError" in said and "gone.npz" in said


def test_errors_of_our_own_keep_their_traceback(recipe, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a bug")

    monkeypatch.setattr(stages, "decompose", fail)
    with pytest.raises(AssertionError, match="a bug"):
        main([recipe, "--quiet", "--training", "null"])


# Building


def programs(path, **fields):
    document = read_document(path)
    for name in ("model", "guide"):
        document.pop(name)
    return build_programs(resolve({**document, **fields}))


@pytest.mark.parametrize("path", ["pyro.infer.autoguide.AutoNormal", "mine.autoguide"])
def test_guides_that_take_a_model_are_given_it(recipe, path):
    _, guide = programs(recipe, model="mine.Model", guide={"class_path": path, "init_args": {"init_scale": 0.5}})
    assert guide(torch.zeros(3, 4))["z"].shape == (3, 2)
    assert guide._init_scale == 0.5


@pytest.mark.parametrize("path", ["mine.Pair", "mine.make_pair"])
def test_pairs(recipe, path):
    model, guide = programs(recipe, pair=path)
    assert model.__self__ is guide.__self__


def test_families_with_arguments(recipe):
    entry = {"class_path": "mine.autonormal", "init_args": {"init_scale": "0.5"}}
    resolved = resolve({**read_document(recipe), "families": {"narrow": entry}})
    guide = build_families(resolved)["narrow"](build_programs(resolved)[0])
    assert guide._init_scale == 0.5


def test_pair_without_guide_is_refused(recipe):
    with pytest.raises(InputError, match="no method 'model'"):
        programs(recipe, pair="mine.Silent")


# Runs


def test_a_run_from_start_to_finish(recipe):
    run = command(recipe)
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    assert sorted(os.listdir("runs/linear")) == RESULTS
    assert "amortization" in run.stdout and "runs/linear/gaps.png" in run.stdout
    assert run.stderr == "training\ndecomposing the inference gap\n"  # no bars, which are for terminals
    values = ledger("runs/linear")
    assert values.sizes["datapoint"] == 70 and list(values["family"].values) == ["own", "mean-field"]
    assert np.isfinite(values["inference_gap"]).all()
    assert Path("runs/linear/gaps.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load(Path("runs/linear/recipe.yaml").read_text())["refinement"]["num_steps"] == 20


@pytest.mark.usefixtures("brief_check")
def test_what_follows_a_finished_run(recipe, capsys):
    assert main([recipe, "--quiet"]) == 0
    table = capsys.readouterr().out
    saved = ledger("runs/linear")

    written = {name: Path("runs/linear", name).read_bytes() for name in ("gaps.html", "gaps.png", "summary.csv")}
    assert f"python -m pyrogaps.eval {recipe} --quiet".encode() in written["gaps.html"]
    Path("runs/linear/gaps.png").unlink()
    Path("runs/linear/gaps.html").unlink()
    Path("runs/linear/summary.csv").write_bytes(b"")
    assert main([recipe, "--quiet"]) == 0
    again = capsys.readouterr()
    assert again.out == table and "already contains the results" in again.err
    assert sorted(os.listdir("runs/linear")) == RESULTS
    assert all(Path("runs/linear", name).read_bytes() == content for name, content in written.items())

    def unreadable(*arguments, **options):
        raise InputError("data: they were moved")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyrogaps.cli.stages.build_data", unreadable)
        assert main([recipe, "--quiet"]) == 0 and "moved" not in capsys.readouterr().err
        Path("runs/linear/gaps.html").unlink()
        assert main([recipe, "--quiet"]) == 0
        assert "gaps.html takes its datapoints from the ledger alone: data: they were moved" in capsys.readouterr().err
    assert Path("runs/linear/gaps.html").read_bytes() == written["gaps.html"]  # whose ledger has them

    assert main(["runs/linear/recipe.yaml"]) == 0
    assert capsys.readouterr().out == table

    said = refused(capsys, recipe, "--seed", "1")
    assert "different recipe (seed)" in said and "--out" in said and "--overwrite" in said
    xr.testing.assert_identical(ledger("runs/linear"), saved)

    assert main([recipe, "--checkpoint", "runs/linear/checkpoint.pt", "--out", "loaded", "--quiet"]) == 0
    assert "loading weights" in capsys.readouterr().err
    xr.testing.assert_allclose(ledger("loaded"), saved)

    assert main([recipe, "--seed", "1", "--overwrite", "--quiet"]) == 0
    assert not np.allclose(ledger("runs/linear")["elbo"], saved["elbo"])


@pytest.fixture
def weigh(monkeypatch, capsys):
    """Run the command up to the point where weights are written: what it said, and the folder's weights."""

    def stop(*_, **__):
        raise InputError("weighed")

    def run(*arguments, out):
        assert main([*arguments, "--families", "{}", "--quiet", "--out", out]) == 2
        said = capsys.readouterr().err
        return said, read_file(Path(out) / "checkpoint.pt")["weights"] if said.endswith("weighed\n") else None

    monkeypatch.setattr(stages, "decompose", stop)
    return run


def flat(weights):
    """All weights of the model, and all of the guide."""
    return [torch.cat([value.flatten() for value in module.values()]) for module in weights["modules"]]


FROM_FIRST = ("--model_checkpoint", "first/checkpoint.pt")
FROZEN = (*FROM_FIRST, "--training.freeze_model", "true", "--seed", "1")


def test_a_new_guide_for_a_frozen_model_of_another_run(recipe, weigh):
    model, guide = flat(weigh(recipe, out="first")[1])
    said, weights = weigh(recipe, *FROZEN, out="second")
    assert "loading the model's weights from first/checkpoint.pt\ntraining" in said
    same_model, other_guide = flat(weights)
    assert torch.equal(model, same_model) and not torch.equal(guide, other_guide)
    written = yaml.safe_load(Path("second/recipe.yaml").read_text())
    assert written["training"]["freeze_model"] is True and written["model_checkpoint"] == "first/checkpoint.pt"

    # Without the freeze training moves on from there; without training the guide stays as it was made.
    assert not torch.equal(flat(weigh(recipe, *FROM_FIRST, out="moving")[1])[0], model)
    fresh_model, fresh_guide = flat(weigh(recipe, *FROM_FIRST, "--training", "null", out="fresh")[1])
    assert torch.equal(fresh_model, model) and not torch.equal(fresh_guide, guide)


def test_model_weights_in_the_store(recipe, weigh):
    """Functions that register their parameters with Pyro when they run."""
    with Path(recipe).with_name("mine.py").open("a") as module:
        module.write(
            "\nfrom torch.distributions import constraints\n"
            "def decoding(x):\n"
            "    scale = pyro.param('scale', torch.ones(4), constraint=constraints.positive)\n"
            "    with pyro.plate('data', len(x)):\n"
            "        z = pyro.sample('z', dist.Normal(torch.zeros(4), 1.).to_event(1))\n"
            "        pyro.sample('x', dist.Normal(z, scale).to_event(1), obs=x)\n"
            "def encoding(x):\n"
            "    loc = pyro.param('loc', torch.zeros(4))\n"
            "    with pyro.plate('data', len(x)):\n"
            "        pyro.sample('z', dist.Normal(0.5 * x + loc, 0.5).to_event(1))\n"
        )
    programs = (recipe, "--model", "mine.decoding", "--guide", "mine.encoding")
    first, second = (weigh(*programs, *how, out=out)[1]["store"] for how, out in (((), "first"), (FROZEN, "second")))
    assert torch.equal(first["scale"], second["scale"]) and not torch.equal(first["loc"], second["loc"])
    assert "it contains too few modules" in weigh(recipe, *FROZEN, out="third")[0]
    weigh(recipe, "--training", "null", out="modules")
    said, _ = weigh(*programs, "--model_checkpoint", "modules/checkpoint.pt", out="fourth")
    assert "the file does not fit the model: it lacks 'scale'" in said


def test_model_weights_that_do_not_fit(recipe, weigh):
    weigh(recipe, "--training", "null", out="first")
    larger = [f"--{part}.init_args.latent_dim=3" for part in ("model", "guide")]
    said = weigh(recipe, *FROM_FIRST, *larger, out="larger")[0].splitlines()[-1]
    assert "model weights first/checkpoint.pt: the file does not fit Model" in said
    assert "'decoder.weight' has shape (4, 2) in the file, but (4, 3) here" in said

    document = {name: value for name, value in RECIPE.items() if name not in ("model", "guide")}
    Path("pair.yaml").write_text(yaml.safe_dump({**document, "pair": "mine.make_pair"}))
    (Path.cwd() / "mine.py").write_text(MODULE)
    assert "share a module" in weigh("pair.yaml", *FROM_FIRST, out="pair")[0]

    Path("damaged.pt").write_text("no weights")
    assert "damaged.pt: is damaged" in weigh(recipe, "--model_checkpoint", "damaged.pt", out="damaged")[0]


def test_pairs_and_data_options(recipe, capsys):
    document = {**RECIPE, "pair": "mine.make_pair", "evaluate": {"num_datapoints": 33}, "families": {}}
    Path("pair.yaml").write_text(yaml.safe_dump({k: v for k, v in document.items() if k not in ("model", "guide")}))
    (Path.cwd() / "mine.py").write_text(MODULE)
    assert main(["pair.yaml", "--quiet", "--data_root", "elsewhere"]) == 0
    assert "--data_root has no effect" in capsys.readouterr().err
    assert ledger("runs/pair").sizes["datapoint"] == 33


def test_data_options_reach_the_data_set_and_are_no_part_of_the_recipe(recipe, capsys):
    with Path(recipe).with_name("mine.py").open("a") as module:
        module.write(
            "\nclass Rooted(Data):\n    def __init__(self, root: str = '.', download: bool = False):\n"
            "        super().__init__(32 if (root, download) == ('there', True) else 64)\n"
        )
    chosen = [recipe, "--data", "mine.Rooted", "--quiet", "--training", "null", "--families", "{}"]
    assert main([*chosen, "--data_root", "there", "--download"]) == 0
    assert ledger("runs/linear").sizes["datapoint"] == 32
    assert main(chosen) == 0
    assert "already contains the results" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_killed_at_every_stage_continues_to_the_same_ledger(recipe):
    arguments = [recipe, "--quiet", "--training.num_epochs", "40"]
    for stage in ("training.pt", "parts/*.npz"):
        run = command(*arguments, "--out", "killed", INTERRUPT=f"SIGKILL killed/{stage}")
        assert run.returncode == -9
        assert not Path("killed/ledger.nc").exists()
    for folder in ("killed", "unbroken"):
        assert main([*arguments, "--out", folder]) == 0
        assert sorted(os.listdir(folder)) == RESULTS
    xr.testing.assert_identical(ledger("killed"), ledger("unbroken"))


def test_interrupted_run_says_how_to_continue(recipe):
    run = command(recipe, "--quiet", "--training.num_epochs", "100000", INTERRUPT="SIGINT runs/linear/training.pt")
    assert run.returncode == 130
    assert "Traceback" not in run.stderr
    assert run.stderr.strip().splitlines()[-1].endswith("run the same command again to continue from runs/linear")


def test_out_that_is_a_file(recipe, capsys):
    Path("out").write_text("a file")
    assert "cannot write to out" in refused(capsys, recipe, "--out", "out", "--training", "null")
