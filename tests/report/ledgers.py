"""Ledgers for the page: a small one that holds everything awkward, and large ones made of it."""

from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyrogaps as pg

EVIL = "$$x^2$$ <img src=x onerror=alert(1)></script>"
SITE = "y</script><script>alert(2)</script>"
IMPOSSIBLE = 5


def model(x: Tensor) -> None:
    """Posteriors with an edge, which no Gaussian fits; a datapoint of 0.9 or more has density 0."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Laplace(z[:, None].expand(x.shape), 0.3).to_event(1), obs=x)
        pyro.sample(SITE, dist.Uniform(torch.zeros(len(x)), 1.0, validate_args=False), obs=x[:, 0].abs() / 4)


class Guide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).T
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))


def data(number: int = 40) -> Tensor:
    x = torch.randn(number, 16, generator=torch.Generator().manual_seed(0)) * 0.5
    x[IMPOSSIBLE, 0] = 9.0
    return x


def awkward() -> pg.GapLedger:
    """40 datapoints, 4x4 images, of a further family with an evil name: one is impossible, some are unreliable."""
    evidence = pg.Ladder(tolerance=0.02, max_evaluations=800)
    settings = {"refinement": pg.Refinement(num_steps=20), "num_particles": 100, "referee": False, "progress": False}
    torch.manual_seed(0)
    return pg.decompose(model, Guide(), data(), families={EVIL: AutoNormal}, evidence=evidence, **settings)  # type: ignore[arg-type]


def repeated(ledger: pg.GapLedger, number: int) -> pg.GapLedger:
    """`ledger` with its finite datapoints repeated to `number`, all a little different."""
    finite = np.flatnonzero(np.isfinite(ledger.per_datapoint["elbo"].values))
    rows = ledger.per_datapoint.isel(datapoint=np.resize(finite, number)).assign_coords(datapoint=np.arange(number))
    noise = np.random.default_rng(0).normal(0, 0.05, number)
    varied = {
        name: column + xr.DataArray(noise, dims="datapoint").astype(column.dtype)
        for name, column in rows.data_vars.items()
        if column.dtype.kind == "f" and not str(name).endswith("_mcse")
    }
    provenance = {name: value for name, value in ledger.provenance.items() if name != "infinite"}
    provenance = {**provenance, "num_datapoints": number}
    return replace(ledger, per_datapoint=rows.assign(varied), observed=xr.Dataset(), provenance=provenance)
