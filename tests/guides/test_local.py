"""The full-covariance family per datapoint: it holds any Gaussian posterior, whatever the sites and their supports."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyrogaps import GuideDensity, elbo, refine
from pyrogaps.errors import InputError
from pyrogaps.guides.local import AutoLocalMultivariateNormal, MarginalMultivariateNormal
from tests.references import assert_exact


def two_sites(x: Tensor) -> None:
    """A vector and a positive scalar; the log of the scalar and the vector together are as in a linear model."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
        b = pyro.sample("b", dist.LogNormal(torch.zeros((), dtype=x.dtype), 1.5))
        mean = torch.stack([a[..., 0] + a[..., 1], b.log() - a[..., 0], a[..., 1] + b.log()], -1)
        pyro.sample("x", dist.Normal(mean, 0.4).to_event(1), obs=x)


def evidence_of_two_sites(x: Tensor) -> Tensor:
    loadings = torch.tensor([[1.0, 1, 0], [-1, 0, 1], [0, 1, 1]], dtype=x.dtype)
    covariance = loadings @ torch.diag(torch.tensor([1.0, 1, 1.5**2], dtype=x.dtype)) @ loadings.T
    return dist.MultivariateNormal(
        torch.zeros(3, dtype=x.dtype), covariance + 0.16 * torch.eye(3, dtype=x.dtype)
    ).log_prob(x)


def test_no_gap_over_several_sites_of_several_supports() -> None:
    x = torch.tensor([[1.0, -0.5, 2.0], [0.2, 0.1, -0.4], [-2.0, 3.0, 0.0]], dtype=torch.float64)
    refined = refine(two_sites, AutoLocalMultivariateNormal, x)
    bound = elbo(two_sites, refined, x)
    assert_exact(bound.value, bound.mcse, evidence_of_two_sites(x))


def test_scores_what_it_draws() -> None:
    x = torch.zeros(4, 3, dtype=torch.float64)
    guide = AutoLocalMultivariateNormal(two_sites)
    guide(x)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    density = GuideDensity(guide, x, two_sites)
    z, log_q = density.sample(50)
    torch.testing.assert_close(density.log_prob(z), log_q)
    factor = (guide.scale[..., None] * guide.unit_scale_tril).detach()
    expected = dist.MultivariateNormal(guide.loc.detach(), scale_tril=factor).log_prob(z)
    torch.testing.assert_close(log_q, expected.detach())


def test_is_an_ordinary_pyro_guide() -> None:
    """SVI trains it, and its loss, a sum over datapoints, is minus the ELBO that is estimated here."""
    x = torch.tensor([[1.0, -0.5, 2.0], [0.2, 0.1, -0.4]], dtype=torch.float64)
    guide = AutoLocalMultivariateNormal(two_sites)
    svi = SVI(two_sites, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(8))
    losses = torch.tensor([svi.step(x) for _ in range(100)])
    assert float(losses[-20:].max()) < float(losses[:5].min())
    after = torch.tensor([svi.evaluate_loss(x) for _ in range(100)])
    bound = elbo(two_sites, guide, x, num_particles=2000)
    error = float((after.var() / 100 + bound.mcse.square().sum()).sqrt())
    assert abs(float(after.mean() + bound.value.sum())) < 4 * error


def test_start_at_and_units() -> None:
    x = torch.zeros(4, 3, dtype=torch.float64)
    guide = AutoLocalMultivariateNormal(two_sites)
    guide(x)
    loc, scale = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64) + 0.1
    guide.start_at(loc, scale)
    torch.testing.assert_close(guide.loc.detach(), loc)
    torch.testing.assert_close(guide.scale.detach(), scale)
    torch.testing.assert_close(guide.units()["loc_unconstrained"], scale)


def test_marginal_of_some_coordinates() -> None:
    factor = torch.tensor([[1.0, 0, 0], [0.5, 0.8, 0], [-0.7, 0.3, 1.2]], dtype=torch.float64)
    joint = MarginalMultivariateNormal(torch.tensor([1.0, 2.0, 3.0]).double(), scale_tril=factor)
    value = torch.randn(6, 3, dtype=torch.float64)
    keep = torch.tensor([True, False, True])
    covariance = (factor @ factor.T)[keep][:, keep]
    expected = dist.MultivariateNormal(torch.tensor([1.0, 3.0]).double(), covariance).log_prob(value[:, keep])
    torch.testing.assert_close(joint.masked_log_prob(value, keep.expand(6, 3)), expected)
    torch.testing.assert_close(joint.masked_log_prob(value, torch.ones(6, 3, dtype=torch.bool)), joint.log_prob(value))


def test_needs_a_data_plate() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand([len(x)]).to_event(1), obs=x)

    with pytest.raises(InputError, match="the model has no data plate"):
        AutoLocalMultivariateNormal(model)(torch.zeros(3))
