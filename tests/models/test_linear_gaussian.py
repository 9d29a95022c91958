"""The closed forms against each other, against torch's distributions and against quadrature."""

import math

import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from pyrogaps.errors import InputError
from pyrogaps.models.linear_gaussian import LinearGaussian


@pytest.fixture
def model() -> LinearGaussian:
    """Anisotropic in everything, so that a transposed or misplaced scale shows."""
    weight = torch.tensor([[1.5, 0.3], [-0.4, 1.1], [0.8, 0.9]], dtype=torch.float64)
    return LinearGaussian(weight, bias=[0.5, -1.0, 0.2], noise_scale=[0.4, 1.3, 0.7], prior_scale=[2.0, 0.6])


@pytest.fixture
def x() -> Tensor:
    return torch.tensor([[1.0, -0.5, 2.0], [-2.0, 0.3, 0.1], [0.0, 4.0, -1.5], [0.2, 0.2, 0.2]], dtype=torch.float64)


def posterior(model: LinearGaussian, x: Tensor) -> MultivariateNormal:
    return MultivariateNormal(*model.posterior(x))


def joint_on_grid(model: LinearGaussian, x: Tensor) -> tuple[Tensor, Tensor, float]:
    """log p(x, z) of one `x` by Pyro's own trace on a grid of z, the grid, and a cell's area."""
    line = torch.linspace(-12, 12, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    conditioned = poutine.condition(model, data={"z": grid})
    trace = poutine.trace(conditioned).get_trace(x.expand(len(grid), -1))
    trace.compute_log_prob()
    log_joint = trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]
    return log_joint.detach(), grid, float((line[1] - line[0]) ** 2)


def test_evidence_and_posterior_match_quadrature(model: LinearGaussian, x: Tensor) -> None:
    for row, evidence, mean in zip(x[:2], model.log_evidence(x), model.posterior(x)[0], strict=False):
        log_joint, grid, area = joint_on_grid(model, row)
        log_mass = log_joint.logsumexp(0) + math.log(area)
        weights = (log_joint - log_joint.logsumexp(0)).exp()
        torch.testing.assert_close(log_mass, evidence, atol=1e-8, rtol=0)
        torch.testing.assert_close(weights @ grid, mean, atol=1e-8, rtol=0)
        centred = grid - mean
        torch.testing.assert_close(centred.T @ (weights[:, None] * centred), model.posterior(x)[1], atol=1e-8, rtol=0)


def test_evidence_matches_the_marginal_normal(model: LinearGaussian, x: Tensor) -> None:
    covariance = (model.weight * model.prior_scale**2) @ model.weight.T + (model.noise_scale**2).diag()
    torch.testing.assert_close(model.log_evidence(x), MultivariateNormal(model.bias, covariance).log_prob(x))


def test_elbo_of_the_posterior_is_the_evidence(model: LinearGaussian, x: Tensor) -> None:
    mean, covariance = model.posterior(x)
    tril = torch.linalg.cholesky(covariance)
    torch.testing.assert_close(model.elbo(x, mean, scale_tril=tril), model.log_evidence(x))


@pytest.mark.parametrize("batched", [False, True])
def test_elbo_falls_short_by_the_divergence(model: LinearGaussian, x: Tensor, batched: bool) -> None:
    torch.manual_seed(0)
    shape = (len(x), 2, 2) if batched else (2, 2)
    tril = torch.randn(shape, dtype=torch.float64).tril(-1) + torch.diag_embed(torch.rand(shape[:-1]).double() + 0.3)
    q = MultivariateNormal(torch.randn(len(x), 2, dtype=torch.float64), scale_tril=tril)
    gap = model.log_evidence(x) - model.elbo(x, q.mean, scale_tril=tril)
    torch.testing.assert_close(gap, kl_divergence(q, posterior(model, x)))


def test_elbo_takes_diagonal_scales(model: LinearGaussian, x: Tensor) -> None:
    mean, scale = torch.ones(len(x), 2, dtype=torch.float64), torch.tensor([0.3, 1.7], dtype=torch.float64)
    by_tril = model.elbo(x, mean, scale_tril=scale.diag())
    torch.testing.assert_close(model.elbo(x, mean, scale=scale), by_tril)
    torch.testing.assert_close(model.elbo(x, mean, scale=scale.expand(len(x), 2)), by_tril)


def test_elbo_matches_monte_carlo(model: LinearGaussian, x: Tensor) -> None:
    torch.manual_seed(1)
    q = Normal(torch.full((2,), 0.3).double(), torch.tensor([0.5, 0.8]).double())
    z = q.sample(torch.Size([4000]))
    rows = x[:1].expand(len(z), -1)
    trace = poutine.trace(poutine.condition(model, data={"z": z})).get_trace(rows)
    trace.compute_log_prob()
    draws = (trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"] - q.log_prob(z).sum(-1)).detach()
    standard_error = float(draws.std()) / math.sqrt(len(z))
    exact = model.elbo(x[:1], q.mean[None], scale=q.stddev).detach()
    assert abs(float(draws.mean() - exact)) < 4 * standard_error


def test_gaps_of_the_mean_field_family(model: LinearGaussian, x: Tensor) -> None:
    mean, scale = model.mean_field_optimum(x)
    best = model.elbo(x, mean, scale=scale)
    torch.testing.assert_close(model.log_evidence(x) - best, model.approximation_gap().expand(len(x)))
    for factor in (0.97, 1.03):
        assert (model.elbo(x, mean * factor, scale=scale) < best).all()
        assert (model.elbo(x, mean, scale=scale * factor) < best).all()
    other, width = mean + torch.tensor([0.2, -0.5]), scale * torch.tensor([0.5, 1.8])
    gap = model.amortization_gap(x, other, width)
    torch.testing.assert_close(gap, best - model.elbo(x, other, scale=width))
    torch.testing.assert_close(model.amortization_gap(x, mean, scale), torch.zeros(len(x), dtype=torch.float64))


def test_no_approximation_gap_in_one_dimension() -> None:
    model = LinearGaussian([[2.0], [1.0]], noise_scale=[0.5, 2.0])
    assert abs(model.approximation_gap().item()) < 1e-6


def test_random_is_reproducible_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = LinearGaussian.random(5, 3, seed=1), LinearGaussian.random(5, 3, seed=1)
    torch.testing.assert_close(first.weight, second.weight, atol=0, rtol=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first.weight, LinearGaussian.random(5, 3, seed=2).weight)


def test_sites_are_in_the_data_plate(model: LinearGaussian, x: Tensor) -> None:
    trace = poutine.trace(model).get_trace(x)
    for name in ("z", "x"):
        assert [frame.name for frame in trace.nodes[name]["cond_indep_stack"]] == ["data"]
    assert trace.nodes["z"]["value"].shape == (4, 2)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"weight": [1.0, 2.0]}, "weight"),
        ({"weight": [[1.0], [2.0]], "bias": [1.0, 2.0, 3.0]}, "bias"),
        ({"weight": [[1.0], [2.0]], "noise_scale": [1.0, 0.0]}, "noise_scale"),
        ({"weight": [[1.0], [2.0]], "prior_scale": -1.0}, "prior_scale"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], word: str) -> None:
    with pytest.raises(InputError, match=word):
        LinearGaussian(**arguments)  # type: ignore[arg-type]


def test_elbo_needs_one_scale(model: LinearGaussian, x: Tensor) -> None:
    with pytest.raises(InputError, match="either scale or scale_tril"):
        model.elbo(x, torch.zeros(4, 2))
