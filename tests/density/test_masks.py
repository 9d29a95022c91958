"""Masks: `poutine.mask`, `.mask(...)` at any depth and `obs_mask` leave elements out of both densities."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyrogaps import GuideDensity, InputError, JointDensity, elbo
from pyrogaps.guides.local import AutoLocalMultivariateNormal

pytestmark = pytest.mark.usefixtures("double")

KEEP = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 0, 1]]).bool()


def std(value: Tensor) -> Tensor:
    return dist.Normal(0.0, 1.0).log_prob(value)


def by_handler(x: Tensor, keep: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2), pyro.plate("time", 3, dim=-1), poutine.mask(mask=keep):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def by_handler_in_steps(x: Tensor, keep: Tensor) -> None:
    with pyro.plate("data", len(x)):
        for t in range(3):
            with poutine.mask(mask=keep[:, t]):
                z = pyro.sample(f"z{t}", dist.Normal(0.0, 1.0))
                pyro.sample(f"x{t}", dist.Normal(z, 0.5), obs=x[:, t])


def by_distribution(x: Tensor, keep: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2), pyro.plate("time", 3, dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x), 3]).mask(keep))
        pyro.sample("x", dist.Normal(z, 0.5).mask(keep), obs=x)


def inside_the_event(x: Tensor, keep: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).mask(keep).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.5).mask(keep).to_event(1), obs=x)


MODELS = [by_handler, by_handler_in_steps, by_distribution, inside_the_event]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_masked_elements_leave_the_joint(model: Callable[..., Any]) -> None:
    x, z = torch.randn(4, 3), torch.randn(5, 4, 3)
    joint = JointDensity(model, (x, KEEP), plate="data")
    expected = ((std(z) + dist.Normal(z, 0.5).log_prob(x)) * KEEP).sum(-1)
    torch.testing.assert_close(joint(z), expected)
    torch.testing.assert_close(joint(torch.where(KEEP, z, z + 100)), expected)
    assert torch.equal(joint.active(torch.arange(4)), KEEP)
    rows = torch.tensor([3, 1, 1])
    torch.testing.assert_close(joint(z[:, rows], rows), expected[:, rows])


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_masked_elements_leave_every_guide(model: Callable[..., Any]) -> None:
    x = torch.randn(4, 3)
    joint = JointDensity(model, (x, KEEP), plate="data")
    guide = AutoNormal(model, init_scale=0.3)
    guide(x, KEEP)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.normal_()
    density = GuideDensity(guide, None, joint)
    z, log_q = density.sample(7)
    assert (z[:, ~KEEP] == 0).all() and (z[:, KEEP] != 0).all()
    torch.testing.assert_close(density.log_prob(z), log_q)
    parts = [guide._get_loc_and_scale(name) for name in joint.sites]
    loc, scale = (torch.stack([p[i] for p in parts], -1).reshape(4, 3) for i in (0, 1))
    torch.testing.assert_close(log_q, (dist.Normal(loc, scale).log_prob(z) * KEEP).sum(-1))


def test_jacobians_of_masked_elements() -> None:
    def model(x: Tensor, keep: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.full_like(x, 2.0), 1.0).mask(keep).to_event(1))
            with poutine.mask(mask=keep[:, 0] & keep[:, 1]):
                w = pyro.sample("w", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
            pyro.sample("x", dist.Normal(z + w, 1.0).mask(keep).to_event(1), obs=x)

    x, z = torch.randn(4, 3), torch.randn(2, 4, 5)
    keep_w = KEEP[:, 0] & KEEP[:, 1]
    gamma, u = z[..., :3].exp(), z[..., 3:] * keep_w[:, None]
    simplex = torch.distributions.biject_to(torch.distributions.constraints.simplex)
    w = simplex(u)
    expected = ((dist.Gamma(2.0, 1.0).log_prob(gamma) + z[..., :3]) * KEEP).sum(-1)
    expected += (
        dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])).log_prob(w) + simplex.log_abs_det_jacobian(u, w)
    ) * keep_w
    expected += (dist.Normal(torch.where(KEEP, gamma, torch.ones(())) + w, 1.0).log_prob(x) * KEEP).sum(-1)
    joint = JointDensity(model, (x, KEEP))
    torch.testing.assert_close(joint(z), expected)
    for kind in (AutoNormal, AutoLocalMultivariateNormal):
        guide = kind(model)
        guide(x, KEEP)
        density = GuideDensity(guide, None, joint)
        draws, log_q = density.sample(3)
        torch.testing.assert_close(density.log_prob(draws), log_q)
        active = torch.cat([KEEP, keep_w[:, None].expand(-1, 2)], -1)
        assert torch.equal(draws != 0, active.expand_as(draws))


def test_a_full_covariance_under_a_mask_is_its_marginal() -> None:
    x = torch.randn(4, 3)
    guide = AutoLocalMultivariateNormal(inside_the_event)
    guide(x, KEEP)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    density = GuideDensity(guide, (x, KEEP), inside_the_event)
    z, log_q = density.sample(6)
    scale_tril = guide.scale[..., None] * guide.unit_scale_tril
    covariance = (scale_tril @ scale_tril.mT).reshape(4, 3, 3)
    loc = guide.loc.reshape(4, 3)
    for n in range(4):
        some = KEEP[n].nonzero()[:, 0]
        marginal = dist.MultivariateNormal(loc[n, some], covariance[n][some][:, some])
        torch.testing.assert_close(log_q[:, n], marginal.log_prob(z[:, n, some]))


def test_a_full_covariance_without_marginals_is_refused() -> None:
    def guide(x: Tensor, keep: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x, torch.eye(3)))

    with pytest.raises(InputError, match=r"site 'z': the model masks part of an event.*MultivariateNormal"):
        GuideDensity(guide, (torch.randn(4, 3), KEEP), inside_the_event).sample(2)


def test_boolean_masks() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=True):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=False):
                w = pyro.sample("w", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(z, 1.0), obs=x)
            pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)

    x, z = torch.randn(4), torch.randn(3, 4, 2)
    expected = std(z[..., 0]) + dist.Normal(z[..., 0], 1.0).log_prob(x)
    joint = JointDensity(model, x)
    torch.testing.assert_close(joint(z), expected)
    assert torch.equal(joint.active(torch.arange(4)), torch.tensor([True, False]).expand(4, 2))


def test_values_under_a_mask_may_lie_outside_the_support() -> None:
    def model(x: Tensor, keep: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(z.exp()[:, None].expand(-1, 3)).mask(keep).to_event(1), obs=x)

    x = torch.where(KEEP, torch.ones(4, 3), torch.full((4, 3), -1.0))
    z = torch.randn(2, 4, 1)
    expected = std(z[..., 0]) + (dist.Poisson(z.exp()).log_prob(torch.ones(4, 3)) * KEEP).sum(-1)
    torch.testing.assert_close(JointDensity(model, (x, KEEP))(z), expected)
    x[0, 0] = -1.0
    with pytest.raises(InputError, match=r"site 'x': some observed values, such as .*, lie outside the support"):
        JointDensity(model, (x, KEEP))


def test_obs_mask() -> None:
    seen = torch.tensor([True, False, True, True])

    def model(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.LogNormal(z, 0.5), obs=x, obs_mask=seen)
            pyro.sample("w", dist.Normal(y, 1.0), obs=x)

    x, z = torch.rand(4) + 0.5, torch.randn(3, 4, 2)
    joint = JointDensity(model, (x, seen))
    y = torch.where(seen, x, z[..., 1].exp())
    expected = std(z[..., 0]) + dist.Normal(y, 1.0).log_prob(x)
    imputed = dist.Normal(z[..., 0], 0.5).log_prob(z[..., 1])
    expected += torch.where(seen, dist.LogNormal(z[..., 0], 0.5).log_prob(x), imputed)
    torch.testing.assert_close(joint(z), expected)
    guide = AutoNormal(model)
    SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step(x, seen)
    draws, log_q = GuideDensity(guide, None, joint).sample(3)
    assert (draws[:, seen, 1] == 0).all() and torch.isfinite(log_q).all()


def test_masks_of_different_shapes_combine() -> None:
    def model(x: Tensor, keep: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=keep[:, 0]):
            with poutine.mask(mask=keep[:, 2]):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).expand([len(x), 3]).mask(keep).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    x, z = torch.randn(4, 3), torch.randn(2, 4, 3)
    active = KEEP & KEEP[:, [0]] & KEEP[:, [2]]
    u = z * active
    expected = (std(u) * active).sum(-1) + dist.Normal(u, 0.5).log_prob(x).sum(-1) * KEEP[:, 0]
    torch.testing.assert_close(JointDensity(model, (x, KEEP))(z), expected)


def test_jacobian_of_a_squashed_site_is_finite_under_a_mask() -> None:
    def model(x: Tensor, keep: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=keep[:, 1]):
            z = pyro.sample("z", dist.Beta(2.0, 2.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])

    x, z = torch.randn(4, 3), torch.randn(2, 4, 1)
    u, keep = z[..., 0], KEEP[:, 1]
    inside = dist.Beta(2.0, 2.0).log_prob(u.sigmoid()) + logsigmoid(u) + logsigmoid(-u)
    expected = (inside + dist.Normal(u.sigmoid(), 0.5).log_prob(x[:, 0])) * keep
    torch.testing.assert_close(JointDensity(model, (x, KEEP))(z), expected)


def test_a_joint_autoguide_of_one_masked_data_set_is_refused_by_name() -> None:
    """Without a data plate its vector is one event, part of which is masked."""
    guide = AutoMultivariateNormal(by_handler)
    guide(torch.zeros(4, 3), KEEP)
    with pytest.raises(InputError, match=r"masks part of an event.*MultivariateNormal is not factorised"):
        elbo(by_handler, guide, (torch.zeros(4, 3), KEEP), plate=False, num_particles=2)


def with_a_matrix(x: Tensor, keep: Tensor) -> None:
    """A latent whose events have two dimensions, and one in unconstrained space."""
    with pyro.plate("data", len(x)), poutine.mask(mask=keep[:, 0]):
        factor = pyro.sample("factor", dist.LKJCholesky(2, x.new_tensor(1.5)))
        pyro.sample("x", dist.MultivariateNormal(x.new_zeros(2), scale_tril=factor), obs=x[:, :2])


def test_a_masked_event_may_have_more_dimensions_than_its_unconstrained_value() -> None:
    x, keep = torch.randn(4, 3), torch.tensor([[True], [False], [True], [True]])
    joint, plain = JointDensity(with_a_matrix, (x, keep)), JointDensity(with_a_matrix, (x, torch.ones_like(keep)))
    z = torch.randn(5, 4, 1)
    torch.testing.assert_close(joint(z), plain(z) * keep[:, 0])
    assert torch.equal(joint.active(torch.arange(4)), keep)
    guide = AutoNormal(with_a_matrix, init_scale=0.3)
    guide(x, keep)
    z, log_q = GuideDensity(guide, None, joint).sample(3)
    assert (z[:, 1] == 0).all() and (log_q[:, 1] == 0).all() and (log_q[:, 0] != 0).all()
