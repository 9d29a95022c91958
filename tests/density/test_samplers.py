"""What the library draws follows the density that it scores, for every distribution whose own sampler does not.

A sampler of density p gives E[q(x) / p(x)] = 1 for every density q on its support; here q are Normals in unconstrained
space near draws, so that a sampler that is wrong anywhere shows.
"""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyrogaps as pg
from pyrogaps.density.samplers import SAMPLERS, exact
from pyrogaps.density.supports import bijection

pytestmark = pytest.mark.usefixtures("double")

t = torch.tensor


def sine(rho: float) -> Any:
    return dist.SineBivariateVonMises(t(0.3), t(-0.5), t(2.0), t(3.0), t(rho))


WRONG = {
    "LKJCholesky 3": lambda: dist.LKJCholesky(3, 1.0),
    "LKJCholesky 5": lambda: dist.LKJCholesky(5, 2.5),
    "LKJ": lambda: dist.LKJ(3, 1.0),
    "a mixture": lambda: dist.MixtureSameFamily(dist.Categorical(t([0.3, 0.7])), dist.LKJCholesky(3, t([1.0, 4.0]))),
    "SineBivariateVonMises": lambda: sine(1.0),
    "SineBivariateVonMises negative": lambda: sine(-2.0),
    "SineSkewed": lambda: dist.SineSkewed(sine(1.0), t([0.3, -0.5])),
    "TruncatedPolyaGamma": lambda: dist.TruncatedPolyaGamma(t(1.0)),
}
# A cheap part of a sweep over all that torch and Pyro bring; of these only their own samplers are used.
RIGHT = {
    "StudentT": lambda: dist.StudentT(3.0, 0.3, 2.0),
    "Kumaraswamy": lambda: dist.Kumaraswamy(2.0, 3.0),
    "InverseGamma": lambda: dist.InverseGamma(3.0, 2.0),
    "VonMises": lambda: dist.VonMises(0.5, 2.0),
    "ContinuousBernoulli": lambda: dist.ContinuousBernoulli(t(0.2)),
    "AsymmetricLaplace": lambda: dist.AsymmetricLaplace(0.3, 1.2, 1.7),
    "SoftAsymmetricLaplace": lambda: dist.SoftAsymmetricLaplace(0.3, 1.2, 1.7, 0.6),
    "SkewLogistic": lambda: dist.SkewLogistic(0.3, 1.2, 1.7),
    "Dirichlet": lambda: dist.Dirichlet(t([0.7, 2.0, 3.0])),
    "MultivariateStudentT": lambda: dist.MultivariateStudentT(t(4.0), t([0.2, 0.5]), t([[1.0, 0.0], [0.5, 0.8]])),
    "LogisticNormal": lambda: dist.LogisticNormal(t([0.2, 0.5]), t([0.7, 0.9])),
    "MixtureOfDiagNormals": lambda: dist.MixtureOfDiagNormals(
        t([[0.0, 1.0], [2.0, 0.0]]), t([[1.0, 0.5], [0.7, 1.0]]), t([0.3, -0.2])
    ),
    "OMTMultivariateNormal": lambda: dist.OMTMultivariateNormal(t([0.2, 0.5]), t([[1.0, 0.0], [0.5, 0.8]])),
    "LKJCholesky 2": lambda: dist.LKJCholesky(2, 1.0),
}


def worst(fn: Any, own: Any, number: int = 20000) -> float:
    """By how many standard errors the worst of 12 ratios differs from 1, for draws of `own` scored by `fn`."""
    transform, x = bijection(fn, "z"), own.sample((number,))
    u = transform.inv(x)
    log_p = (fn.log_prob(x).reshape(number, -1).sum(-1)) + transform.log_abs_det_jacobian(u, x).reshape(number, -1).sum(
        -1
    )
    u = u.reshape(number, -1)
    low, high = u.quantile(0.25, 0), u.quantile(0.75, 0)
    errors = []
    for centre in u[:12].clamp(low, high):
        ratio = (dist.Normal(centre, 0.5 * (high - low)).log_prob(u).sum(-1) - log_p).exp()
        errors.append(abs(float((ratio.mean() - 1) / ratio.std())) * number**0.5)
    return max(errors)


