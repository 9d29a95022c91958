"""A VAE written as in Pyro's example evaluates as it is, grey values and all; so does a model of many parts."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrogaps import AIS, JointDensity, Refinement, decompose, elbo


class Decoder(nn.Module):
    def __init__(self, z_dim: int, hidden_dim: int, pixels: int) -> None:
        super().__init__()
        self.fc1, self.fc21 = nn.Linear(z_dim, hidden_dim), nn.Linear(hidden_dim, pixels)

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.fc21(softplus(self.fc1(z))))


class Encoder(nn.Module):
    def __init__(self, z_dim: int, hidden_dim: int, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels
        self.fc1, self.fc21, self.fc22 = (
            nn.Linear(pixels, hidden_dim),
            nn.Linear(hidden_dim, z_dim),
            nn.Linear(hidden_dim, z_dim),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = softplus(self.fc1(x.reshape(-1, self.pixels)))
        return self.fc21(hidden), torch.exp(self.fc22(hidden))


class VAE(nn.Module):
    def __init__(self, z_dim: int = 2, hidden_dim: int = 8, pixels: int = 16) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(z_dim, hidden_dim, pixels), Decoder(z_dim, hidden_dim, pixels)
        self.z_dim, self.pixels = z_dim, pixels

    def model(self, x: Tensor) -> Tensor:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = torch.zeros(x.shape[0], self.z_dim, dtype=x.dtype, device=x.device)
            z_scale = torch.ones(x.shape[0], self.z_dim, dtype=x.dtype, device=x.device)
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            loc_img = self.decoder.forward(z)
            pyro.sample("obs", dist.Bernoulli(loc_img, validate_args=False).to_event(1), obs=x.reshape(-1, self.pixels))
            return loc_img

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = self.encoder.forward(x)
            pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))


QUICK: dict[str, Any] = {
    "num_particles": 30,
    "refinement": Refinement(num_steps=20, num_selection=16),
    "evidence": AIS(num_chains=4, num_temperatures=3, num_leapfrog=2),
    "progress": False,
}


def trained_vae(x: Tensor) -> VAE:
    vae = VAE()
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), loss=Trace_ELBO())
    for _ in range(5):
        svi.step(x)
    return vae


def test_pyro_s_vae_evaluates_unchanged() -> None:
    x = torch.rand(6, 1, 4, 4)
    vae = trained_vae(x)
    joint = JointDensity(vae.model, x)
    assert (joint.plate, joint.dim, joint.unnormalised) == ("data", 2, ("obs",))
    z = torch.randn(3, 6, 2)
    pixels, flat = vae.decoder(z), x.reshape(6, 16)
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    expected += (flat * pixels.log() + (1 - flat) * (1 - pixels).log()).sum(-1)
    torch.testing.assert_close(joint(z), expected, rtol=1e-4, atol=1e-4)
    theirs = torch.tensor([-Trace_ELBO().loss(vae.model, vae.guide, x) for _ in range(200)])
    ours = elbo(vae.model, vae.guide, x, num_particles=500)
    error = (theirs.double().var() / 200 + ours.mcse.square().sum()).sqrt()
    assert (ours.value.sum() - theirs.mean()).abs() < 4 * error


@pytest.mark.usefixtures("brief_check")
def test_grey_values_are_flagged_and_binary_ones_are_not() -> None:
    x = torch.rand(6, 1, 4, 4)
    vae = trained_vae(x)
    ledger = decompose(vae.model, vae.guide, x, **QUICK)
    assert ledger.provenance["unnormalised_likelihood"] == ["obs"]
    assert "Unnormalised likelihood (obs)" in str(ledger)
    assert ledger.provenance["own_family"] == "freed"
    binary = decompose(vae.model, vae.guide, x.round(), **QUICK)
    assert binary.provenance["unnormalised_likelihood"] == []
    assert "unnormalised" not in str(binary)


def several_kinds(x: Tensor, keep: Tensor) -> None:
    data = pyro.plate("data", len(x), dim=-2)
    with data:
        rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("time", 4, dim=-1), poutine.mask(mask=keep):
            z = pyro.sample("z", dist.Normal(weights[..., 0], 1.0))
            pyro.sample("x", dist.Normal(z, 1 / rate), obs=x)


def amortized(x: Tensor, keep: Tensor) -> None:
    slope = pyro.param("slope", torch.tensor(0.5))
    scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
    concentration = pyro.param("concentration", torch.tensor([2.0, 2.0, 2.0]), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("rate", dist.LogNormal(slope * x.mean(-1, keepdim=True), scale))
        pyro.sample("weights", dist.Dirichlet(concentration))
        with pyro.plate("time", 4, dim=-1), poutine.mask(mask=keep):
            pyro.sample("z", dist.Normal(slope * x, scale))


@pytest.mark.usefixtures("brief_check")
def test_decompose_with_several_sites_nested_plates_and_a_mask() -> None:
    x, keep = torch.randn(5, 4), torch.rand(5, 4) > 0.3
    SVI(several_kinds, amortized, Adam({"lr": 1e-2}), Trace_ELBO()).step(x, keep)
    ledger = decompose(several_kinds, amortized, (x, keep), plate="data", **QUICK)
    assert ledger.provenance["dim"] == 1 + 2 + 4
    for name in ("elbo", "log_evidence", "inference_gap", "approximation_gap", "amortization_gap"):
        assert torch.isfinite(torch.tensor(ledger.per_datapoint[name].values)).all()
    whole = ledger.per_datapoint
    parts = whole["approximation_gap"] + whole["amortization_gap"]
    assert abs(parts - whole["inference_gap"]).max() < 1e-9
