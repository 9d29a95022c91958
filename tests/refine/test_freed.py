"""Kind (b): a factorised guide's distributions with their own parameters freed, distribution by distribution."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyrogaps import GuideDensity, JointDensity, Refinement, elbo, refine
from pyrogaps.refine import own_family
from pyrogaps.refine.parameters import FREE_PARAMETERS
from tests.references import (
    anisotropic,
    assert_exact,
    counts,
    draws_of,
    gamma_poisson,
    gamma_poisson_evidence,
)

STEPS = Refinement(num_steps=400)


class Learned(nn.Module):
    """A guide of one site: `build(raw)` of a learned linear function of the data."""

    def __init__(self, build: Callable[[Tensor], Any], data_dim: int, size: int, site: str = "z") -> None:
        super().__init__()
        self.build, self.site = build, site
        self.encoder = nn.Linear(data_dim, size).double()
        with torch.no_grad():
            self.encoder.weight.mul_(0.1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample(self.site, self.build(self.encoder(x.reshape(len(x), -1)).exp()))


def real(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
        pyro.sample(
            "x", dist.Normal(z @ torch.tensor([[1.0, 0.5], [0.5, -1.0]], dtype=x.dtype), 0.7).to_event(1), obs=x
        )


def positive(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(torch.full((2,), 2.0, dtype=x.dtype), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.8).to_event(1), obs=x)


def heavy(x: Tensor) -> None:
    """Tails so heavy that guides without a variance have an ELBO."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Cauchy(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
        pyro.sample("x", dist.Cauchy(z, 0.7).to_event(1), obs=x)


def heavy_positive(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.HalfCauchy(torch.ones(2, dtype=x.dtype)).to_event(1))
        pyro.sample("x", dist.Cauchy(z, 0.7).to_event(1), obs=x)


BUILDS: dict[str, tuple[Callable[..., None], int, Callable[[Tensor], Any]]] = {
    "Normal": (real, 4, lambda r: dist.Normal(r[..., :2].log(), r[..., 2:]).to_event(1)),
    "Laplace": (real, 4, lambda r: dist.Laplace(r[..., :2].log(), r[..., 2:]).to_event(1)),
    "Gumbel": (real, 4, lambda r: dist.Gumbel(r[..., :2].log(), r[..., 2:]).to_event(1)),
    "Cauchy": (heavy, 4, lambda r: dist.Cauchy(r[..., :2].log(), 0.1 * r[..., 2:]).to_event(1)),
    "StudentT": (real, 6, lambda r: dist.StudentT(4 + r[..., :2], r[..., 2:4].log(), r[..., 4:]).to_event(1)),
    "MultivariateNormal": (
        real, 4, lambda r: dist.MultivariateNormal(r[..., :2].log(), scale_tril=torch.diag_embed(r[..., 2:]))
    ),
    "LowRankMultivariateNormal": (
        real, 6, lambda r: dist.LowRankMultivariateNormal(r[..., :2].log(), 0.1 * r[..., 2:4, None], r[..., 4:])
    ),
    "LogNormal": (positive, 4, lambda r: dist.LogNormal(r[..., :2].log(), r[..., 2:]).to_event(1)),
    "Gamma": (positive, 4, lambda r: dist.Gamma(2 * r[..., :2], r[..., 2:]).to_event(1)),
    "Weibull": (positive, 4, lambda r: dist.Weibull(r[..., :2], 1 + r[..., 2:]).to_event(1)),
    "Exponential": (positive, 2, lambda r: dist.Exponential(r).to_event(1)),
    "HalfNormal": (positive, 2, lambda r: dist.HalfNormal(r).to_event(1)),
    "HalfCauchy": (heavy_positive, 2, lambda r: dist.HalfCauchy(0.3 * r).to_event(1)),
}  # fmt: skip


