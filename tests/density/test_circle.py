"""Latents on the circle: right against quadrature, or refused with a remedy that works."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyrogaps as pg
from pyrogaps import InputError
from pyrogaps.density.supports import bijection
from pyrogaps.guides.local import AutoLocalMultivariateNormal

pytestmark = pytest.mark.usefixtures("double")

X = torch.tensor([[-0.6, 0.1], [1.0, 0.2], [-1.5, -0.3]])
CIRCLE = [T.SigmoidTransform(), T.AffineTransform(-math.pi, 2 * math.pi)]


def prior() -> Any:
    return dist.VonMises(torch.tensor(0.0), torch.tensor(1.0))


def model(x: Tensor) -> None:
    with pyro.plate("d", len(x)):
        a = pyro.sample("a", prior())
        pyro.sample("x", dist.Normal(torch.stack([a.cos(), a.sin()], -1), 1.0).to_event(1), obs=x)


def quadrature() -> Tensor:
    angle = torch.linspace(-math.pi, math.pi, 4001)[:-1]
    at = torch.stack([angle.cos(), angle.sin()], -1)[:, None]
    log_joint = prior().log_prob(angle)[:, None] + dist.Normal(at, 1.0).log_prob(X).sum(-1)
    return log_joint.logsumexp(0) + math.log(2 * math.pi / 4000)


class Guide(torch.nn.Module):
    def __init__(self, on_line: bool) -> None:
        super().__init__()
        self.on_line = on_line
        self.log_scale = torch.nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("d", len(x)):
            fn: Any = dist.Normal(0 * x[:, 0], self.log_scale.exp())
            pyro.sample("a", fn if self.on_line else dist.TransformedDistribution(fn, CIRCLE))


def von_mises(x: Tensor) -> None:
    with pyro.plate("d", len(x)):
        pyro.sample("a", dist.VonMises(torch.atan2(x[:, 1], x[:, 0]), 0 * x[:, 0] + 0.7))


@pytest.mark.parametrize("guide", [von_mises, Guide(on_line=False)])
def test_guides_on_the_circle(guide: Any) -> None:
    found = pg.iwae(model, guide, X, num_particles=20000)
    assert ((found.value - quadrature()).abs() < 4 * found.mcse).all()
    assert (found.mcse < 0.05).all()


def test_log_evidence_of_a_refined_guide_on_the_circle() -> None:
    settings = {"evidence": pg.AIS(num_chains=64, num_temperatures=10)}
    found = pg.log_evidence(model, Guide(on_line=False), X, refinement=pg.Refinement(num_steps=20), **settings)
    assert ((found.value - quadrature()).abs() < 4 * found.mcse + 1e-3).all()


def test_a_guide_on_the_line() -> None:
    with pytest.raises(
        InputError,
        match=r"site 'a': the guide's support, the real line, differs from the model's, angles from -pi to pi",
    ):
        pg.elbo(model, Guide(on_line=True), X)


@pytest.mark.parametrize("kind", [AutoNormal, AutoLocalMultivariateNormal])
def test_autoguides_leave_the_turn(kind: Any) -> None:
    guide = kind(model)
    guide(X)
    with pytest.raises(InputError, match=r"site 'a': VonMises is periodic.*SigmoidTransform"):
        pg.elbo(model, guide, X)


ENDS = [
    (dist.TransformedDistribution(prior(), [T.AffineTransform(1.0, -2.0)]), 1 - 2 * math.pi, 1 + 2 * math.pi),
    (dist.TransformedDistribution(prior(), [T.ExpTransform()]), math.exp(-math.pi), math.exp(math.pi)),
    (
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.VonMises(torch.zeros(2), torch.ones(2))),
        -math.pi,
        math.pi,
    ),
]


@pytest.mark.parametrize(("fn", "low", "high"), ENDS)
def test_supports_end_where_one_turn_does(fn: Any, low: float, high: float) -> None:
    transform, u = bijection(fn, "a"), torch.linspace(-40, 40, 20001, dtype=torch.float64)
    value = transform(u)
    torch.testing.assert_close(torch.stack([value[0], value[-1]]).double(), torch.tensor([low, high]).double())
    density = (fn.log_prob(value) + transform.log_abs_det_jacobian(u, value)).exp().nan_to_num(0.0)
    assert abs(float(torch.trapezoid(density, u)) - 1) < 1e-4


def test_a_support_that_is_no_interval() -> None:
    with pytest.raises(InputError, match="site 'a': there is no map from the real line"):
        bijection(dist.FoldedDistribution(prior()), "a")
