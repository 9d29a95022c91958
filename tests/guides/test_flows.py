"""Coupling flows, amortized and per datapoint: densities that integrate to one, bounds against exact evidence."""

from typing import Any

import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import ComposeTransform

from pyrogaps import AIS, GuideDensity, InputError, Refinement, decompose, elbo, refine, train
from pyrogaps.guides.couplings import MAX_LOG_SCALE
from pyrogaps.guides.flows import AmortizedFlow, AutoLocalFlow
from pyrogaps.models.vae import VAE
from pyrogaps.problem import Problem
from pyrogaps.refine import own_family
from pyrogaps.run import Run
from pyrogaps.streams import chunks
from tests.references import (
    anisotropic,
    banana,
    banana_evidence,
    counts,
    draws_of,
    gamma_poisson,
    grid_of_plane,
    two_wells,
    two_wells_evidence,
)

X = torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64)


def stir(guide: nn.Module, size: float = 0.3) -> None:
    """Move every parameter, so that a flow is one."""
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(size * torch.randn_like(parameter))


def flow_of_plane(x: Tensor, hidden: int = 8) -> AmortizedFlow:
    guide = AmortizedFlow(1, 2, (8,), "Tanh", flow_hidden=hidden).to(x.dtype)
    stir(guide)
    return guide


def local_flow(model: Any, x: Tensor) -> AutoLocalFlow:
    guide = AutoLocalFlow(model, init_scale=0.7)
    guide(x)
    stir(guide, 0.1)
    return guide


@pytest.mark.parametrize("make", [lambda: flow_of_plane(X), lambda: local_flow(banana, X)], ids=["amortized", "local"])
def test_density_integrates_to_one(make: Any) -> None:
    points, log_area = grid_of_plane(15.0, 301)
    density = GuideDensity(make(), X, banana)
    with torch.no_grad():
        pieces = points[:, None].expand(-1, len(X), -1).split(1000)  # at once, the wide networks would take gigabytes
        log_q = torch.cat([density.log_prob(piece) for piece in pieces])
    assert float((torch.logsumexp(log_q, 0) + log_area).abs().max()) < 2e-3  # of the quadrature


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("latent_dim", [2, 5])
def test_scores_what_it_draws(latent_dim: int, dtype: torch.dtype) -> None:
    model = anisotropic(6, latent_dim, dtype=dtype)
    x = draws_of(model, 3)[0].to(dtype)
    amortized = AmortizedFlow(6, latent_dim, (8,), flow_hidden=7).to(dtype)
    stir(amortized)
    for guide in (amortized, local_flow(model, x)):
        density = GuideDensity(guide, x, model)
        z, log_q = density.sample(50)
        torch.testing.assert_close(density.log_prob(z), log_q, rtol=1e-4, atol=1e-3 if dtype == torch.float32 else 1e-9)


def test_starts_as_a_factorised_normal() -> None:
    model = anisotropic(6, 3)
    x, _ = draws_of(model, 2)
    guide = AutoLocalFlow(model, init_scale=0.3)
    guide(x)
    loc, scale = torch.randn(2, 3, dtype=x.dtype), torch.rand(2, 3, dtype=x.dtype) + 0.1
    guide.start_at(loc, scale)
    z, log_q = GuideDensity(guide, x, model).sample(100)
    expected = torch.distributions.Normal(loc, scale).log_prob(z).sum(-1)
    torch.testing.assert_close(log_q, expected)


def test_the_local_family_starts_at_the_guide() -> None:
    """The same density everywhere, so that the amortization gap cannot come out negative."""
    guide = flow_of_plane(X)
    problem = Problem.of(banana, guide, X)
    joint, density = problem.joint, problem.guide_density()
    family = own_family(density)
    assert family.kind == "local_family"
    start = family.start(joint, chunks(len(X), 64)[0], Run(0))
    z = 3 * torch.randn(20, len(X), 2, dtype=X.dtype)
    torch.testing.assert_close(start.at(torch.arange(len(X))).log_prob(z), density.log_prob(z))


def test_a_trained_local_flow_is_its_own_family_in_its_own_size() -> None:
    guide = AutoLocalFlow(banana, hidden=7, num_steps=1)
    guide(X)
    density = Problem.of(banana, guide, X).guide_density()
    family = own_family(density)
    assert family.family is not None
    other = family.family(banana)
    other(X)
    assert {n: p.shape for n, p in other.named_parameters()} == {n: p.shape for n, p in guide.named_parameters()}
    ledger = decompose(banana, guide, X, refinement=Refinement(num_steps=100), progress=False)
    assert (ledger.per_datapoint["guide_optimization_gap"] > 0).all()  # it was never trained


