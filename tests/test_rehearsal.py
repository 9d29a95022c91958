"""What can be known before training is refused before training; a setting that is mended does not cost the training."""

import sys
from pathlib import Path

import pytest
import xarray as xr
import yaml

import pyrogaps as pg
from pyrogaps.cli import stages
from pyrogaps.eval import main
from tests.commands import MODULE, RECIPE

MAPA = ["--mapa.likelihood", "gaussian", "--mapa.bandwidth", "1.0"]
FURTHER = """

class NanData(Data):
    def __init__(self):
        super().__init__()
        self.test = self.test.clone()
        self.test[-1, 0] = float("nan")


class NanTraining(Data):
    def __init__(self):
        super().__init__()
        self.train = self.train.clone()
        self.train[-1, 0] = float("nan")


class HugeTraining(Data):
    def __init__(self):
        super().__init__()
        self.train = self.train * 1e30


class Pairs(torch.utils.data.Dataset):
    def __init__(self):
        self.x = Data().train

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index].numpy()}


class Parts:
    def __init__(self):
        self.train, self.test = Pairs(), torch.utils.data.DataLoader(Pairs(), batch_size=7)


class Wider(Data):
    def __init__(self):
        super().__init__()
        self.test = torch.cat([self.test, self.test], 1)


def broken_family(model):
    raise RuntimeError("out of cheese")


def guide_of_another_site(x):
    with pyro.plate("data", len(x)):
        pyro.sample("elsewhere", pyro.distributions.Normal(torch.zeros(2), 1.0).to_event(1))
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "mine.py").write_text(MODULE + FURTHER)
    (tmp_path / "linear.yaml").write_text(yaml.safe_dump(RECIPE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return "linear.yaml"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--families.x", "mine.broken_family"], "out of cheese"),
        (["--data", "mine.NanData"], "NaN"),
        (["--data", "mine.NanTraining"], "NaN"),
        (["--data", "mine.Wider"], "site 'x'"),
        (["--max_memory", "1MiB"], "max_memory"),
        (["--plate", "nowhere"], "plate"),
        (["--guide", "mine.guide_of_another_site"], "site"),
        (["--families", "{own: pyro.infer.autoguide.AutoNormal}"], "'own'"),
        (["--families.x", "pyro.infer.autoguide.AutoMultivariateNormal"], "AutoMultivariateNormal"),
        (["--evidence.num_temperatures", "100000000000"], "at most 1000000"),
        (["--evidence.num_pilot_chains", "100000000000"], "at most 10000"),
        (["--training.objective.class_path", "pyro.infer.JitTrace_ELBO"], "training: objective JitTrace_ELBO failed"),
        (["--training.objective.class_path", "pyro.infer.TraceTailAdaptive_ELBO"], "TraceTailAdaptive_ELBO failed"),
        (
            ["--guide", "pyro.infer.autoguide.AutoNormal", "--training.batch_size", "100"],
            "Set evaluate: {part: train, num_datapoints: null}",
        ),
        ([*MAPA, "--mapa.num_top", "5000"], "mapa: MAPA_IWAE_ELBO: num_top=5000"),
        ([*MAPA, "--mapa.num_neighbours", "5000"], "mapa: num_neighbours: must be from 1 to N = 100"),
        ([*MAPA, "--mapa.num_samples", "5000"], "mapa: MAPA_IWAE_ELBO: num_samples=5000 is too large"),
        ([*MAPA, "--plate", "false"], "mapa: plate is false"),
        (["--data", "mine.HugeTraining"], "Expected parameter scale"),
        ([*MAPA, "--data", "mine.HugeTraining"], "Expected parameter scale"),
        (["--certificate.num_simulated", "100000000000"], "certificate.num_simulated: 100,000,000,000 datapoints"),
    ],
)
def test_what_can_be_known_is_refused_before_training(
    recipe: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train", "train_by_mapa"):
        monkeypatch.setattr(stages, name, lambda *args, **settings: pytest.fail("it was trained first"))
    assert main([recipe, "--quiet", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pyrogaps: ")]
    assert said in line
    assert not Path("runs").exists()


def test_a_mended_setting_keeps_the_training(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = stages.decompose

    def refuse(*args: object, **settings: object) -> pg.GapLedger:
        raise pg.InputError("num_particles: refused after the training")

    monkeypatch.setattr(stages, "decompose", refuse)
    assert main([recipe, "--quiet"]) == 2
    weights = Path("runs/linear/checkpoint.pt").read_bytes()
    monkeypatch.setattr(stages, "decompose", measure)
    monkeypatch.setattr(stages, "train", lambda *args, **settings: pytest.fail("it was trained again"))
    assert main([recipe, "--quiet", "--seed", "5"]) == 2  # that is another training
    assert "different recipe (seed)" in capsys.readouterr().err
    assert main([recipe, "--quiet", "--num_particles", "40", "--max_memory", "6GiB"]) == 0
    assert Path("runs/linear/checkpoint.pt").read_bytes() == weights
    assert yaml.safe_load(Path("runs/linear/recipe.yaml").read_text())["num_particles"] == 40
    # What changes no result is no other recipe, and what is finished stays as it is.
    assert main([recipe, "--quiet", "--num_particles", "40", "--max_memory", "7GiB", "--batch_size", "64"]) == 0
    assert main([recipe, "--quiet", "--num_particles", "50"]) == 2


@pytest.mark.parametrize("data", ["mine.Pairs", "mine.Parts"])
def test_data_sets_of_torch(recipe: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--evaluate.num_datapoints", "5", "--training.num_epochs", "1"]
    assert main([recipe, "--quiet", "--data", data, *few]) == 0, capsys.readouterr().err
    ledger = xr.open_datatree("runs/linear/ledger.nc", engine="h5netcdf")["per_datapoint"]
    assert len(ledger.datapoint) == 5
    tensors = main(
        [recipe, "--quiet", "--data", "mine.Data", "--evaluate.part", "train", *few, "--out", "runs/tensors"]
    )
    assert tensors == 0
    other = xr.open_datatree("runs/tensors/ledger.nc", engine="h5netcdf")["per_datapoint"]
    for name, values in other.items():
        assert values.equals(ledger[name]), name
