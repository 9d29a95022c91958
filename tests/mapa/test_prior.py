"""The prior recovered from latents: transports against known ones, the models made of them, and refusals."""

from collections.abc import Callable

import pyro
import pytest
import torch
from torch import Tensor, nn

from pyrogaps.errors import InputError
from pyrogaps.log_weights import mcse_of_mean
from pyrogaps.mapa.prior import recovered_prior, recovered_transport
from pyrogaps.models.synthetic import SyntheticModel, divergence

N = 4000


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def skewed(eps: Tensor) -> Tensor:
    """Monotone, skewed, far from 0 and badly scaled."""
    return 100 + 30 * (0.4 * eps + 0.1 * torch.sin(2 * eps)).exp()


def test_known_transform_is_recovered() -> None:
    """Within the sampling error of a quantile of N draws, T'(eps) sqrt(p (1 - p) / N) / density(eps)."""
    transport = recovered_transport(skewed(torch.randn(N, 1)))
    eps = torch.linspace(-2, 2, 41, requires_grad=True)
    (slope,) = torch.autograd.grad(skewed(eps).sum(), eps)
    share = torch.special.ndtr(eps)
    density = torch.distributions.Normal(0.0, 1.0).log_prob(eps).exp()
    error = slope * (share * (1 - share) / N).sqrt() / density
    assert bool(((transport(eps) - skewed(eps)).abs() < 5 * error).all())


@pytest.mark.parametrize("num_pieces", [1, 3, 40])
def test_transport_never_falls(num_pieces: int) -> None:
    latents = torch.cat([torch.randn(300) - 4, torch.randn(200) ** 2, torch.full((50,), 2.0)])
    transport = recovered_transport(latents, num_pieces=num_pieces)
    values = transport(torch.linspace(-8, 8, 4001)[:, None])
    assert values.shape == (4001, 1)
    assert float(values[:, 0].diff().min()) > -1e-9 * float(latents.std())


def test_transport_is_linear_beyond_its_ends() -> None:
    transport = recovered_transport(torch.randn(100).exp())
    outside = transport(torch.linspace(5, 9, 9))
    torch.testing.assert_close(outside.diff().diff(), torch.zeros(7), atol=1e-9, rtol=0)
    ends = transport.breaks[[0, -1]]
    torch.testing.assert_close(transport(ends - 1e-9), transport(ends + 1e-9), atol=1e-6, rtol=0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_model_with_the_recovered_prior_is_the_true_one(sign: float) -> None:
    """A decoder of latents on a scale of their own, either way round: its log p(x) is the truth's once composed."""
    truth, model = SyntheticModel("circle", "exact"), SyntheticModel("circle", "exact")
    _, eps = truth.draw(N, seed=1)
    latents = sign * skewed(eps)

    class Unscaled(nn.Module):
        """f of the noise behind a latent, which is found by interpolation."""

        def __init__(self) -> None:
            super().__init__()
            grid = torch.linspace(-12, 12, 20_001)
            self.register_buffer("grid", grid)
            self.register_buffer("images", skewed(grid))

        def forward(self, z: Tensor) -> Tensor:
            z = sign * z
            right = torch.searchsorted(self.images, z.detach().contiguous()).clamp(1, len(self.grid) - 1)
            low, high = self.images[right - 1], self.images[right]
            inside = self.grid[right - 1] + (z - low) / (high - low) * (self.grid[right] - self.grid[right - 1])
            return truth.decoder(inside.clamp(-12, 12))

    model.decoder = nn.Sequential(recovered_transport(latents), Unscaled())
    x, _ = truth.draw(500, seed=2)
    kl, error = divergence(truth, model, x)
    assert abs(kl) < 4 * error + 1 / N * len(model.decoder[0].breaks)


def test_float32_latents_give_a_float32_transport() -> None:
    latents = torch.randn(100, dtype=torch.float32)
    assert recovered_transport(latents)(latents).dtype == torch.float32
    assert recovered_prior(latents[:, None]).sample().dtype == torch.float32


def test_mixture_is_recovered() -> None:
    """Two Gaussians in the plane, far apart and badly scaled: log p within its sampling error, as a prior in Pyro."""
    scales = torch.tensor([100.0, 0.01])
    truth = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor([0.3, 0.7])),
        torch.distributions.Independent(
            torch.distributions.Normal(torch.tensor([[-3.0, 1.0], [2.0, -2.0]]) * scales, scales), 1
        ),
    )
    prior = recovered_prior(truth.sample((N,)))
    assert prior.mixture_distribution.probs.shape == (2,)
    z = truth.sample((N,))
    difference = truth.log_prob(z) - prior.log_prob(z)
    # Eleven parameters cost half of that over N, in expectation.
    assert abs(float(difference.mean())) < 4 * float(mcse_of_mean(difference)) + 11 / N
    with pyro.plate("data", 5):
        assert pyro.sample("z", prior).shape == (5, 2)


def test_duplicates_are_no_trouble() -> None:
    latents = torch.randn(20).repeat(10)
    assert bool(torch.isfinite(recovered_transport(latents)(torch.randn(100))).all())
    assert bool(torch.isfinite(recovered_prior(latents[:, None]).log_prob(torch.randn(9, 1))).all())


@pytest.mark.parametrize("recovered", [recovered_prior, recovered_transport])
@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.ones(10, 1), "all are equal"),
        (torch.ones(1, 1), "all are equal"),
        (torch.tensor([[0.0], [torch.nan]]), "NaN"),
        (torch.tensor([[0.0], [torch.inf]]), "infinite"),
        (torch.zeros(3, 2, 2), "latents"),
    ],
)
def test_refusals(recovered: Callable[[Tensor], object], latents: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        recovered(latents)


def test_sizes_out_of_range_are_refused() -> None:
    latents = torch.randn(10, 2)
    with pytest.raises(InputError, match="one-dimensional latents"):
        recovered_transport(latents)
    with pytest.raises(InputError, match="num_pieces"):
        recovered_transport(latents[:, 0], num_pieces=0)
    for number in (0, 11):
        with pytest.raises(InputError, match="num_components"):
            recovered_prior(latents, num_components=number)
