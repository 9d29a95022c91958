"""Models without a data plate that are written for one particle: evaluated together by `torch.func.vmap`."""

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyrogaps import JointDensity
from pyrogaps.capture import GradientEvaluator

pytestmark = pytest.mark.usefixtures("double")

X = torch.arange(12, dtype=torch.float64).reshape(6, 2).sin()
Y = torch.tensor([0.5, -1.0, 0.3, 1.2, 0.0, -0.4], dtype=torch.float64)


def broadcasting(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    mean = (x * w[..., None, :]).sum(-1)
    pyro.sample("y", dist.Normal(mean, s[..., None]).to_event(1), obs=y)


def for_one(x: Tensor, y: Tensor) -> None:
    """Its product and its plate fit one particle alone."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x @ w.reshape(2)).reshape(6), s.reshape(())), obs=y)


def in_place(x: Tensor, y: Tensor) -> None:
    """It writes latents into a buffer."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    mean = torch.zeros(6)
    mean[:] = x @ w.reshape(2)
    pyro.sample("y", dist.Normal(mean, s.reshape(())).to_event(1), obs=y)


def branching(x: Tensor, y: Tensor) -> None:
    """What it computes depends on a latent's value."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    mean = x @ w.reshape(2) if s.item() > 0 else y
    pyro.sample("y", dist.Normal(mean, s.reshape(())).to_event(1), obs=y)


def exact(z: Tensor) -> Tensor:
    w, log_s = z[..., :2], z[..., 2]
    prior = dist.Normal(0.0, 1.0).log_prob(w).sum(-1) + dist.Normal(0.0, 1.0).log_prob(log_s)
    return prior + dist.Normal(w @ X.T, log_s.exp()[..., None]).log_prob(Y).sum(-1)


@pytest.mark.parametrize(
    ("model", "particles"),
    [(broadcasting, "broadcast"), (for_one, "mapped"), (in_place, "mapped buffers"), (branching, "one by one")],
)
@pytest.mark.parametrize("mode", ["eager", "captured"])
def test_every_way_gives_the_density_and_its_gradient(
    model: Any, particles: str, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyrogaps.density.particles.MIN_ANNOUNCED", 0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        joint = JointDensity(model, (X, Y), plate=False)
        evaluator = GradientEvaluator(joint, mode, quiet=True)
    announced = [str(warning.message) for warning in caught]
    assert joint.structure.particles == particles
    assert len(announced) == (particles == "one by one")
    if announced:
        assert "runs once for every particle" in announced[0] and "broadcast over a left axis" in announced[0]
    z = torch.randn(5, 1, 3, requires_grad=True)
    expected = exact(z)
    (slope,) = torch.autograd.grad(expected.sum(), z)
    (values,), (gradients,) = evaluator.bind(torch.tensor([0]), 5)(z.detach())
    torch.testing.assert_close(joint(z.detach()), expected.detach())
    torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(gradients, slope)
    sites = joint.constrain(z.detach())
    assert {name: tuple(value.shape) for name, value in sites.items()} == {"w": (5, 1, 2), "s": (5, 1)}
    torch.testing.assert_close(sites["s"], z.detach()[..., 2].exp())


def test_masked_latents_and_inner_plates_of_a_mapped_model() -> None:
    keep = torch.tensor([True, False, True, True, False, True])

    def model(x: Tensor, y: Tensor) -> None:
        centre = pyro.sample("centre", dist.Normal(0.0, 1.0)).reshape(())
        with pyro.plate("groups", 6), pyro.poutine.mask(mask=keep):
            effect = pyro.sample("effect", dist.Normal(centre.expand(6), 2.0))
            pyro.sample("y", dist.Normal(effect.reshape(6), 0.5), obs=y)

    joint = JointDensity(model, (X, Y), plate=False)
    assert joint.structure.particles == "mapped"
    z = torch.randn(4, 1, 7)
    groups = dist.Normal(z[..., :1], 2.0).log_prob(z[..., 1:]) + dist.Normal(z[..., 1:], 0.5).log_prob(Y)
    expected = dist.Normal(0.0, 1.0).log_prob(z[..., 0]) + torch.where(keep, groups, torch.zeros(())).sum(-1)
    torch.testing.assert_close(joint(z), expected)
    active = joint.active(torch.tensor([0]))
    assert active is not None and active[0].tolist() == [True, *keep.tolist()]
