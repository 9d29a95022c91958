"""Bounds on both sides from independent weights, against laws for which both expectations are known.

E[w] = 1 throughout, so log p(x) = 0. The upper bound's expectation is that of the log of a mean of K weights of which
one is drawn from the weighted law; that law is in closed form here, and the expectation is found by simulation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pyrogaps.log_weights import log_mean_exp
from pyrogaps.streams import Chunk, Stream
from pyrogaps.two_sided import TwoSided, _expected, two_sided

NUM_DATAPOINTS, NUM_SIMULATED = 4000, 200_000


@dataclass(frozen=True)
class Law:
    """Log-weights of independent draws, and of draws from the weighted law."""

    draw: Callable[[Tensor], Tensor]
    weighted: Callable[[Tensor], Tensor]
    dim: int = 1

    def log_weights(self, number: int, width: int, generator: torch.Generator) -> Tensor:
        return self.draw(self._noise(number, width, generator))

    def expected(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Simulated log means of `size` weights: as they are, and under the weighted law."""
        draws = self.log_weights(size, NUM_SIMULATED, generator)
        lower = log_mean_exp(draws)
        draws[0] = self.weighted(self._noise(1, NUM_SIMULATED, generator))[0]
        return lower, log_mean_exp(draws)

    def _noise(self, number: int, width: int, generator: torch.Generator) -> Tensor:
        return torch.randn(number, width, self.dim, generator=generator, dtype=torch.float64)


def lognormal(deviation: float) -> Law:
    shift = deviation**2 / 2
    return Law(lambda e: deviation * e[..., 0] - shift, lambda e: deviation * e[..., 0] + shift)


def gaussian(ratio: float, dim: int) -> Law:
    """A Gaussian proposal whose scale is `ratio` times the target's."""

    def log_weight(z: Tensor) -> Tensor:
        return (0.5 * z.square() * (ratio**-2 - 1) + math.log(ratio)).sum(-1)

    return Law(lambda e: log_weight(ratio * e), log_weight, dim)


LAWS = {
    "lognormal 0.5": lognormal(0.5),
    "lognormal 1": lognormal(1.0),
    "lognormal 1.5": lognormal(1.5),
    "Gaussian 0.8, 1-d": gaussian(0.8, 1),
    "Gaussian 1.5, 1-d": gaussian(1.5, 1),
    "Gaussian 0.8, 5-d": gaussian(0.8, 5),
    "Gaussian 1.2, 5-d": gaussian(1.2, 5),
    "Gaussian 1.5, 5-d": gaussian(1.5, 5),
}


def measured(law: Law, number: int, seed: int, *, fresh: bool = True, max_fresh: int = 10**6) -> TwoSided:
    generator = torch.Generator().manual_seed(seed)
    log_weights = law.log_weights(number, NUM_DATAPOINTS, generator)
    return two_sided(
        log_weights,
        lambda rows: torch.rand(rows, NUM_DATAPOINTS, generator=generator, dtype=torch.float64),
        (lambda positions, rows: law.log_weights(rows, len(positions), generator)) if fresh else None,
        max_fresh=max_fresh,
    )


