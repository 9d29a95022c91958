"""Log-weight arithmetic. Whether intervals cover as they say is in test_reliable.py."""

import math
from collections.abc import Callable

import pytest
import torch
from arviz_stats.base import array_stats  # type: ignore[attr-defined]

from pyrogaps.log_weights import (
    Estimate,
    effective_sample_size,
    hall_interval,
    log_mean_exp,
    log_mean_exp_estimate,
    mcse_of_log_mean_exp,
    mcse_of_mean,
    mean_estimate,
    pareto_khat,
    rounding_error,
    skewed_interval,
)


def test_values_by_hand() -> None:
    log_weights = torch.tensor([[0.0, 1.0], [math.log(3.0), 1.0]])
    torch.testing.assert_close(
        log_mean_exp(log_weights), torch.tensor([math.log(2.0), 1.0]).double(), atol=1e-7, rtol=0
    )
    torch.testing.assert_close(effective_sample_size(log_weights), torch.tensor([1.6, 2.0]).double(), atol=1e-6, rtol=0)
    # weights 1 and 3: sample variance 2, standard error of their mean 1, over the mean 2
    torch.testing.assert_close(mcse_of_log_mean_exp(log_weights), torch.tensor([0.5, 0.0]).double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(mcse_of_mean(torch.tensor([[1.0], [4.0]])), torch.tensor([1.5]).double())


def test_one_draw_has_no_error() -> None:
    estimate = mean_estimate(torch.zeros(1, 3))
    assert torch.isnan(estimate.mcse).all()
    assert not estimate.reliable.any()


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_far_from_zero(shift: float) -> None:
    log_weights = torch.randn(50, 4, dtype=torch.float64)
    torch.testing.assert_close(log_mean_exp(log_weights + shift), log_mean_exp(log_weights) + shift)
    torch.testing.assert_close(
        effective_sample_size(log_weights + shift), effective_sample_size(log_weights), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        hall_interval(log_weights + shift, 0.95)[0], hall_interval(log_weights, 0.95)[0] + shift, rtol=1e-9, atol=1e-6
    )


def test_single_precision_weights_are_summed_in_double() -> None:
    log_weights = 1e-3 * torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0)) - 90
    exact = log_weights.double().exp().mean().log()
    assert abs(float(log_mean_exp(log_weights) - exact)) < 1e-12


