"""`JointDensity` against hand-written densities, Jacobians and evidences."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.nn.functional import logsigmoid

from pyrogaps import JointDensity

pytestmark = pytest.mark.usefixtures("double")


def dense_log_jacobian(function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """log |det| of the derivative of `function` at each row of `u` `(R, k)`, onto k coordinates, by autograd."""
    rows = [torch.autograd.functional.jacobian(function, row) for row in u]
    return torch.linalg.slogdet(torch.stack(rows)).logabsdet


def test_several_sites_with_different_supports() -> None:
    x = torch.rand(4, 3) + 0.1

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 3.0))
            share = pyro.sample("share", dist.Beta(2.0, 5.0))
            weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
            loc = pyro.sample("loc", dist.Normal(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])).to_event(1))
            mean = loc * weights + share[..., None]
            pyro.sample("x", dist.Normal(mean, rate[..., None]).to_event(1), obs=x)

    joint = JointDensity(model, x)
    assert (joint.plate, joint.dim, joint.num_datapoints) == ("data", 1 + 1 + 2 + 3, 4)
    z = torch.randn(5, 4, 7)
    rate, share = z[..., 0].exp(), z[..., 1].sigmoid()
    simplex = biject_to(constraints.simplex)
    weights, loc = simplex(z[..., 2:4]), z[..., 4:]
    log_prior = dist.Gamma(2.0, 3.0).log_prob(rate) + z[..., 0]
    log_prior += dist.Beta(2.0, 5.0).log_prob(share) + logsigmoid(z[..., 1]) + logsigmoid(-z[..., 1])
    jacobian = dense_log_jacobian(lambda u: simplex(u)[:-1], z[..., 2:4].reshape(-1, 2)).reshape(5, 4)
    log_prior += dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])).log_prob(weights) + jacobian
    log_prior += dist.Normal(0.0, torch.tensor([1.0, 2.0, 3.0])).log_prob(loc).sum(-1)
    log_likelihood = dist.Normal(loc * weights + share[..., None], rate[..., None]).log_prob(x).sum(-1)
    found = joint.terms(z)
    torch.testing.assert_close(found[0], log_prior)
    torch.testing.assert_close(found[1], log_likelihood)
    torch.testing.assert_close(joint(z), log_prior + log_likelihood)
    values = joint.constrain(z)
    for name, value in {"rate": rate, "share": share, "weights": weights, "loc": loc}.items():
        torch.testing.assert_close(values[name], value)


def test_matrix_valued_supports() -> None:
    x = torch.randn(3, 3)
    covariance = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 1.5]])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            mean = pyro.sample("mean", dist.MultivariateNormal(torch.zeros(3), covariance))
            factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
            pyro.sample("x", dist.MultivariateNormal(mean, scale_tril=factor), obs=x)

    joint = JointDensity(model, x)
    z = torch.randn(2, 3, 6)
    to_factor, lower = biject_to(constraints.corr_cholesky), torch.tril_indices(3, 3, -1)
    factor = to_factor(z[..., 3:])
    jacobian = dense_log_jacobian(lambda u: to_factor(u)[lower[0], lower[1]], z[..., 3:].reshape(-1, 3)).reshape(2, 3)
    expected = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(z[..., :3])
    expected += dist.LKJCholesky(3, 2.0).log_prob(factor) + jacobian
    expected += dist.MultivariateNormal(z[..., :3], scale_tril=factor).log_prob(x)
    torch.testing.assert_close(joint(z), expected)
    torch.testing.assert_close(joint.constrain(z)["factor"], factor)


def test_events_of_several_dimensions() -> None:
    x = torch.randn(4, 2, 3)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(2, 3), 1.0).to_event(2))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(2), obs=x)

    joint = JointDensity(model, x)
    z = torch.randn(3, 4, 6)
    u = z.reshape(3, 4, 2, 3)
    expected = (dist.Normal(0.0, 1.0).log_prob(u) + dist.Normal(u.exp(), 0.5).log_prob(x)).sum((-1, -2))
    torch.testing.assert_close(joint(z), expected)
    assert joint.constrain(z)["z"].shape == (3, 4, 2, 3)


def poisson_gamma(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        rate = pyro.sample("z", dist.Gamma(2.5, 1.5))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def bernoulli_beta(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        share = pyro.sample("z", dist.Beta(2.0, 3.0))
        pyro.sample("x", dist.Binomial(10, share), obs=x)


def bernoulli_uniform(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        share = pyro.sample("z", dist.Uniform(0.0, 2.0))
        pyro.sample("x", dist.Binomial(10, share / 2), obs=x)


def gamma_exponential(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        rate = pyro.sample("z", dist.Exponential(2.0))
        pyro.sample("x", dist.Gamma(3.0, rate), obs=x + 1.0)


def normal_normal(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(1.0, 2.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def transformed_prior(x: Tensor) -> None:
    prior = dist.TransformedDistribution(dist.Gamma(2.5, 3.0), [torch.distributions.transforms.ExpTransform().inv])
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", prior)
        pyro.sample("x", dist.Poisson(2 * z.exp()), obs=x)


def negative_binomial(x: Tensor, shape: float, rate: float) -> Tensor:
    return dist.GammaPoisson(shape, rate).log_prob(x)


EVIDENCES: list[tuple[Callable[[Tensor], None], Callable[[Tensor], Tensor]]] = [
    (poisson_gamma, lambda x: negative_binomial(x, 2.5, 1.5)),
    (bernoulli_beta, lambda x: dist.BetaBinomial(2.0, 3.0, total_count=10).log_prob(x)),
    (bernoulli_uniform, lambda x: torch.full_like(x, -math.log(11.0))),
    (gamma_exponential, lambda x: math.log(6.0) + 2 * (x + 1).log() - 4 * (x + 3).log()),
    (normal_normal, lambda x: dist.Normal(1.0, math.sqrt(4.25)).log_prob(x)),
    (transformed_prior, lambda x: negative_binomial(x, 2.5, 1.5)),
]


@pytest.mark.parametrize(("model", "log_evidence"), EVIDENCES)
def test_the_density_integrates_to_the_evidence(model: Any, log_evidence: Any) -> None:
    x = torch.tensor([0.0, 1.0, 4.0, 9.0])
    joint = JointDensity(model, x)
    grid = torch.linspace(-20, 20, 40_001)
    log_joint = joint(grid[:, None, None].expand(-1, 4, 1))
    integral = torch.logsumexp(log_joint, 0) + math.log(40 / 40_000)
    torch.testing.assert_close(integral, log_evidence(x), rtol=1e-7, atol=1e-7)


CIRCULAR = {
    "VonMises": lambda u: dist.VonMises(u, 1.5),
    "VonMises, scaled": lambda u: dist.TransformedDistribution(
        dist.VonMises(u, 1.5), [dist.transforms.AffineTransform(1.0, -2.0)]
    ),
    "SineSkewed": lambda u: dist.SineSkewed(dist.VonMises(u[:, None], 1.5).to_event(1), 0.4 + 0 * u[:, None]),
}


@pytest.mark.parametrize("kind", CIRCULAR)
def test_distributions_on_the_circle_have_one_turn(kind: str) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", CIRCULAR[kind](x))
            pyro.sample("x", dist.Normal(0 * z.reshape(len(x)), 1.0), obs=x)

    x = torch.tensor([0.0, 0.7, 3.0], dtype=torch.float64)  # the last density is cut within its peak
    grid = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    log_joint = JointDensity(model, x)(grid[:, None, None].expand(-1, 3, 1))
    integral = torch.logsumexp(log_joint, 0) + math.log(40 / 40_000)
    torch.testing.assert_close(integral, dist.Normal(0.0, 1.0).log_prob(x), rtol=0, atol=1e-6)


def test_a_pair_of_angles_has_one_turn_each() -> None:
    def angles(x: Tensor) -> Any:
        one = torch.ones_like(x)
        return dist.SineBivariateVonMises(x, -x, 1.5 * one, one, 0.5 * one)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", angles(x))
            pyro.sample("x", dist.Normal(0 * z.sum(-1), 1.0), obs=x)

    x, u = torch.tensor([0.0, 2.0]).double(), torch.tensor([[[-5.0, 0.5], [1.0, 6.0]]]).double()
    value = math.pi * (2 * u.sigmoid() - 1)
    log_jacobian = (2 * math.pi * u.sigmoid() * (-u).sigmoid()).log().sum(-1)
    joint = JointDensity(model, x)
    torch.testing.assert_close(joint.constrain(u)["z"], value)
    torch.testing.assert_close(joint.terms(u)[0], angles(x).log_prob(value) + log_jacobian)


def test_factor_and_deterministic() -> None:
    x = torch.randn(4, 3)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            twice = pyro.deterministic("twice", 2 * z)
            pyro.deterministic("vector", z[:, None] * torch.ones(3), event_dim=1)
            pyro.factor("tilt", -z.abs())
            pyro.factor("constant", torch.tensor(-1.5))
            pyro.sample("x", dist.Normal(twice[:, None], 1.0).expand([len(x), 3]).to_event(1), obs=x)

    z = torch.randn(2, 4, 1)
    u = z[..., 0]
    expected = dist.Normal(0.0, 1.0).log_prob(u) - u.abs() - 1.5
    expected += dist.Normal(2 * z, 1.0).log_prob(x).sum(-1)
    joint = JointDensity(model, x)
    torch.testing.assert_close(joint(z), expected)
    assert list(joint.sites) == ["z"]


def test_prior_draws_lie_in_unconstrained_space() -> None:
    x = torch.tensor([0.0, 2.0, 5.0])
    draws = JointDensity(poisson_gamma, x).sample_prior(4000)
    assert draws.shape == (4000, 3, 1)
    rates = draws.exp()[..., 0]
    error = rates.std(0) / math.sqrt(4000)
    assert ((rates.mean(0) - 2.5 / 1.5).abs() < 4 * error).all()


def test_gradients_reach_z_and_parameters() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(self.slope * z, 1.0), obs=x)

    x, model = torch.randn(3), Model()
    z = torch.randn(2, 3, 1, requires_grad=True)
    JointDensity(model, x)(z).sum().backward()
    residual = x - 2.0 * z.detach()[..., 0]
    torch.testing.assert_close(z.grad[..., 0], -z.detach()[..., 0] + 2.0 * residual)
    torch.testing.assert_close(model.slope.grad, (residual * z.detach()[..., 0]).sum())


def test_indices_may_repeat_and_come_in_any_order() -> None:
    x = torch.randn(6)
    joint = JointDensity(normal_normal, x)
    indices = torch.tensor([5, 0, 0, 3, 5, 2, 1])
    z = torch.randn(3, 7, 1)
    expected = dist.Normal(1.0, 2.0).log_prob(z[..., 0]) + dist.Normal(z[..., 0], 0.5).log_prob(x[indices])
    torch.testing.assert_close(joint(z, indices), expected)
    torch.testing.assert_close(joint(z[:, [4]], indices[[4]]), expected[:, [4]])


def test_a_likelihood_without_a_declared_support() -> None:
    class Tempered(dist.TorchDistribution):
        arg_constraints: ClassVar[dict[str, Any]] = {}

        def __init__(self, loc: Tensor) -> None:
            self.loc = loc
            super().__init__(loc.shape, validate_args=False)

        def log_prob(self, value: Tensor) -> Tensor:
            return -0.5 * (value - self.loc) ** 4

        def expand(self, batch_shape: Any, _instance: Any = None) -> "Tempered":
            return Tempered(self.loc.expand(batch_shape))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", Tempered(z), obs=x)

    x, z = torch.randn(4), torch.randn(2, 4, 1)
    expected = dist.Normal(0.0, 1.0).log_prob(z[..., 0]) - 0.5 * (x - z[..., 0]) ** 4
    torch.testing.assert_close(JointDensity(model, x)(z), expected)
