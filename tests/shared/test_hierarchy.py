"""Models and guides with latents outside the data plate, taken apart; and those that are one datapoint."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from torch import Tensor

import pyrogaps as pg
from pyrogaps.density.hierarchy import Hierarchy
from pyrogaps.density.shared import SharedLatents
from pyrogaps.streams import Stream
from tests.shared.hierarchies import NOISE, SHARE, Amortised, Backwards, Structured, X, auto_list, hierarchy


def taken_apart(model: Any, guide: Any, data: Any = X, plate: str | None = None) -> Hierarchy:
    with pytest.raises(SharedLatents) as raised:
        pg.Problem.of(model, guide, data, plate)
    assert isinstance(raised.value.hierarchy, Hierarchy)
    return raised.value.hierarchy


def trained(guide: Any, *data: Tensor) -> Any:
    guide(*(data or (X,)))
    return guide


@pytest.mark.parametrize("plate", [None, "d"])
def test_log_ratio_and_density_given_the_draws_are_exact(plate: str | None) -> None:
    parts = taken_apart(hierarchy, Structured(), X, plate)
    assert (parts.plate, parts.names, parts.dim) == ("d", ("m",), 1)
    drawn = parts.draw(7, Stream(0, "test"))
    m = torch.stack([values["m"] for values in drawn.values])
    assert m.shape == (7,)
    expected = dist.Normal(0.0, 1.0).log_prob(m) - dist.Normal(0.5, 0.22).log_prob(m)
    torch.testing.assert_close(drawn.log_ratio, expected.double(), rtol=1e-5, atol=1e-5)
    local = pg.Problem.of(parts.model, parts.guide, parts.at(drawn.values[0]), parts.plate)
    z = torch.randn(5, len(X), 1)
    for problem, value in ((local, m[0]), (local.over(parts.at(drawn.values[3])), m[3])):
        joint = dist.Normal(value, 1.0).log_prob(z[..., 0]) + dist.Normal(z[..., 0], NOISE).log_prob(X)
        torch.testing.assert_close(problem.joint(z), joint, rtol=1e-5, atol=1e-5)
        mean = SHARE * X + (1 - SHARE) * value + 0.1
        q = dist.Normal(mean, 0.6).log_prob(z[..., 0])
        torch.testing.assert_close(problem.guide_density().log_prob(z), q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guide", [lambda: AutoNormal(hierarchy), auto_list])
def test_autoguides_are_taken_apart(guide: Callable[[], Any]) -> None:
    """Their draws are auxiliary sites, of theta too; log q is that of the autoguide's own density."""
    its = trained(guide())
    parts = taken_apart(hierarchy, its)
    drawn = parts.draw(2, Stream(0, "test"))
    local = pg.Problem.of(parts.model, parts.guide, parts.at(drawn.values[0]), parts.plate)
    whole = pg.GuideDensity(its, X, hierarchy, False)
    z = torch.cat([drawn.values[0]["m"].reshape(1), 0.3 * torch.randn(len(X))])
    log_q = local.guide_density().log_prob(z[None, 1:, None]).sum()
    log_q = log_q + parts.posterior.log_prob(z[None, None, :1]).sum()
    torch.testing.assert_close(log_q, whole.log_prob(z[None, None]).sum(), rtol=1e-5, atol=1e-4)
    assert local.guide_density().bound


@pytest.mark.parametrize(
    ("guide", "why"),
    [
        (lambda: trained(AutoMultivariateNormal(hierarchy)), "draws 'm' and the latents in plate 'd' jointly"),
        (lambda: trained(AutoDiagonalNormal(hierarchy)), "jointly"),
        (Amortised, "the guide's 'm' depends on data or local latents"),
        (Backwards, "the guide's 'm' depends on data or local latents"),
    ],
)
def test_what_has_no_split_is_one_datapoint(guide: Callable[[], Any], why: str) -> None:
    its = guide()
    problem = pg.Problem.of(hierarchy, its, X, "d")
    assert (problem.num_datapoints, problem.plate, problem.dim) == (1, None, len(X) + 1)
    (remark,) = problem.remarks
    assert remark.startswith("the numbers are of the data set as one datapoint, because") and why in remark
    torch.testing.assert_close(pg.elbo(problem).value, pg.elbo(hierarchy, its, X, plate=False).value, rtol=0, atol=0)


def test_a_prior_that_depends_on_the_data_is_no_prior() -> None:
    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(x.mean(), 1.0))
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    (remark,) = pg.Problem.of(model, Structured(), X).remarks
    assert "the model's prior of 'm' depends on data or local latents" in remark


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((w * x).sum(-1), 0.3), obs=y)


def minibatched(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x), subsample_size=5) as rows:
        pyro.sample("y", dist.Normal((w * x[rows]).sum(-1), 0.3), obs=y[rows])


