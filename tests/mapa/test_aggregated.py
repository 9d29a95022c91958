"""The aggregated posterior as a prior: against closed forms, beside the rank map, and refusals."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from pyrogaps.errors import InputError
from pyrogaps.mapa.aggregated import FLOOR, aggregated_masses, aggregated_transport
from pyrogaps.mapa.prior import recovered_transport
from pyrogaps.models.synthetic import SyntheticModel, divergence


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def log_normal(x: Tensor, z: Tensor, scale: float) -> Tensor:
    """log N(x_n; z_g, scale^2), `(N, G)`."""
    return torch.distributions.Normal(z, scale).log_prob(x[:, None])


def test_one_step_from_a_flat_prior_is_a_kernel_density() -> None:
    """With f(z) = z, p(z|x_n) is the kernel N(z; x_n, scale^2): T takes quantiles of the noise to those of its mean."""
    x, z, scale = torch.randn(40) * 2 + 1, torch.linspace(-14, 16, 6001), 0.3
    transport = aggregated_transport(log_normal(x, z, scale), z)
    share = torch.linspace(0.01, 0.99, 99)
    reached = torch.distributions.Normal(x, scale).cdf(transport(torch.special.ndtri(share))[:, None]).mean(1)
    assert float((reached - share).abs().max()) < FLOOR


def test_steps_from_a_normal_likelihood_tend_to_the_prior() -> None:
    """Quantiles of x ~ N(0, 1 + v) in place of draws: EM's variance goes from 1 + 2 v towards that of the prior, 1.

    From a flat prior the first step has variance 1 + 2 v. A Normal prior of variance s becomes one of
    s v / (s + v) + (s / (s + v))^2 (1 + v).
    """
    variance, number = 0.5, 4000
    share = (torch.arange(number) + 0.5) / number
    x, z = torch.special.ndtri(share) * math.sqrt(1 + variance), torch.linspace(-9, 9, 801)
    log_likelihood = log_normal(x, z, math.sqrt(variance))
    expected = 1 + 2 * variance
    for num_steps in range(1, 6):
        masses = aggregated_masses(log_likelihood, num_steps)
        assert float((masses * z.square()).sum()) == pytest.approx(expected, abs=2e-3)
        gain = expected / (expected + variance)
        expected = expected * variance / (expected + variance) + gain**2 * (1 + variance)


def test_the_likelihood_never_falls() -> None:
    log_likelihood = 3 * torch.randn(30, 50)
    values = [
        float((log_likelihood + aggregated_masses(log_likelihood, k).log()).logsumexp(1).mean()) for k in range(12)
    ]
    assert all(after > before for before, after in itertools.pairwise(values))


def test_a_hole_has_no_mass() -> None:
    """Two groups of latents: the rank map leaves mass between them, the aggregated posterior the floor alone."""
    z, x = torch.linspace(-12, 12, 241), torch.cat([torch.randn(200) - 8, torch.randn(300) + 8])
    transport = aggregated_transport(log_normal(x, z, 0.2), z)
    eps = torch.special.ndtri((torch.arange(20_000) + 0.5) / 20_000)
    between = {T: float((T(eps).abs() < 3).double().mean()) for T in (transport, recovered_transport(x, num_pieces=8))}
    aggregated, ranks = between.values()
    assert aggregated < FLOOR < 0.01 < ranks


def test_a_likelihood_in_another_unit_changes_nothing() -> None:
    """Neither a constant of the datapoint nor a wide spread of log-likelihoods matters."""
    x, z = torch.randn(20), torch.linspace(-5, 5, 101)
    log_likelihood = log_normal(x, z, 0.02)
    shifted = aggregated_masses(log_likelihood - 5000 * torch.rand(20, 1), 2)
    torch.testing.assert_close(shifted, aggregated_masses(log_likelihood, 2))


def test_true_decoder_gives_the_true_model() -> None:
    """A decoder with its latent on another scale, a circle: log p(x) is the truth's up to what the sample determines.

    A prior with about as many parameters as the circle has standard deviations of noise, P = 63, costs about
    P / (2 N) nats; the bound is twice that.
    """

    class Scaled(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return torch.cat([(z / 7).cos(), (z / 7).sin()], -1)

    truth, model = SyntheticModel("circle", "exact"), SyntheticModel("circle", "exact")
    x, number = truth.draw(4000, seed=1)[0], 4000
    z = torch.linspace(0, 14 * math.pi, 201)
    log_likelihood = -(x[:, None] - Scaled()(z[:, None])).square().sum(-1) / (2 * truth.variance)
    model.decoder = nn.Sequential(aggregated_transport(log_likelihood, z), Scaled())
    kl, error = divergence(truth, model, truth.draw(1000, seed=2)[0])
    assert abs(kl) < 63 / number + 4 * error


def test_dtype_is_the_grids() -> None:
    z = torch.linspace(0, 1, 5, dtype=torch.float32)
    assert aggregated_transport(torch.zeros(3, 5), z)(z).dtype == torch.float32


@pytest.mark.parametrize(
    ("log_likelihood", "z", "message"),
    [
        (torch.zeros(3, 1), torch.zeros(1), "z: the grid must have shape"),
        (torch.zeros(3, 2), torch.zeros(2), "z: the grid must have shape"),
        (torch.zeros(3, 4), torch.arange(3.0), r"log_likelihood: expected shape \(N, 3\)"),
        (torch.full((2, 3), math.nan), torch.arange(3.0), "log_likelihood: it is NaN"),
        (torch.full((2, 3), -math.inf), torch.arange(3.0), "log_likelihood: it is NaN"),
    ],
)
def test_refusals(log_likelihood: Tensor, z: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        aggregated_transport(log_likelihood, z)
