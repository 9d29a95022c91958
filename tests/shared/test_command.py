"""The command on a hierarchy: trained, measured, stopped and continued."""

import json

import numpy as np
import pytest
import xarray as xr
import yaml

from pyrogaps.cli.main import main

MODULE = """
import pyro, pyro.distributions as dist, torch

class Data:
    def __init__(self):
        self.train = torch.randn(30, generator=torch.Generator().manual_seed(0)) + 1
        self.test = self.train[:8]

def model(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)

class Guide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loc, self.scale = torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.zeros(()))
        self.net = torch.nn.Linear(1, 2)

    def forward(self, x):
        m = pyro.sample("m", dist.Normal(self.loc, self.scale.exp()))
        loc, scale = self.net(x[:, None]).unbind(-1)
        with pyro.plate("d", len(x)):
            pyro.sample("z", dist.Normal(loc + 0.2 * m, scale.exp()))
"""
RECIPE = {
    "data": {"class_path": "globals_.Data"},
    "model": "globals_.model",
    "guide": "globals_.Guide",
    "training": {"num_epochs": 3, "batch_size": 30, "learning_rate": 0.01},
    "shared": {"num_draws": 2, "max_draws": 128},
    "refinement": {"num_steps": 20},
    "referee": False,
    "num_particles": 50,
}


def test_from_training_to_the_ledger(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path_factory.mktemp("hierarchy")
    monkeypatch.chdir(folder)
    (folder / "globals_.py").write_text(MODULE)
    (folder / "mine.yaml").write_text(yaml.safe_dump(RECIPE))
    assert main(["mine.yaml", "--out", "out", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "standard error over datapoints and 2 draws of m" in printed
    tree = xr.open_datatree(folder / "out" / "ledger.nc", engine="h5netcdf")
    provenance = json.loads(tree.attrs["pyrogaps"])
    assert provenance["shared"]["num_draws"] == 2
    assert tree["shared_latents"]["elbo"].dims == ("draw",)
    assert np.isfinite(tree["shared_latents"]["global_gap_lower"].item())
    assert not (folder / "out" / "parts").exists()
