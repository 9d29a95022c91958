"""Models whose data set is one datapoint: no plate, or full plates below global latents."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam
from torch import Tensor, nn
from torch.distributions import biject_to

from pyrogaps import GuideDensity, InputError, JointDensity, elbo, iwae

pytestmark = pytest.mark.usefixtures("double")

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def trained(model: Any, guide: Any, *args: Any, steps: int = 200) -> Any:
    svi = SVI(model, guide, Adam({"lr": 0.03}), Trace_ELBO())
    for _ in range(steps):
        svi.step(*args)
    return guide


def test_eight_schools_density() -> None:
    joint = JointDensity(eight_schools, (EFFECTS, ERRORS), plate=False)
    assert (joint.num_datapoints, joint.dim, joint.plate) == (1, 10, None)
    z = torch.randn(6, 1, 10)
    mu, tau, theta = z[..., 0], z[..., 1].exp(), z[..., 2:]
    expected = dist.Normal(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(tau) + z[..., 1]
    expected += dist.Normal(mu[..., None], tau[..., None]).log_prob(theta).sum(-1)
    expected += dist.Normal(theta, ERRORS).log_prob(EFFECTS).sum(-1)
    torch.testing.assert_close(joint(z), expected)
    values = joint.constrain(z)
    assert values["theta"].shape == (6, 1, 8)
    torch.testing.assert_close(values["theta"], theta)
    torch.testing.assert_close(values["tau"], tau)


def test_eight_schools_elbo_agrees_with_pyro() -> None:
    guide = trained(eight_schools, AutoMultivariateNormal(eight_schools), EFFECTS, ERRORS)
    objective = Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1)
    theirs = torch.tensor([-objective.loss(eight_schools, guide, EFFECTS, ERRORS) for _ in range(20)])
    ours = elbo(eight_schools, guide, (EFFECTS, ERRORS), plate=False, num_particles=10_000)
    assert ours.value.shape == (1,)
    error = (theirs.var() / 20 + ours.mcse.square().sum()).sqrt()
    assert (ours.value.sum() - theirs.mean()).abs() < 4 * error


@pytest.mark.parametrize("kind", [AutoNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal])
def test_autoguides_score_what_they_draw(kind: Any) -> None:
    guide = trained(eight_schools, kind(eight_schools), EFFECTS, ERRORS, steps=5)
    density = GuideDensity(guide, (EFFECTS, ERRORS), eight_schools, plate=False)
    z, log_q = density.sample(5)
    assert z.shape == (5, 1, 10) and log_q.shape == (5, 1)
    torch.testing.assert_close(density.log_prob(z), log_q)


def regression(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x @ slope, 0.5).to_event(1), obs=y)


def test_regression_without_a_plate() -> None:
    x = torch.randn(9, 2)
    y = x @ torch.tensor([0.5, -1.0]) + 0.5 * torch.randn(9)
    exact = dist.MultivariateNormal(torch.zeros(9), x @ x.T + 0.25 * torch.eye(9)).log_prob(y)
    precision = torch.eye(2) + x.T @ x / 0.25
    mean = torch.linalg.solve(precision, x.T @ y / 0.25)

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("slope", dist.MultivariateNormal(mean, precision_matrix=precision))

    result = iwae(regression, guide, (x, y), num_particles=50)
    torch.testing.assert_close(result.value[0], exact)
    assert result.mcse[0] < 1e-6


class Network(PyroModule):
    """A Bayesian neural network, as in Pyro's tutorials."""

    def __init__(self) -> None:
        super().__init__()
        self.first = PyroModule[nn.Linear](2, 3)
        self.first.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
        self.first.bias = PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        self.last = nn.Linear(3, 1)

    def forward(self, x: Tensor, y: Tensor) -> None:
        scale = pyro.sample("scale", dist.Uniform(0.1, 2.0))
        mean = self.last(self.first(x).tanh())[..., 0]
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, scale), obs=y)


