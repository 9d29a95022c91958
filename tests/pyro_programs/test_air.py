"""Attend, infer, repeat (Eslami et al., 2016), two steps: which latents exist depends on drawn presences."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import pyrogaps as pg
from pyrogaps import InputError
from tests.pyro_programs.pairs import Mean, Pair, assert_same, joined

IMAGES, PIXELS, STEPS, WHERE, WHAT = 4, 6, 2, 1, 2


class AIR(nn.Module):
    def __init__(self, *, masked: bool = True) -> None:
        super().__init__()
        self.masked = masked
        self.decoder = nn.Linear(WHERE + WHAT, PIXELS)
        self.rnn = nn.RNNCell(PIXELS + 1 + WHERE + WHAT, 8)
        self.presence, self.where, self.what = nn.Linear(8, 1), nn.Linear(8, 2 * WHERE), nn.Linear(PIXELS, 2 * WHAT)

    def latent(self, loc: Tensor, scale: Tensor | float, present: Tensor) -> dist.TorchDistribution:
        normal = dist.Normal(loc, scale)
        return (normal.mask(present) if self.masked else normal).to_event(1)

    def model(self, x: Tensor) -> None:
        pyro.module("decode", self.decoder)
        with pyro.plate("data", len(x)):
            mean, present = torch.zeros(len(x), PIXELS), torch.ones(len(x), 1)
            for t in range(STEPS):
                present = pyro.sample(f"z_pres_{t}", dist.Bernoulli(0.5 * present).to_event(1))
                where = pyro.sample(f"z_where_{t}", self.latent(torch.zeros(len(x), WHERE), 1.0, present))
                what = pyro.sample(f"z_what_{t}", self.latent(torch.zeros(len(x), WHAT), 1.0, present))
                mean = mean + present * torch.sigmoid(self.decoder(joined(where, what)))
            pyro.sample("obs", dist.Normal(mean, 0.3).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            hidden, latents = torch.zeros(len(x), 8), torch.zeros(len(x), 1 + WHERE + WHAT)
            present = torch.ones(len(x), 1)
            for t in range(STEPS):
                hidden = self.rnn(joined(x, latents), hidden)
                chance = torch.sigmoid(self.presence(hidden)) * present
                present = pyro.sample(f"z_pres_{t}", dist.Bernoulli(chance).to_event(1))
                loc, scale = self.where(hidden).chunk(2, -1)
                where = pyro.sample(f"z_where_{t}", self.latent(loc, softplus(scale), present))
                loc, scale = self.what(x).chunk(2, -1)
                what = pyro.sample(f"z_what_{t}", self.latent(loc, softplus(scale), present))
                latents = joined(present, where, what)


def test_refused_because_a_mask_depends_on_a_discrete_latent() -> None:
    """Where an object is absent, its place and shape have no density: their sum over presences does not exist."""
    air = AIR()
    with pytest.raises(InputError, match=r"'z_(pres|where|what)_[01]'") as refusal:
        Pair(air.model, air.guide, (torch.rand(IMAGES, PIXELS),), IMAGES).ledger()
    assert "\n" not in str(refusal.value)
    assert "mask" in str(refusal.value)


def test_the_remedy_of_that_refusal() -> None:
    """Without the mask a latent that is not used keeps its prior, and integrates to 1."""
    air = AIR(masked=False)
    pair = Pair(air.model, air.guide, (torch.rand(IMAGES, PIXELS),), IMAGES, repeats=100)
    bound = pg.elbo(pair.problem(), num_particles=40_000)
    assert_same(Mean(float(bound.value.mean()), float(bound.mcse.square().sum().sqrt()) / IMAGES), pair.elbo_of_pyro())