@pytest.mark.slow
def test_closes_the_gap_of_a_banana() -> None:
    """At least four fifths of what mean-field leaves."""
    ledger = decompose(
        banana,
        flow_of_plane(X),
        X,
        families={"mean-field": AutoNormal, "flow": AutoLocalFlow},
        evidence=AIS(num_chains=2, num_temperatures=2),  # the exact one is used
        refinement=Refinement(num_steps=600, num_particles=32),
        progress=False,
    )
    exact = banana_evidence(X).numpy()
    gaps = exact[:, None] - ledger.per_datapoint["elbo_refined"].values
    errors = ledger.per_datapoint["elbo_refined_mcse"].values
    assert (gaps > -4 * errors).all()  # a bound stays a bound
    own, mean_field, flow = gaps.T
    assert (mean_field > 0.3).all()  # there is something to close
    assert flow.sum() < 0.2 * mean_field.sum()
    assert own.sum() < 0.2 * mean_field.sum()


def test_two_modes_are_bounded() -> None:
    """A flow that starts at one of two modes does not find the other; its bound lies between mean-field and truth."""
    x = torch.tensor([1.0, 3.0], dtype=torch.float64)
    mean_field = elbo(two_wells, refine(two_wells, AutoNormal, x), x)
    flow = elbo(two_wells, refine(two_wells, AutoLocalFlow, x, settings=Refinement(num_steps=300)), x)
    exact = two_wells_evidence(x)
    assert bool((flow.value < exact + 4 * flow.mcse).all())
    assert bool((flow.value > mean_field.value - 4 * (flow.mcse + mean_field.mcse)).all())


@pytest.mark.parametrize("decades", [0.6, 3.0])
def test_never_below_mean_field_on_badly_scaled_posteriors(decades: float) -> None:
    model = anisotropic(20, 4, decades=decades)
    x, _ = draws_of(model, 4)
    settings = Refinement(num_steps=300)
    refined = [refine(model, family, x, settings=settings) for family in (AutoNormal, AutoLocalFlow)]
    mean_field, flow = (elbo(model, guide, x) for guide in refined)
    error = (mean_field.mcse**2 + flow.mcse**2).sqrt()
    assert bool((flow.value > mean_field.value - 4 * error).all())
    assert bool((flow.value < model.log_evidence(x) + 4 * flow.mcse).all())


def test_one_latent_dimension_has_no_halves() -> None:
    with pytest.raises(InputError, match="AutoLocalFlow: a coupling flow needs at least two latent dimensions"):
        refine(gamma_poisson, AutoLocalFlow, counts())


def test_holds_a_correlated_gaussian() -> None:
    """Couplings are affine, so a full covariance lies in the family: no gap is left."""
    model = anisotropic(8, 4)
    x, _ = draws_of(model, 3)
    bound = elbo(model, refine(model, AutoLocalFlow, x, settings=Refinement(num_steps=500)), x)
    gap = model.log_evidence(x).detach() - bound.value
    assert float((gap.abs() - 4 * bound.mcse).max()) < 0.01  # nats that the optimisation may leave
    assert float(model.approximation_gap().detach()) > 0.1


def test_far_away_points_are_not_flung_further() -> None:
    """Scales are bounded: whatever the weights, a unit step of the noise moves z by at most e^(2 per coupling)."""
    guide = flow_of_plane(X)
    stir(guide, 20.0)
    x = torch.tensor([1e3, -1e3], dtype=X.dtype)
    posterior = guide.posterior(x)
    noise = posterior.base_dist.sample((500,))
    flow = ComposeTransform(posterior.transforms)
    z = flow(noise)
    _, scale = guide.parameters_of(x)
    stretch = flow.log_abs_det_jacobian(noise, z) - scale.log().sum(-1)
    assert z.isfinite().all()
    assert float(stretch.detach().abs().max()) <= len(guide.networks) * MAX_LOG_SCALE


def test_trains_like_any_guide() -> None:
    """Pyro's SVI and a decoder that bends: the flow's ELBO ends above the Normal's it started from."""
    guide = AmortizedFlow(1, 2, (16,), "Tanh").to(torch.float64)
    x = torch.linspace(-2, 1, 40, dtype=torch.float64)
    first = elbo(banana, guide, x).value.mean()
    train(banana, guide, x, num_epochs=300, batch_size=40, learning_rate=0.01, progress=False)
    trained = elbo(banana, guide, x)
    assert float(trained.value.mean()) > float(first) + 0.5
    gap = (banana_evidence(x) - trained.value).mean()
    mean_field = elbo(banana, refine(banana, AutoNormal, x), x)
    assert float(gap) < float((banana_evidence(x) - mean_field.value).mean())  # which no Normal encoder could pass


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: AmortizedFlow(6, 1), "AmortizedFlow: a coupling flow needs at least two"),
        (lambda: AmortizedFlow(6, 2, num_steps=0), "AmortizedFlow: a flow needs at least one step"),
        (lambda: AmortizedFlow(6, 2)(torch.zeros(3, 5)), "AmortizedFlow: data_dim is 6, but a datapoint has 5"),
    ],
)
def test_refusals(build: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        build()


def test_nan_in_a_flow_is_refused() -> None:
    x = torch.rand(3, 6).round()
    guide = AmortizedFlow(6, 2, (8,))
    with torch.no_grad():
        guide.networks[1].outer.bias[0] = torch.nan
    model = VAE(6, 2, (8,))
    with pytest.raises(InputError, match=r"networks\.1\.outer\.bias"):
        GuideDensity(guide, x, model)
