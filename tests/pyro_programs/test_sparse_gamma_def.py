"""A sparse gamma deep exponential family (Ranganath et al., 2015): weights shared by all images, three local layers."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.infer.autoguide import AutoNormal, init_to_feasible
from torch import Tensor
from torch.nn.functional import softplus

import pyrogaps as pg
from tests.pyro_programs.pairs import Mean, Pair, assert_same, elbo_in_parts, elbo_of

IMAGES, TOP, MIDDLE, BOTTOM, PIXELS = 40, 1, 2, 2, 3


def gamma(shape: float, rate: Any, *size: int) -> dist.TorchDistribution:
    return dist.Gamma(torch.full(size, shape), rate).to_event(1)


def model(x: Tensor) -> None:
    w_top = pyro.sample("w_top", gamma(0.5, torch.full((TOP * MIDDLE,), 0.3), TOP * MIDDLE))
    w_mid = pyro.sample("w_mid", gamma(0.5, torch.full((MIDDLE * BOTTOM,), 0.3), MIDDLE * BOTTOM))
    w_bottom = pyro.sample("w_bottom", gamma(0.5, torch.full((BOTTOM * PIXELS,), 0.3), BOTTOM * PIXELS))
    with pyro.plate("data", len(x)):
        z_top = pyro.sample("z_top", gamma(0.5, torch.full((TOP,), 0.3), TOP))
        mean = z_top @ w_top.reshape(TOP, MIDDLE)
        z_mid = pyro.sample("z_mid", gamma(0.5, 0.5 / mean, MIDDLE))
        mean = z_mid @ w_mid.reshape(MIDDLE, BOTTOM)
        z_bottom = pyro.sample("z_bottom", gamma(0.5, 0.5 / mean, BOTTOM))
        mean = z_bottom @ w_bottom.reshape(BOTTOM, PIXELS)
        pyro.sample("obs", dist.Poisson(mean).to_event(1), obs=x)


def inverse_softplus(x: float) -> float:
    return float(torch.tensor(x).expm1().log())


class Easy(EasyGuide):
    """One Normal over all weights, one over all layers of an image."""

    def guide(self, x: Tensor) -> None:
        shared = self.group(match="w_.*")
        loc = pyro.param("w_loc", lambda: 0.1 * torch.randn(shared.event_shape))
        scale = softplus(pyro.param("w_scale", lambda: torch.full(shared.event_shape, inverse_softplus(0.2))))
        shared.sample("ws", dist.Normal(loc, scale).to_event(1))
        local = self.group(match="z_.*")
        with self.plate("data", len(x)):
            shape = (len(x), *local.event_shape)
            loc = pyro.param("z_loc", lambda: 0.1 * torch.randn(shape), event_dim=1)
            scale = softplus(pyro.param("z_scale", lambda: torch.full(shape, inverse_softplus(0.2)), event_dim=1))
            local.sample("zs", dist.Normal(loc, scale).to_event(1))


def custom(x: Tensor) -> None:
    """Independent Gammas, as in the example's own guide, with parameters for each image."""

    def site(name: str, start: float, *shape: int) -> None:
        concentration = pyro.param(f"alpha_{name}", lambda: torch.rand(shape) + start, event_dim=1)
        mean = pyro.param(f"mean_{name}", lambda: torch.rand(shape) + 0.5, event_dim=1)
        pyro.sample(name, dist.Gamma(concentration, concentration / mean).to_event(1))

    for name, size in (("w_top", TOP * MIDDLE), ("w_mid", MIDDLE * BOTTOM), ("w_bottom", BOTTOM * PIXELS)):
        site(name, 20.0, size)
    with pyro.plate("data", len(x)):
        for name, size in (("z_top", TOP), ("z_mid", MIDDLE), ("z_bottom", BOTTOM)):
            site(name, 3.0, len(x), size)


def pair(guide: Any) -> Pair:
    x = dist.Poisson(torch.rand(IMAGES, PIXELS) * 3.0).sample()
    guide(x)
    return Pair(model, guide, (x,), IMAGES, plate="data")


def test_auto_normal() -> None:
    given = pair(AutoNormal(model, init_loc_fn=init_to_feasible))
    assert_same(elbo_in_parts(given), given.elbo_of_pyro())


@pytest.mark.slow
def test_ledger_of_auto_normal() -> None:
    """On the joint space a curvature fit overflowed, with a traceback."""
    given = pair(AutoNormal(model, init_loc_fn=init_to_feasible))
    ledger = pg.decompose(
        given.model,
        given.guide,
        given.args,
        plate="data",
        refinement=pg.Refinement(num_steps=30, num_selection=32),
        evidence=pg.AIS(num_chains=8, num_temperatures=8),
        referee=False,
        progress=False,
    )
    assert ledger.shared is not None
    total, error = (float(ledger.shared[name]) for name in ("data_set_elbo", "data_set_elbo_mcse"))
    theirs = given.elbo_of_pyro()
    assert error < 0.1 * IMAGES
    assert abs(total - IMAGES * theirs.value) < 4 * math.hypot(error, IMAGES * theirs.error)


def test_easy_guide() -> None:
    """One draw for all sites, by Deltas: its ledger is announced as refined datapoint by datapoint."""
    given = pair(Easy(model))
    bound = pg.elbo(given.problem(), num_particles=2000)
    assert_same(Mean(float(bound.value) / IMAGES, float(bound.mcse) / IMAGES), given.elbo_of_pyro())


def test_custom_guide(mode: Any) -> None:
    given = pair(custom)
    assert_same(elbo_of(given.ledger(mode), IMAGES), given.elbo_of_pyro())