def test_khat_orders_tails() -> None:
    """Weights of a Pareto tail of shape k have k-hat near k; of 4,000 draws its error is about 0.1."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(4000, 20, generator=generator, dtype=torch.float64)
    for k in (0.3, 0.9):
        found = pareto_khat(-k * uniform.log())
        assert abs(float(found.mean()) - k) < 4 * float(found.std()) / math.sqrt(20)
        assert float(found.std()) < 0.2


@pytest.mark.parametrize("number", [25, 225, 226, 2000])
def test_khat_is_that_of_arviz(number: int) -> None:
    """Of tails that are bounded, light and heavy, and of both rules for the size of the tail."""
    normal = torch.randn(number, 4, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    log_weights = torch.cat([-normal.square(), normal, 10 * normal], 1)
    expected = array_stats.psislw(-log_weights.numpy().T)[1]  # type: ignore[no-untyped-call]
    torch.testing.assert_close(pareto_khat(log_weights), torch.as_tensor(expected), rtol=0, atol=1e-10)


def test_khat_of_the_heaviest_tails_is_large() -> None:
    """Most of the tail is below the smallest double, relative to the largest weight."""
    khat = pareto_khat(1e4 * torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)))
    assert (khat > 1).all()
    assert khat.isfinite().all()


def test_khat_is_undefined_without_a_tail() -> None:
    few, constant = torch.randn(24, 1), torch.zeros(200, 1)
    two_valued = (torch.arange(200) % 2).double()[:, None]
    infinite = torch.randn(200, 1)
    infinite[0] = -math.inf
    for log_weights in (few, constant, two_valued, infinite):
        assert torch.isnan(pareto_khat(log_weights)).all()


@pytest.mark.parametrize("probability", [0.5, 0.95])
def test_hall_interval_inverts_its_cubic(probability: float) -> None:
    """At the ends of the interval g(T) is the t quantile, computed here from the definition."""
    from scipy import stats

    generator = torch.Generator().manual_seed(1)
    log_weights = 0.6 * torch.randn(40, 5, generator=generator, dtype=torch.float64)
    weights = log_weights.exp()
    mean, deviation = weights.mean(0), weights.std(0)
    skew = torch.tensor(stats.skew(weights.numpy(), bias=False))
    quantile = stats.t.ppf(0.5 + probability / 2, 39)
    for end, expected in zip(hall_interval(log_weights, probability), (quantile, -quantile), strict=True):
        T = math.sqrt(40) * (mean - end.exp()) / deviation
        g = T + skew / (6 * math.sqrt(40)) * (2 * T**2 + 1) + skew**2 / (27 * 40) * T**3
        torch.testing.assert_close(g, torch.full_like(g, expected))


def test_interval_of_constant_weights_is_a_point() -> None:
    low, high = log_mean_exp_estimate(torch.full((30, 2), -3.0, dtype=torch.float64)).interval()
    torch.testing.assert_close(low, torch.full((2,), -3.0).double())
    torch.testing.assert_close(high, low)


@pytest.mark.parametrize("estimate", [mean_estimate, log_mean_exp_estimate])
def test_no_error_is_below_the_rounding_of_the_terms(estimate: Callable[..., Estimate]) -> None:
    """Single precision at 1e5 has steps of 0.008, and log-weights that are differences of such terms no finer."""
    log_weights = torch.full((30, 2), -1e5)
    least = 1e5 * 2**-23
    constant = estimate(log_weights)
    torch.testing.assert_close(constant.mcse, torch.full((2,), least).double())
    low, high = constant.interval()
    torch.testing.assert_close(high - low, torch.full((2,), 2 * least).double().maximum(high - low))
    assert float((high - constant.value).min()) >= least
    rounding = rounding_error(torch.full((30, 2), -1e5), torch.full((30, 2), 1e4, dtype=torch.float64))
    torch.testing.assert_close(rounding, torch.full((2,), least).double(), rtol=1e-6, atol=0)
    near = estimate(torch.full((30, 2), -3.0), rounding=rounding)
    assert float(near.mcse.min()) >= least
    low, high = near.interval()
    assert float((high - near.value).min()) >= least
    assert float((near.value - low).min()) >= least
    # Draws of weight zero, or next to it, have no size.
    far = torch.full((30, 2), -3.0)
    far[0] = -1e30
    assert float(log_mean_exp_estimate(far).mcse.max()) < 1
    assert torch.equal(rounding_error(torch.tensor([[-math.inf], [2.0]])), torch.tensor([2 * 2**-23]).double())


def test_the_upper_end_allows_for_one_more_largest_draw() -> None:
    log_weights = torch.tensor([1.0, 1.0, 2.0, 4.0], dtype=torch.float64).log()[:, None]
    low, high = skewed_interval(log_weights, 0.95)
    plain = hall_interval(log_weights, 0.95)
    assert torch.equal(low, plain[0])
    # mean 2, largest 4: (4 / 2 - 1) / 5
    torch.testing.assert_close(high - plain[1], torch.tensor([math.log(1.2)]).double())


def test_mean_intervals_are_student_t() -> None:
    """Of 5 Normal draws, 95% of 4,000 intervals cover to four binomial standard errors; Normal quantiles give 88%."""
    draws = torch.randn(5, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = mean_estimate(draws).interval()
    covered = float(((low <= 0) & (high >= 0)).double().mean())
    assert abs(covered - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 4000)


def test_an_estimate_without_draws_has_no_interval() -> None:
    estimate = Estimate(torch.zeros(2), torch.ones(2), "upper bound")
    assert torch.isnan(torch.stack(estimate.interval())).all()
    assert not estimate.reliable.any()


def test_khat_of_weights_with_few_values_is_silent() -> None:
    """As of a guide that is exact but for rounding in single precision."""
    log_weights = torch.full((1000, 1), -3.0)
    log_weights[::100] += 1e-6
    pareto_khat(log_weights)