def test_bayesian_network() -> None:
    model, x, y = Network(), torch.randn(7, 2), torch.randn(7)
    joint = JointDensity(model, (x, y), plate=False)
    assert list(joint.sites) == ["scale", "first.weight", "first.bias"] and joint.dim == 10
    z = torch.randn(4, 1, 10)
    interval = biject_to(dist.Uniform(0.1, 2.0).support)
    scale = interval(z[..., 0])
    weight, bias = z[:, 0, 1:7].reshape(4, 3, 2), z[:, 0, 7:]
    hidden = (x @ weight.mT + bias[:, None]).tanh()
    mean = model.last(hidden)[..., 0]
    expected = dist.Uniform(0.1, 2.0).log_prob(scale) + interval.log_abs_det_jacobian(z[..., 0], scale)
    expected += dist.Normal(0.0, 1.0).log_prob(z[..., 1:]).sum(-1)
    expected += dist.Normal(mean, scale).log_prob(y).sum(-1, keepdim=True)
    torch.testing.assert_close(joint(z), expected)
    guide = AutoNormal(model)
    guide(x, y)
    density = GuideDensity(guide, None, joint)
    draws, log_q = density.sample(3)
    torch.testing.assert_close(density.log_prob(draws), log_q)


def test_arguments_of_any_length_are_one_datapoint() -> None:
    def model(y: Tensor, prior: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(prior[0], prior[1]))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y, prior, z = torch.randn(6), torch.tensor([1.0, 2.0]), torch.randn(3, 1, 1)
    expected = dist.Normal(1.0, 2.0).log_prob(z[..., 0]) + dist.Normal(z[..., 0], 1.0).log_prob(y).sum(-1, keepdim=True)
    for data in ((y, prior), [y, prior]):
        torch.testing.assert_close(JointDensity(model, data, plate=False)(z), expected)


def test_a_plate_above_everything_may_still_be_one_datapoint() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, z = torch.randn(5), torch.randn(3, 1, 5)
    expected = (dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)).sum(-1)
    torch.testing.assert_close(JointDensity(model, x, plate=False)(z), expected)


def test_prior_draws_of_a_model_without_a_plate() -> None:
    joint = JointDensity(eight_schools, (EFFECTS, ERRORS), plate=False)
    z = joint.sample_prior(500)
    assert z.shape == (500, 1, 10)
    assert z[..., 0].std() / 5.0 == pytest.approx(1.0, abs=4 / (2 * 500) ** 0.5)


def test_hidden_global_under_a_delta() -> None:
    def guide(y: Tensor, sigma: Tensor) -> None:
        pyro.sample("mu", dist.Delta(pyro.param("mu_map", torch.tensor(4.0))))
        pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with pyro.plate("schools", len(y)):
            pyro.sample("theta", dist.Normal(y, sigma))

    with pytest.raises(InputError, match="site 'mu': a Delta in the guide has no density"):
        GuideDensity(guide, (EFFECTS, ERRORS), eight_schools, plate=False)


def test_a_guide_whose_sites_depend_on_each_other() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), scale).to_event(1))
        pyro.sample("y", dist.Normal(x @ slope, 0.5).to_event(1), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(torch.ones(2), 0.3).to_event(1))
        pyro.sample("scale", dist.LogNormal((x @ slope).mean(), 0.2))

    x, y = torch.randn(9, 2), torch.randn(9)
    joint = JointDensity(model, (x, y), plate=False)
    density = GuideDensity(guide, None, joint)
    assert not density.factorised and not joint.structure.vectorized
    z, log_q = density.sample(5)
    slope = z[:, 0, 1:]
    expected = dist.Normal(1.0, 0.3).log_prob(slope).sum(-1)
    expected += dist.Normal((x @ slope.T).mean(0), 0.2).log_prob(z[:, 0, 0])
    torch.testing.assert_close(log_q[:, 0], expected)
    torch.testing.assert_close(density.log_prob(z)[:, 0], expected)
    assert joint.constrain(z)["slope"].shape == (5, 1, 2)
    torch.testing.assert_close(joint.constrain(z)["scale"], z[..., 0].exp())
