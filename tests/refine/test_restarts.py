"""Posteriors with several modes: refinement begun elsewhere too finds the best of them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyrogaps import AIS, InputError, Refinement, ais, elbo, refine
from pyrogaps.guides.flows import AutoLocalFlow
from tests.references import assert_exact, counts, gamma_poisson

X = torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64)
ONCE, TWICE = Refinement(num_steps=200), Refinement(num_steps=200, num_starts=2)


def two_unequal_wells(x: Tensor) -> None:
    """z_1 ~ N(1, 1), z_2 ~ N(0, 1), x ~ N(z_1^2 + 0.3 z_2, 0.3): two modes, that of positive z_1 far heavier."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_tensor([1.0, 0.0]), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 0] ** 2 + 0.3 * z[..., 1], 0.3), obs=x)


def evidence(x: Tensor) -> Tensor:
    """By quadrature over z_1, z_2 summed out in closed form."""
    z = torch.linspace(-9, 11, 20001, dtype=torch.float64)
    log_joint = dist.Normal(1.0, 1.0).log_prob(z) + dist.Normal(z**2, math.hypot(0.3, 0.3)).log_prob(x[:, None])
    return torch.logsumexp(log_joint, -1) + math.log(float(z[1] - z[0]))


class InTheLighterWell(nn.Module):
    """A guide that knows of the lighter mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([-2.0, 0.0], dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.full((2,), -1.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc.expand(len(x), 2), self.log_scale.exp()).to_event(1))


def test_a_guide_in_the_lighter_mode() -> None:
    """From there alone refinement stays nats below, and AIS anchored there is wrong; a second start mends both."""
    guide, exact = InTheLighterWell(), evidence(X)
    once, twice = (
        elbo(two_unequal_wells, refine(two_unequal_wells, guide, X, settings=settings, referee=False), X)
        for settings in (ONCE, TWICE)
    )
    assert bool((once.value < exact - 3).all())
    assert bool((twice.value > exact - 0.5).all())
    estimate = ais(two_unequal_wells, guide, X, settings=AIS(num_chains=256, initial="refined"), refinement=TWICE)
    # The lighter mode holds a hundredth of the mass or less: whether chains visit it is a matter of that much.
    assert_exact(estimate.value, estimate.mcse + 0.005, exact)


@pytest.mark.parametrize("family", [AutoNormal, AutoLocalFlow])
def test_families_start_elsewhere_too(family: type) -> None:
    bound = elbo(two_unequal_wells, refine(two_unequal_wells, family, X, settings=TWICE), X)
    assert bool((bound.value > evidence(X) - 0.5).all())


def test_a_family_without_another_start_says_so() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("intensity", dist.Gamma(x.sum(-1) + 1, self.rate))

    with pytest.raises(InputError, match="num_starts: several starts need a guide that consists of Normals"):
        refine(gamma_poisson, Encoder(), counts(), settings=TWICE)
