"""The discretised logistic: masses, tails, gradients, draws and support."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyrogaps import InputError, JointDensity
from pyrogaps.density.simulate import simulate
from pyrogaps.likelihoods.discretised_logistic import DiscretisedLogistic

DTYPES = (torch.float32, torch.float64)
GREY = torch.arange(256).double() / 255
LOCS = (-30.0, -0.2, 0.0, 0.2, 0.5, 1.0, 1.001, 40.0)
SCALES = (1e-6, 1e-3, 0.1, 3.0, 1e6)


def grid(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every location with every scale, each `(40,)`."""
    pairs = torch.cartesian_prod(torch.tensor(LOCS, dtype=dtype), torch.tensor(SCALES, dtype=dtype))
    return pairs[:, 0], pairs[:, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_masses_sum_to_one_wherever_and_however_wide(dtype: torch.dtype) -> None:
    q = DiscretisedLogistic(*grid(dtype))
    log_masses = q.log_prob(q.enumerate_support())
    total = log_masses.logsumexp(0)
    assert log_masses.dtype == dtype and log_masses.shape == (256, 40)
    assert log_masses.isfinite().all() and (log_masses <= 0).all()
    # A bin's edge is rounded at the size of the location, which counts in units of the scale.
    rounding = torch.finfo(dtype).eps * (256 + q.loc.abs() / q.scale)
    assert (total.abs() <= rounding).all()


def test_masses_are_differences_of_the_logistic_cdf() -> None:
    loc, scale = torch.tensor(0.3).double(), torch.tensor(0.04).double()
    inner = (torch.arange(255).double() + 0.5) / 255
    edges = torch.cat([torch.tensor([-math.inf]).double(), inner, torch.tensor([math.inf]).double()])
    cdf = torch.sigmoid((edges - loc) / scale)
    torch.testing.assert_close(DiscretisedLogistic(loc, scale).log_prob(GREY).exp(), cdf.diff(), rtol=1e-9, atol=1e-15)


def test_tails_are_exact_where_differences_of_the_cdf_are_zero() -> None:
    # P(k/255) = exp(-|edge - m| / s) (1 - exp(-1 / (255 s))), up to a factor of 1 + exp(-|edge - m| / s).
    q = DiscretisedLogistic(torch.tensor(0.5), torch.tensor(1e-3))
    upper, lower = (100 + 0.5) / 255, (200 - 0.5) / 255
    width = math.log1p(-math.exp(-1 / 0.255))
    expected = torch.tensor([(upper - 0.5) / 1e-3 + width, (0.5 - lower) / 1e-3 + width])
    torch.testing.assert_close(q.log_prob(torch.tensor([100, 200]) / 255), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_finite(dtype: torch.dtype) -> None:
    loc, scale = (value.requires_grad_() for value in grid(dtype))
    gradients = torch.autograd.grad(
        DiscretisedLogistic(loc, scale).log_prob(GREY[:, None].to(dtype)).sum(), [loc, scale]
    )
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_gradients_are_right() -> None:
    values = torch.tensor([0.0, 3 / 255, 128 / 255, 1.0]).double()
    loc, scale = (torch.tensor(value).double().requires_grad_() for value in (0.4, 0.03))
    assert torch.autograd.gradcheck(lambda *at: DiscretisedLogistic(*at).log_prob(values), (loc, scale))


@pytest.mark.parametrize("loc", [-0.02, 0.4, 1.2])
def test_draws_follow_the_masses(loc: float) -> None:
    pyro.set_rng_seed(0)
    q = DiscretisedLogistic(torch.tensor(loc), torch.tensor(0.05))
    draws = q.sample((20_000,))
    assert q.support.check(draws).all()
    levels = (255 * draws).round().long()
    torch.testing.assert_close(draws, levels / 255, rtol=0, atol=0)
    # Pearson's statistic over levels that 20 draws or more are expected at: chi-squared, here nearly Normal.
    expected = 20_000 * q.log_prob(q.enumerate_support()).exp()
    seen = expected >= 20
    statistic = ((torch.bincount(levels, minlength=256) - expected) ** 2 / expected)[seen].sum()
    freedom = int(seen.sum())
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_shapes_and_expansion() -> None:
    q = DiscretisedLogistic(torch.zeros(4, 1), torch.ones(3))
    assert q.batch_shape == (4, 3) and q.event_shape == ()
    assert q.sample((2,)).shape == q.log_prob(GREY[:2, None, None].float()).shape == (2, 4, 3)
    wide = q.expand([5, 4, 3])
    assert isinstance(wide, DiscretisedLogistic) and wide.batch_shape == wide.scale.shape == (5, 4, 3)
    assert q.to_event(1).log_prob(torch.zeros(4, 3)).shape == (4,)
    assert q.enumerate_support(expand=False).shape == (256, 1, 1)
    assert DiscretisedLogistic(0.5, 0.1).sample().shape == ()


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="scale"):
        DiscretisedLogistic(torch.zeros(2), torch.tensor([1.0, 0.0]))
    q = DiscretisedLogistic(torch.zeros(2), torch.ones(2))
    for value in (0.5, -1 / 255, 256 / 255, 17.0, math.nan):
        with pytest.raises(ValueError, match="support"):
            q.log_prob(torch.full((2,), value))
    assert q.expand([3, 2])._validate_args
    DiscretisedLogistic(torch.zeros(2), torch.ones(2), validate_args=False).log_prob(torch.tensor(0.5))


def test_grey_values_are_recognised_in_every_precision() -> None:
    for values in (GREY, GREY.float(), torch.arange(256).float() / 255, torch.arange(256).float() * (1 / 255)):
        assert DiscretisedLogistic.support.check(values).all()


class Grey(nn.Module):
    """z ~ N(0, 1) shifts the mean of three pixels."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pixels = DiscretisedLogistic((0.5 + 0.1 * z)[..., None].expand(x.shape), x.new_tensor(0.1))
            pyro.sample("x", pixels.to_event(1), obs=x)


def test_the_library_takes_grey_values_alone_and_simulates_them() -> None:
    x = torch.tensor([[0.0, 12.0, 255.0], [128.0, 7.0, 99.0]]) / 255
    joint = JointDensity(Grey(), x)
    assert joint(torch.zeros(1, 2, 1)).isfinite().all()
    drawn, _ = simulate(joint)
    assert DiscretisedLogistic.support.check(drawn).all()
    with pytest.raises(InputError, match=r"site 'x': .*, such as 128, lie outside .* DiscretisedLogistic"):
        JointDensity(Grey(), 255 * x)
