"""scANVI (Xu et al., 2021), cells with and without a cell type: scales, a factor in the guide, z2 then y then z1."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch import Tensor, nn
from torch.nn.functional import softplus

from tests.pyro_programs.pairs import Pair, assert_same, elbo_of, joined, left_out

GENES, TYPES, LATENT, CELLS = 6, 3, 2, 6
SCALE = 0.01


def head(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, outputs))


class SCANVI(nn.Module):
    """`scale` of all sites, `alpha` of the classification loss; 1 and 0 make the twin that the ledger is of."""

    def __init__(self, scale: float = SCALE, alpha: float = 0.5) -> None:
        super().__init__()
        self.scale, self.alpha = scale, alpha
        self.z2_decoder, self.x_decoder = head(LATENT + TYPES, 2 * LATENT), head(LATENT, 2 * GENES)
        self.encoder, self.classifier = head(GENES, 2 * LATENT + 2), head(LATENT, TYPES)
        self.z1_encoder = head(LATENT + TYPES, 2 * LATENT)

    def twin(self) -> "SCANVI":
        twin = SCANVI(scale=1.0, alpha=0.0)
        twin.load_state_dict(self.state_dict())
        return twin

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("scanvi", self)
        dispersion = pyro.param("inverse_dispersion", 10.0 * x.new_ones(GENES), constraint=dist.constraints.positive)
        with pyro.plate("batch", len(x)), poutine.scale(scale=self.scale):
            z1 = pyro.sample("z1", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(TYPES)), obs=y)
            loc, scale = self.z2_decoder(joined(z1, y)).chunk(2, -1)
            z2 = pyro.sample("z2", dist.Normal(loc, softplus(scale) + 0.1).to_event(1))
            size = pyro.sample("l", dist.LogNormal(x.new_full((1,), 2.0), 0.3).to_event(1))
            gate, shares = self.x_decoder(z2).chunk(2, -1)
            mean = size * shares.softmax(-1)
            counts = dist.ZeroInflatedNegativeBinomial(
                gate_logits=gate,
                total_count=dispersion,
                logits=(mean + 1e-6).log() - (dispersion + 1e-6).log(),
                validate_args=False,
            )
            pyro.sample("x", counts.to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("scanvi", self)
        with pyro.plate("batch", len(x)), poutine.scale(scale=self.scale):
            z2_loc, z2_scale, l_loc, l_scale = self.encoder(torch.log1p(x)).split([LATENT, LATENT, 1, 1], -1)
            pyro.sample("l", dist.LogNormal(2.0 + l_loc, 0.1 * softplus(l_scale) + 0.1).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(z2_loc, softplus(z2_scale) + 0.1).to_event(1))
            types = dist.OneHotCategorical(logits=self.classifier(z2))
            if y is None:
                y = pyro.sample("y", types)
            elif self.alpha:
                pyro.factor("classification_loss", -self.alpha * -types.log_prob(y), has_rsample=False)
            loc, scale = self.z1_encoder(joined(z2, y)).chunk(2, -1)
            pyro.sample("z1", dist.Normal(loc, softplus(scale) + 0.1).to_event(1))


def counts() -> Tensor:
    return dist.Poisson(3.0 * torch.rand(CELLS, GENES)).sample()


def pair(labelled: bool) -> Pair:
    scanvi, x, y = SCANVI(), counts(), torch.eye(TYPES)[torch.arange(CELLS) % TYPES]
    twin = scanvi.twin()
    guides = [config_enumerate(program.guide, "parallel", expand=True) for program in (scanvi, twin)]
    args, nesting = ((x, y), None) if labelled else ((x,), 1)
    return Pair(scanvi.model, guides[0], args, CELLS, clean=(twin.model, guides[1]), nesting=nesting, repeats=50)


def test_unlabelled(mode: Any) -> None:
    given = pair(labelled=False)
    ledger = given.ledger(mode, 4000)
    clean, raw = given.elbo_of_pyro(), given.elbo_of_pyro(raw=True)
    assert_same(elbo_of(ledger), clean)
    assert abs(raw.value / SCALE - clean.value) < 4 * clean.error
    assert f"The scale {SCALE} at" in str(ledger)


def test_labelled(mode: Any) -> None:
    given = pair(labelled=True)
    ledger = given.ledger(mode, 4000)
    clean, raw = given.elbo_of_pyro(), given.elbo_of_pyro(raw=True)
    assert_same(elbo_of(ledger), clean)
    assert (
        abs(raw.value / SCALE - (clean.value - left_out(ledger))) < 4 * clean.error + 0.04
    )  # four standard errors of what is left out
    assert f"The scale {SCALE} at" in str(ledger)
    assert "'classification_loss'" in str(ledger)
