"""What a problem says of what is left out of its densities."""

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.density.remarks import WRITTEN

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))


class Linear(nn.Module):
    """q(z | x), with modules that training would treat differently and with scales."""

    def __init__(self, *layers: nn.Module, scale: float | None = None) -> None:
        super().__init__()
        self.net, self.scale = nn.Sequential(*layers, nn.Linear(3, 2)), scale

    def forward(self, x: Tensor) -> None:
        with pyro.plate("d", len(x)), poutine.scale(scale=self.scale or 1.0):
            pyro.sample("z", dist.Normal(self.net(x), 0.8).to_event(1))


def model_of(prior: Any = 1.0, likelihood: Any = 1.0, size: int | None = None) -> Any:
    def model(x: Tensor) -> None:
        with pyro.plate("d", size or len(x), subsample_size=len(x) if size else None):
            with poutine.scale(scale=prior):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with poutine.scale(scale=likelihood):
                pyro.sample("x", dist.Normal(z @ torch.ones(2, 3), 1.0).to_event(1), obs=x)

    return model


def test_scales_are_named_and_left_out() -> None:
    torch.manual_seed(0)
    guide = Linear(scale=4.0)
    problem = pg.Problem.of(model_of(4.0), guide, X)
    assert problem.remarks == tuple(
        f"the scale 4 at 'z' in the {what} is ignored: {WRITTEN}" for what in ("model", "guide")
    )
    plain = Linear()
    plain.load_state_dict(guide.state_dict())
    kept, expected = pg.elbo(problem).value, pg.elbo(model_of(), plain, X).value
    torch.testing.assert_close(kept, expected, rtol=0, atol=0)


def test_scales_of_a_tensor_and_of_several_sites() -> None:
    scale = torch.linspace(0.1, 0.7, 6)[:, None].squeeze(-1)
    guide = Linear()

    def model(x: Tensor) -> None:
        model_of(1.0, scale[: len(x)] if len(x) == 6 else 0.1)(x)

    assert pg.Problem.of(model, guide, X).remarks == (
        f"the scales from 0.1 to 0.7 at 'x' in the model are ignored: {WRITTEN}",
    )
    assert pg.Problem.of(poutine.scale(model_of(), 0.25), guide, X).remarks == (
        f"the scale 0.25 at 'z' and 'x' in the model is ignored: {WRITTEN}",
    )
    assert pg.Problem.of(poutine.scale(model_of(size=6), 0.25), poutine.scale(guide, 0.5), X).remarks == (
        f"the scale 0.25 at 'z' and 'x' in the model is ignored: {WRITTEN}",
        f"the scale 0.5 at 'z' in the guide is ignored: {WRITTEN}",
    )


def test_subsampled_plates_are_no_scale() -> None:
    assert pg.Problem.of(model_of(size=6), Linear(), X).remarks == ()
    guide = pyro.infer.autoguide.AutoNormal(model_of(size=6))
    guide(X)
    assert pg.Problem.of(model_of(size=6), guide, X).remarks == ()


@pytest.mark.parametrize(
    ("layer", "remark"),
    [
        (nn.Dropout(0.2), "dropout in the guide is off (evaluation mode)"),
        (nn.BatchNorm1d(3), "batch normalisation in the guide uses its running statistics (evaluation mode)"),
        (nn.Dropout(0.0), None),
        (nn.LayerNorm(3), None),
    ],
)
def test_modules_in_evaluation_mode_are_named(layer: nn.Module, remark: str | None) -> None:
    guide = Linear(layer)
    assert pg.Problem.of(model_of(), guide, X).remarks == (() if remark is None else (remark,))
    assert layer.training


def test_what_depends_on_the_batch_is_refused() -> None:
    with pytest.raises(pg.InputError, match="no batch statistics"):
        pg.Problem.of(model_of(), Linear(nn.BatchNorm1d(3, track_running_stats=False)), X)


@pytest.mark.usefixtures("brief_check")
def test_a_ledger_prints_and_keeps_them(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"refinement": pg.Refinement(num_steps=20), "evidence": pg.AIS(4, 5)}
    ledger = pg.decompose(model_of(4.0), Linear(), X, num_particles=50, progress=False, **settings)
    remark = f"the scale 4 at 'z' in the model is ignored: {WRITTEN}"
    assert ledger.provenance["remarks"] == [remark]
    note = f"Note: {remark[0].upper()}{remark[1:]}."
    assert note in str(ledger).splitlines() and note.removeprefix("Note: ") in str(ledger.table("full")).splitlines()
    assert f"Note: {remark}." in str(ledger.diagnose()).splitlines()
    ledger.to_datatree().to_netcdf(tmp_path / "gaps.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "gaps.nc", engine="h5netcdf") as tree:
        again = pg.GapLedger.from_datatree(tree.load())
    assert note in str(again).splitlines()
    assert again.diagnose().remarks == (remark,)


# Randomness beyond the sites, which no evaluation mode switches off.


def noisy_model(x: Tensor) -> None:
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = nn.functional.dropout(z @ torch.ones(2, 3), 0.5)
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


class Noisy(Linear):
    def forward(self, x: Tensor) -> None:
        super().forward(nn.functional.dropout(x, 0.5))


class NoisyDelta(nn.Module):
    def forward(self, x: Tensor) -> None:
        with pyro.plate("d", len(x)):
            pyro.sample("z", dist.Delta(nn.functional.dropout(x[:, :2], 0.5), event_dim=1))


@pytest.mark.parametrize("plate", [None, False])
def test_functional_dropout_is_refused(plate: Any) -> None:
    with pytest.raises(pg.InputError, match=r"model: it is random beyond its sample sites: log p.*Switch dropout off"):
        pg.Problem.of(noisy_model, Linear(), X, plate)
    with pytest.raises(pg.InputError, match=r"guide: it is random beyond its sample sites: log q .*Switch dropout off"):
        pg.Problem.of(model_of(), Noisy(), X, plate)
    with pytest.raises(pg.InputError, match=r"site 'z': the guide's Delta is random beyond .* switch dropout off"):
        pg.Problem.of(model_of(), NoisyDelta(), X, plate)