def within_four_errors(values: Tensor, expected: Tensor) -> bool:
    error = math.hypot(float(values.std()) / len(values) ** 0.5, float(expected.std()) / len(expected) ** 0.5)
    return abs(float(values.mean() - expected.mean())) < 4 * error


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("number", [16, 64])
def test_both_bounds_have_the_expectation_of_theory(name: str, number: int) -> None:
    """S = 16 and 64 weights, groups of K = 2 and 8. Of 16 up to a fifth of the datapoints need fresh weights."""
    result = measured(LAWS[name], number, seed=number)
    lower, upper = LAWS[name].expected(number // 8, torch.Generator().manual_seed(1))
    assert result.met.all()
    assert within_four_errors(result.lower, lower)
    assert within_four_errors(result.upper, upper)


def test_one_weight_a_group_gives_the_closed_form() -> None:
    """S = 10, K = 1: E[log w] under the weighted law of log w ~ N(-s^2/2, s^2) is s^2/2."""
    result = measured(lognormal(0.5), 10, seed=3)
    assert abs(float(result.upper.mean()) - 0.125) < 4 * float(result.upper.std()) / NUM_DATAPOINTS**0.5
    assert float((result.num_fresh > 0).double().mean()) > 0.01


@pytest.mark.parametrize("number", [16, 64])
def test_cutting_off_or_dropping_would_bias_downwards(number: int) -> None:
    """Lognormal, s = 1.5. What must not be done, done here: the mean is then 4 standard errors too low, or more."""
    law = lognormal(1.5)
    result = measured(law, number, seed=number)
    _, upper = law.expected(number // 8, torch.Generator().manual_seed(1))
    kept = result.upper[result.num_fresh == 0]
    error = float(kept.std()) / len(kept) ** 0.5
    assert float(kept.mean()) < float(upper.mean()) - 4 * error
    assert 0.03 < float((result.num_fresh > 0).double().mean()) < 0.5


@pytest.mark.parametrize("max_fresh", [0, 16])
def test_there_is_no_bound_where_chains_have_not_met(max_fresh: int) -> None:
    unlimited = measured(lognormal(1.5), 16, seed=16)
    result = measured(lognormal(1.5), 16, seed=16, max_fresh=max_fresh)
    assert (result.num_fresh <= max_fresh).all()
    assert 0 < int((~result.met).sum()) <= int((unlimited.num_fresh > max_fresh).sum())
    for values in (result.upper, result.upper_mcse, result.width):
        assert torch.equal(values == math.inf, ~result.met)
    assert torch.isfinite(result.lower).all()
    if max_fresh == 0:
        assert torch.equal(result.upper, measured(lognormal(1.5), 16, seed=16, fresh=False).upper)


def test_expectation_over_uniforms_is_that_of_the_chains() -> None:
    """Against the two coupled chains run as they are defined, 100,000 times over the same five weights."""
    log_weights = torch.tensor([0.5, -0.3, 0.1, -0.2, 0.2], dtype=torch.float64)
    value, unmet = _expected(log_weights[:, None])
    number = 100_000
    uniform = torch.rand(5, number, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log()
    first, second = log_weights[0].expand(number), log_weights[1].expand(number)
    total, apart = first.clone(), torch.ones(number, dtype=torch.bool)
    for t in range(1, 5):
        first = torch.where(uniform[t] < log_weights[t] - first, log_weights[t], first)
        if t > 1:
            second = torch.where(uniform[t] < log_weights[t] - second, log_weights[t], second)
        apart &= first != second
        total = total + torch.where(apart, first - second, 0.0)
    assert abs(float(total.mean() - value)) < 4 * float(total.std()) / number**0.5
    for j in range(1, 5):
        share = float((apart & (second == log_weights[j])).double().mean())
        assert abs(share - float(unmet[j - 1])) < 4 * (0.25 / number) ** 0.5


# A proposal too narrow has weights of infinite variance from a ratio of 0.71 downwards, and 0.8 is near it.
@pytest.mark.parametrize("name", ["lognormal 0.5", "lognormal 1", "Gaussian 0.8, 1-d", "Gaussian 1.5, 5-d"])
def test_standard_errors_are_those_of_replicates(name: str) -> None:
    """S = 64: the root mean square of stated errors is 0.8 to 1.25 times the spread over 4,000 data sets."""
    result = measured(LAWS[name], 64, seed=7)
    assert 0.8 < float(result.upper_mcse.square().mean().sqrt() / result.upper.std()) < 1.25


def test_bounds_do_not_depend_on_chunks() -> None:
    """Three blocks at once and one after the other, many with fresh weights."""
    law, stream = lognormal(1.5), Stream(0, "uniforms")
    log_weights = law.log_weights(16, 192, torch.Generator().manual_seed(0))

    def bounds(chunk: Chunk) -> TwoSided:
        generators = {n: torch.Generator().manual_seed(n) for n in range(chunk.start, chunk.stop)}

        def more(positions: Tensor, number: int) -> Tensor:
            columns = [law.log_weights(number, 1, generators[chunk.start + n]) for n in positions.tolist()]
            return torch.cat(columns, 1)

        uniforms = stream.noise(chunk, dtype=torch.float64, device=torch.device("cpu")).uniform
        return two_sided(log_weights[:, chunk.start : chunk.stop], uniforms, more)

    whole, parts = bounds(Chunk(0, 192)), [bounds(block) for block in Chunk(0, 192).blocks()]
    assert int((whole.num_fresh > 0).sum()) > 20
    for name in ("lower", "upper", "upper_mcse", "num_fresh"):
        joined = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(joined, getattr(whole, name), rtol=1e-9, atol=1e-12)


def test_bounds_move_with_the_weights_and_close_where_they_are_constant() -> None:
    log_weights = lognormal(1.0).log_weights(64, 10, torch.Generator().manual_seed(0))
    half = torch.full((1, 10), 0.5, dtype=torch.float64)
    near, far = (two_sided(log_weights + shift, lambda rows: half.expand(rows, -1)) for shift in (0.0, -1e5))
    torch.testing.assert_close(far.upper + 1e5, near.upper, rtol=0, atol=1e-8)
    torch.testing.assert_close(far.upper_mcse, near.upper_mcse, rtol=1e-6, atol=1e-8)
    constant = two_sided(torch.full((64, 2), -3.0), lambda rows: half[:, :2])
    assert torch.equal(constant.upper, torch.full((2,), -3.0).double())
    assert float(constant.upper_mcse.abs().max()) < 1e-12
    assert float(constant.width.abs().max()) < 1e-12


def test_groups_of_zero_weights_have_no_upper_bound() -> None:
    log_weights = torch.zeros(64, 3, dtype=torch.float64)
    log_weights[:60, 1] = -math.inf
    log_weights[:, 2] = -math.inf
    result = two_sided(log_weights, lambda rows: torch.full((rows, 3), 0.5), lambda positions, rows: torch.zeros(rows))
    assert result.met.tolist() == [True, False, False]
    assert result.lower.tolist() == [0.0, -math.inf, -math.inf]
    assert (result.num_fresh == 0).all()


@pytest.mark.parametrize("number", range(3, 20))
def test_few_weights(number: int) -> None:
    """Any number of weights from 3 on; constant ones have bounds that coincide."""
    result = two_sided(torch.ones(number, 2), lambda rows: torch.full((rows, 2), 0.5))
    torch.testing.assert_close(result.upper, torch.ones(2).double())
    torch.testing.assert_close(result.width, torch.zeros(2).double(), atol=1e-12, rtol=0)