def beta_binomial(x: Tensor) -> None:
    """p ~ Beta(2, 1), 10 trials: conjugate."""
    with pyro.plate("data", len(x)):
        p = pyro.sample("z", dist.Beta(torch.tensor(2.0, dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Binomial(10, p), obs=x[:, 0])


def dirichlet_multinomial(x: Tensor) -> None:
    """p ~ Dirichlet(1, 2, 3), counts of 12: conjugate."""
    with pyro.plate("data", len(x)):
        p = pyro.sample("z", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)))
        pyro.sample("x", dist.Multinomial(12, p), obs=x)


def test_every_distribution_of_the_registry_is_tried() -> None:
    assert {*BUILDS, "Beta", "Dirichlet"} == set(FREE_PARAMETERS)


@pytest.mark.parametrize("name", list(BUILDS))
def test_refining_raises_the_bound(name: str) -> None:
    """Every distribution of the registry can be rebuilt and refined, with parameters for each datapoint."""
    model, size, build = BUILDS[name]
    torch.manual_seed(0)
    x = torch.tensor([[0.5, 1.0], [2.0, 0.3], [1.5, 2.5]], dtype=torch.float64)
    guide = Learned(build, 2, size)
    joint = JointDensity(model, x)
    assert own_family(GuideDensity(guide, None, joint)).kind == "freed"
    refined = refine(model, guide, x, settings=STEPS)
    before, after = (elbo(model, g, x, num_particles=4000, seed=s) for s, g in enumerate((guide, refined)))
    rise = (after.value - before.value) / torch.hypot(before.mcse, after.mcse)
    assert float(rise.min()) > -4
    assert float(rise.max()) > 4
    assert type(_leaf(refined)).__name__ == name
    assert refined.parts[0].axes and all(len({*p.shape} & {3}) for p in refined.parts[0].parameters)


def _leaf(refined: Any) -> Any:
    (fn,) = refined.at(torch.arange(3)).distributions.values()
    return getattr(fn, "base_dist", fn)


def test_gamma_guides_find_gamma_posteriors() -> None:
    x = counts().double()
    guide = Learned(lambda r: dist.Gamma(r[..., 0], r[..., 1]), 2, 2, "intensity")
    refined = refine(gamma_poisson, guide, x)
    bound = elbo(gamma_poisson, refined, x, num_particles=2000)
    assert_exact(bound.value, bound.mcse, gamma_poisson_evidence(x))


def test_beta_guides_find_beta_posteriors() -> None:
    x = torch.tensor([[0.0], [3.0], [10.0]], dtype=torch.float64)
    refined = refine(beta_binomial, Learned(lambda r: dist.Beta(r[..., 0], r[..., 1]), 1, 2), x)
    bound = elbo(beta_binomial, refined, x, num_particles=2000)

    def log_beta(a: Tensor, b: Tensor) -> Tensor:
        return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)

    k = x[:, 0]
    choose = math.lgamma(11) - torch.lgamma(k + 1) - torch.lgamma(11 - k)
    exact = choose + log_beta(2 + k, 11 - k) - log_beta(torch.tensor(2.0), torch.tensor(1.0))
    assert_exact(bound.value, bound.mcse, exact, torch.float32)


def test_inverse_gamma_guides_find_inverse_gamma_posteriors() -> None:
    """A variance: of a base that is a distribution of torch's. p(x) is Student's t, and the family holds p(z | x)."""

    def variance(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.InverseGamma(torch.full((len(x),), 3.0, dtype=x.dtype), 2.0))
            pyro.sample("x", dist.Normal(0.0, z.sqrt()), obs=x)

    x = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    guide = Learned(lambda raw: dist.InverseGamma(1.0 + raw[:, 0], raw[:, 1]), 1, 2)
    refined = refine(variance, guide, x, settings=STEPS, referee=False)
    exact = dist.StudentT(6.0, 0.0, (2.0 / 3.0) ** 0.5).log_prob(x)
    bound = elbo(variance, refined, x, num_particles=400).value
    assert ((bound - exact).abs() < 0.01).all()


