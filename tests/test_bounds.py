"""ELBO and IWAE against closed forms; what they are invariant to; what they refuse."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyrogaps import bounds, elbo, iwae
from pyrogaps.errors import InputError
from pyrogaps.log_weights import log_mean_exp
from tests.references import (
    NearPosterior,
    WrongEncoder,
    anisotropic,
    assert_exact,
    counts,
    draws_of,
    gamma_poisson,
    gamma_poisson_evidence,
    gamma_poisson_posterior,
    parabola,
    parabola_evidence,
)


class GammaEncoder(nn.Module):
    """The exact Gamma posterior times a learned factor on its shape: kind (b) on a positive support."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def at(self, x: Tensor) -> dist.Gamma:
        exact = gamma_poisson_posterior(x)
        return dist.Gamma(exact.concentration * self.factor, exact.rate)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("intensity", self.at(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("data_dim", "latent_dim", "decades"), [(8, 3, 0.6), (50, 10, 0.6), (20, 4, 3.0)])
def test_elbo_and_iwae_of_a_linear_model(data_dim: int, latent_dim: int, decades: float, dtype: torch.dtype) -> None:
    model = anisotropic(data_dim, latent_dim, decades=decades, dtype=dtype)
    exact = anisotropic(data_dim, latent_dim, decades=decades)
    x, _ = draws_of(model, 12)
    guide = NearPosterior(model)
    mean, scale_tril = (part.double() for part in guide.parameters_of(x))
    truth = exact.elbo(x.double(), mean, scale_tril=scale_tril)
    lower, tight = (bound(model, guide, x, num_particles=2000) for bound in (elbo, iwae))
    assert_exact(lower.value, lower.mcse, truth, dtype)
    assert_exact(tight.value, tight.mcse, exact.log_evidence(x.double()), dtype)
    assert float((exact.log_evidence(x.double()) - truth).detach().min()) > 4 * float(lower.mcse.max())
    assert lower.direction == tight.direction == "lower bound"


def test_elbo_of_a_wrong_encoder() -> None:
    model = anisotropic(8, 3)
    x, _ = draws_of(model, 12)
    guide = WrongEncoder(model)
    mean, scale = guide.parameters_of(x)
    lower = elbo(model, guide, x, num_particles=20_000)
    assert_exact(lower.value, lower.mcse, model.elbo(x, mean, scale=scale))


def test_elbo_and_iwae_of_a_gamma_posterior() -> None:
    x, guide = counts().double(), GammaEncoder(1.3)
    divergence = kl_divergence(guide.at(x), gamma_poisson_posterior(x)).detach()
    lower, tight = (bound(gamma_poisson, guide, x, num_particles=4000) for bound in (elbo, iwae))
    assert float(divergence.min()) > 4 * float(lower.mcse.max())
    assert_exact(lower.value, lower.mcse, gamma_poisson_evidence(x) - divergence)
    assert_exact(tight.value, tight.mcse, gamma_poisson_evidence(x))


def test_iwae_of_two_modes() -> None:
    x = torch.tensor([-1.0, 0.5, 2.0, 4.0], dtype=torch.float64)

    def wide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.5))

    tight = iwae(parabola, wide, x, num_particles=8000)
    assert_exact(tight.value, tight.mcse, parabola_evidence(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_exact_posterior_has_no_gap_and_no_variance(dtype: torch.dtype) -> None:
    model = anisotropic(8, 3, dtype=dtype)
    x, _ = draws_of(model, 5)
    _, covariance = model.posterior(x)
    factor = torch.linalg.cholesky(covariance).detach()

    def posterior(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(model.posterior(x)[0].detach(), scale_tril=factor))

    for bound in (elbo, iwae):
        estimate = bound(model, posterior, x, num_particles=50)
        tolerance = 1e-10 if dtype == torch.float64 else 2e-4
        torch.testing.assert_close(estimate.value, model.log_evidence(x).detach().double(), atol=tolerance, rtol=0)
        assert float(estimate.mcse.max()) < tolerance


def test_iwae_grows_with_particles_in_expectation() -> None:
    """Means over 512 datapoints, each step up by more than four standard errors, and none above the evidence."""
    model = anisotropic(8, 3)
    x, _ = draws_of(model, 512)
    guide = WrongEncoder(model)
    log_weights = iwae(model, guide, x, num_particles=256).log_weights
    assert log_weights is not None
    bounds = [torch.stack([log_mean_exp(part) for part in log_weights.split(k)]).mean(0) for k in (1, 4, 16, 64)]
    for lower, higher in zip(bounds, [*bounds[1:], model.log_evidence(x).detach()], strict=True):
        rise = higher - lower
        assert float(rise.mean()) > 4 * float(rise.std()) / math.sqrt(512)


def test_batches_and_neighbours_change_nothing() -> None:
    model = anisotropic(8, 3)
    x, _ = draws_of(model, 150)
    guide = WrongEncoder(model)
    whole = iwae(model, guide, x, num_particles=200, batch_size=256)
    batched = iwae(model, guide, x, num_particles=200, batch_size=64)
    assert batched.log_weights is not None
    torch.testing.assert_close(batched.log_weights, whole.log_weights, rtol=1e-12, atol=1e-12)
    first = iwae(model, guide, x[:64], num_particles=200)
    torch.testing.assert_close(first.value, whole.value[:64], rtol=1e-12, atol=1e-12)
    other = iwae(model, guide, x, num_particles=200, seed=1)
    assert float((other.value - whole.value).abs().min()) > 0


def test_more_particles_begin_with_the_same_ones() -> None:
    model = anisotropic(8, 3)
    x, _ = draws_of(model, 5)
    few, many = (elbo(model, WrongEncoder(model), x, num_particles=number).log_weights for number in (128, 300))
    assert few is not None and many is not None
    torch.testing.assert_close(many[:128], few, rtol=1e-12, atol=1e-12)


def test_the_callers_random_state_is_kept() -> None:
    model = anisotropic(8, 3)
    x, _ = draws_of(model, 5)
    before = torch.get_rng_state()
    elbo(model, WrongEncoder(model), x, num_particles=10)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_subsampled_plate_scales_nothing() -> None:
    """Pyro's own IWAE exceeds log p(x) here: it puts the plate's scale N / n inside the logarithm."""
    x = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def subsampled(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x[index]), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as index:
            pyro.sample("z", dist.Normal(0.4 * x[index], 0.9))

    estimate = iwae(subsampled, guide, x, num_particles=4000)
    assert_exact(estimate.value, estimate.mcse, dist.Normal(0.0, math.sqrt(2)).log_prob(x))


def test_weights_that_are_not_numbers_name_their_datapoints() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            offset = torch.where((x > 10) & (z.abs() > 1.5), torch.full_like(z, math.nan), torch.zeros_like(z))
            pyro.sample("x", dist.Normal(z + offset, 1.0, validate_args=False), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))

    x = torch.zeros(70)
    x[66] = 20.0
    with pytest.raises(InputError, match="datapoints 66: log p"):
        elbo(model, guide, x, num_particles=100)


def test_many_values_come_from_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers, and no word where a model cannot be recorded."""
    model = anisotropic(6, 3)
    x, _ = draws_of(model, 70)
    few = iwae(model, WrongEncoder(model), x, num_particles=200)
    monkeypatch.setattr(bounds, "RECORDING_THRESHOLD", 1)
    many = iwae(model, WrongEncoder(model), x, num_particles=200)
    torch.testing.assert_close(few.log_weights, many.log_weights, rtol=1e-10, atol=1e-10)
    branching = iwae(BranchingModel(model), WrongEncoder(model), x, num_particles=200)
    torch.testing.assert_close(few.log_weights, branching.log_weights, rtol=1e-10, atol=1e-10)


class BranchingModel:
    """A model whose control flow depends on what it draws, so that no record can be made of it."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> None:
        trace = pyro.poutine.trace(self.model).get_trace(x)
        for name in trace.stochastic_nodes:
            assert float(trace.nodes[name]["value"].detach().abs().max()) < 1e6