@pytest.mark.parametrize("name", WRONG)
def test_draws_follow_the_density(name: str) -> None:
    fn = WRONG[name]()
    assert worst(fn, exact(fn)) < 4.5
    assert exact(fn).sample((3, 2)).shape == fn.sample((3, 2)).shape


@pytest.mark.parametrize("name", ["LKJCholesky 3", "LKJ", "SineBivariateVonMises", "SineSkewed", "TruncatedPolyaGamma"])
def test_the_check_finds_the_samplers_that_do_not(name: str) -> None:
    fn = WRONG[name]()
    assert worst(fn, fn) > 5


@pytest.mark.parametrize("name", RIGHT)
def test_other_samplers_are_right(name: str) -> None:
    fn = RIGHT[name]()
    assert worst(fn, exact(fn)) < 4.5


def test_no_class_is_patched() -> None:
    before = {name: getattr(dist, name).sample for name in SAMPLERS if hasattr(dist, name)}
    fn = dist.LKJCholesky(3, t([1.0, 2.0])).expand([4, 2])
    assert exact(fn) is not fn and "sample" not in fn.__dict__
    assert exact(fn).sample((5,)).shape == (5, 4, 2, 3, 3)
    assert exact(normal := dist.Normal(0.0, 1.0)) is normal
    assert before == {name: getattr(dist, name).sample for name in before}


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
        pyro.sample("x", dist.Normal(factor[..., 2, :2], 0.1).to_event(1), obs=x)


def second_moments(values: Tensor) -> None:
    """C[2, 0]^2 and C[2, 1]^2 have the mean 1/6 at concentration 2: their sum is Beta(1, 2), with the mean 1/3."""
    error = values.square().std(0) / len(values) ** 0.5
    assert ((values.square().mean(0) - 1 / 6).abs() < 4 * error).all()
    assert (4 * error < 0.214 - 1 / 6).all()


def test_every_draw_from_the_prior() -> None:
    x = torch.zeros(4000, 2)
    joint = pg.JointDensity(model, x)
    drawn = joint.sample_prior(1)
    second_moments(joint.constrain(drawn)["factor"][0, :, 2, :2])
    data, z = pg.density.simulate.simulate(joint)
    second_moments(joint.constrain(z[None])["factor"][0, :, 2, :2])
    (fetched,) = pg.SimulatedData(model, x).fetch(torch.arange(4000))
    for simulated in (data, fetched):
        values = simulated.square() - 0.01
        error = values.std(0) / 4000**0.5
        assert ((values.mean(0) - 1 / 6).abs() < 4 * error).all()


def test_evidence_from_the_prior_and_a_guide_that_is_the_prior() -> None:
    """log p(x) by quadrature: (C[2, 0], C[2, 1]) is uniform in direction, its squared length Beta(1, 2)."""
    x = t([[0.3, -0.2], [0.7, 0.5]])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("factor", dist.LKJCholesky(3, 2.0))

    grid = torch.linspace(-1, 1, 801)
    point = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1)
    square = point.square().sum(-1)
    density = torch.where(square < 1, 2 * (1 - square).clamp(min=0) / math.pi, torch.zeros(()))
    likelihood = dist.Normal(point[..., None, :], 0.1).log_prob(x).sum(-1).exp()
    right = ((density[..., None] * likelihood).sum((0, 1)) * (grid[1] - grid[0]) ** 2).log()
    found = pg.iwae(model, guide, x, num_particles=20000)
    assert ((found.value - right).abs() < 4 * found.mcse).all()
    assert (found.mcse < 0.05).all()