def test_dirichlet_guides_find_dirichlet_posteriors() -> None:
    x = torch.tensor([[0.0, 4, 8], [3.0, 3, 6], [10.0, 1, 1]], dtype=torch.float64)
    refined = refine(dirichlet_multinomial, Learned(lambda r: dist.Dirichlet(r), 3, 3), x)
    bound = elbo(dirichlet_multinomial, refined, x, num_particles=2000)
    exact = dist.DirichletMultinomial(torch.tensor([1.0, 2.0, 3.0]).double(), 12).log_prob(x)
    assert_exact(bound.value, bound.mcse, exact)


def test_a_low_rank_covariance_holds_a_posterior_of_its_rank() -> None:
    """In two dimensions one factor and a diagonal are any covariance: no gap."""
    x = torch.tensor([[0.5, 1.0], [2.0, 0.3], [1.5, 2.5]], dtype=torch.float64)
    refined = refine(real, Learned(BUILDS["LowRankMultivariateNormal"][2], 2, 6), x)
    W = torch.tensor([[1.0, 0.5], [0.5, -1.0]]).double()
    exact = dist.MultivariateNormal(torch.zeros(2).double(), W.T @ W + 0.49 * torch.eye(2).double()).log_prob(x)
    bound = elbo(real, refined, x)
    assert_exact(bound.value, bound.mcse, exact)


def test_a_constant_scale_stays_constant() -> None:
    """What neither varies nor is learned is part of the family; the location finds its best all the same."""
    model = anisotropic(8, 3)
    x, _ = draws_of(model, 5)
    mean, best = (part.detach() for part in model.mean_field_optimum(x))
    constant = torch.tensor([0.6, 0.9, 1.1]) * best
    refined = refine(model, Learned(lambda r: dist.Normal(r.log(), constant).to_event(1), 8, 3), x)
    assert torch.equal(_leaf_of(refined).scale.expand(5, 3), constant.expand(5, 3))
    assert len(refined.parts[0].parameters) == 1
    bound = elbo(model, refined, x, num_particles=4000)
    assert_exact(bound.value, bound.mcse, model.elbo(x, mean, scale=constant))


def _leaf_of(refined: Any) -> Any:
    (fn,) = refined.at(torch.arange(refined.joint.num_datapoints)).distributions.values()
    return fn.base_dist


def test_what_varies_is_found_on_the_data_set_not_on_a_chunk() -> None:
    """A scale that varies in the data set, but not in its first block."""
    model = anisotropic(8, 3)
    x, _ = draws_of(model, 70)

    def guide(x: Tensor) -> None:
        scale = 0.5 + (x[:, :1] > 1e6) * 1.0
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :3], scale.expand(-1, 3)).to_event(1))

    family = own_family(GuideDensity(guide, None, JointDensity(model, x)))
    assert family.varies == {"z": {"loc"}}
    x[-1, 0] = 2e6
    family = own_family(GuideDensity(guide, None, JointDensity(model, x)))
    assert family.varies == {"z": {"loc", "scale"}}


def test_parameters_without_dimensions() -> None:
    """One latent of the whole data set, its posterior N(3/5, 1/5): q* is exact, and so is L[q*]."""
    x = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)

    def model(x: Tensor) -> None:
        f = pyro.sample("f", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
        pyro.sample("x", dist.Normal(f, 1.0).expand([4]).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.3, dtype=torch.float64))
        pyro.sample("f", dist.Normal(loc, pyro.param("scale", torch.tensor(1.0, dtype=torch.float64))))

    guide(x)
    refined = refine(model, guide, (x,), plate=False, settings=Refinement(num_steps=400))
    z, log_q = refined.sample(4000)
    exact = dist.Normal(torch.tensor(0.6, dtype=torch.float64), 0.2**0.5)
    assert abs(float(z.mean()) - 0.6) < 5 * float(z.std()) / 4000**0.5
    torch.testing.assert_close(log_q, exact.log_prob(z[..., 0]), rtol=0.05, atol=0.05)
