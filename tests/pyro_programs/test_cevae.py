"""CEVAE (Louizos et al., 2017): its guide observes treatment and outcome, in order to learn to predict them."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from tests.pyro_programs.pairs import Pair, assert_same, assert_same_draws, elbo_of, left_out

FEATURES, LATENT, UNITS = 3, 2, 6
AUXILIARY = {"is_auxiliary": True}


class CEVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x_nn, self.t_nn = nn.Linear(LATENT, 2 * FEATURES), nn.Linear(LATENT, 1)
        self.y0_nn, self.y1_nn = nn.Linear(LATENT, 2), nn.Linear(LATENT, 2)
        self.guide_t, self.guide_y0, self.guide_y1 = (
            nn.Linear(FEATURES, 1),
            nn.Linear(FEATURES, 2),
            nn.Linear(FEATURES, 2),
        )
        self.guide_z0, self.guide_z1 = nn.Linear(FEATURES + 1, 2 * LATENT), nn.Linear(FEATURES + 1, 2 * LATENT)

    def model(self, x: Tensor, t: Tensor | None = None, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            loc, scale = self.x_nn(z).chunk(2, -1)
            pyro.sample("x", dist.Normal(loc, softplus(scale) + 0.1).to_event(1), obs=x)
            t = pyro.sample("t", dist.Bernoulli(logits=self.t_nn(z)[..., 0]), obs=t)
            pyro.sample("y", outcome(self.y0_nn(z), self.y1_nn(z), t), obs=y)

    def guide(self, x: Tensor, t: Tensor | None = None, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x), subsample=x):
            t = pyro.sample("t", dist.Bernoulli(logits=self.guide_t(x)[..., 0]), obs=t, infer=AUXILIARY)
            y = pyro.sample("y", outcome(self.guide_y0(x), self.guide_y1(x), t), obs=y, infer=AUXILIARY)
            self.guide_latent(x, t, y)

    def clean_guide(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), subsample=x):
            self.guide_latent(x, t, y)

    def guide_latent(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        seen = torch.cat([x, y[..., None]], -1)
        loc, scale = torch.where(t[..., None] > 0, self.guide_z1(seen), self.guide_z0(seen)).chunk(2, -1)
        pyro.sample("z", dist.Normal(loc, softplus(scale) + 0.1).to_event(1))


def outcome(untreated: Tensor, treated: Tensor, t: Tensor) -> dist.Normal:
    loc, scale = torch.where(t[..., None] > 0, treated, untreated).unbind(-1)
    return dist.Normal(loc, softplus(scale) + 0.1)


def test_ledger(mode: Any) -> None:
    cevae = CEVAE()
    x, t, y = torch.randn(UNITS, FEATURES), (torch.arange(UNITS) % 2).float(), torch.randn(UNITS)
    pair = Pair(cevae.model, cevae.guide, (x, t, y), UNITS, clean=(cevae.model, cevae.clean_guide), repeats=50)
    ledger = pair.ledger(mode, num_particles=20_000)
    clean, raw = pair.elbo_of_pyro(), pair.elbo_of_pyro(raw=True)  # of the same draws
    assert_same(elbo_of(ledger), clean)
    assert abs(clean.value - left_out(ledger) - raw.value) < 1e-3
    assert_same_draws(pair)
    assert all(f"'{site}'" in str(ledger) for site in ("t", "y"))