@pytest.mark.parametrize("model", [regression, minibatched])
@pytest.mark.parametrize("plate", [None, "data"])
def test_a_regression_is_one_datapoint(model: Any, plate: str | None) -> None:
    """Without plate=False, its data plate subsampled or not."""
    x = torch.randn(20, 2)
    y = x @ torch.tensor([1.0, -2.0]) + 0.3 * torch.randn(20)
    guide = trained(AutoMultivariateNormal(model), x, y)
    found = pg.log_evidence(model, guide, (x, y), plate=plate)
    exact = dist.MultivariateNormal(torch.zeros(20), x @ x.T + 0.09 * torch.eye(20)).log_prob(y)
    assert found.value.shape == (1,)
    assert abs(float(found.value) - float(exact)) < 4 * float(found.mcse)
    assert bool(found.reliable)
    problem = pg.Problem.of(model, guide, (x, y), plate)
    assert problem.remarks[0] == (
        "the numbers are of the data set as one datapoint, because no latent lies in the plate 'data'"
    )


class Bound(torch.nn.Module):
    """Parameters for each datapoint, in a plate of the data set's size, subsampled as the model's is."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = torch.nn.Parameter(SHARE * X)

    def forward(self, x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.5, 0.22))
        with pyro.plate("d", len(X), subsample_size=len(x)) as rows:
            pyro.sample("z", dist.Normal(self.loc[rows] + (1 - SHARE) * m, 0.5))


def test_plates_of_the_data_sets_size() -> None:
    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("d", len(X), subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    parts = taken_apart(model, Bound())
    drawn = parts.draw(1, Stream(0, "test"))
    m = drawn.values[0]["m"]
    expected = dist.Normal(0.0, 1.0).log_prob(m) - dist.Normal(0.5, 0.22).log_prob(m)
    torch.testing.assert_close(drawn.log_ratio[0], expected.double(), rtol=1e-5, atol=1e-5)
    local = pg.Problem.of(parts.model, parts.guide, parts.at(drawn.values[0]), parts.plate)
    z, rows = torch.randn(3, 2, 1), torch.tensor([7, 4])
    q = dist.Normal(SHARE * X[rows] + (1 - SHARE) * m, 0.5).log_prob(z[..., 0])
    torch.testing.assert_close(local.guide_density().log_prob(z, rows), q, rtol=1e-5, atol=1e-5)
    joint = dist.Normal(m, 1.0).log_prob(z[..., 0]) + dist.Normal(z[..., 0], NOISE).log_prob(X[rows])
    torch.testing.assert_close(local.joint(z, rows), joint, rtol=1e-5, atol=1e-5)


def test_constrained_and_structured_shared_latents() -> None:
    """A positive latent, a vector in a plate of its own, and one that depends on another."""

    def model(x: Tensor) -> None:
        tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
        with pyro.plate("groups", 3):
            c = pyro.sample("c", dist.Normal(0.0, tau))
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(c.sum(), tau))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        tau = pyro.sample("tau", dist.Gamma(8.0, 8.0))
        with pyro.plate("groups", 3):
            pyro.sample("c", dist.Normal(0.1, 0.5 * tau))
        with pyro.plate("d", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, tau))

    parts = taken_apart(model, guide)
    assert (parts.names, parts.dim) == (("tau", "c"), 4)
    drawn = parts.draw(3, Stream(0, "test"))
    for values, log_ratio in zip(drawn.values, drawn.log_ratio, strict=True):
        tau, c = values["tau"], values["c"]
        assert (tau.shape, c.shape) == ((), (3,))
        log_p = dist.LogNormal(0.0, 0.5).log_prob(tau) + dist.Normal(0.0, tau).log_prob(c).sum()
        log_q = dist.Gamma(8.0, 8.0).log_prob(tau) + dist.Normal(0.1, 0.5 * tau).log_prob(c).sum()
        torch.testing.assert_close(log_ratio, (log_p - log_q).double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: pg.elbo(hierarchy, Structured(), X),
        lambda: pg.iwae(hierarchy, Structured(), X, plate="d"),
        lambda: pg.log_evidence(hierarchy, None, X),
        lambda: pg.refine(hierarchy, Structured(), X),
        lambda: pg.Problem.of(hierarchy, None, X),
    ],
)
def test_per_datapoint_functions_refuse_with_a_remedy_that_works(call: Callable[[], Any]) -> None:
    with pytest.raises(pg.InputError) as raised:
        call()
    message = str(raised.value)
    assert message.startswith("site 'm': outside the data plate 'd', so shared by all datapoints")
    assert "decompose" in message and "plate=False" in message
    assert pg.elbo(hierarchy, Structured(), X, num_particles=10, plate=False).value.shape == (1,)
