"""Draws from the rest of a posterior: unbiased, and of no more variance without replacement."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from pyrogaps.density import IndexedData
from pyrogaps.mapa import MapaPosterior, explainers, log_weights_without_replacement

DRAWS = 5_000


def posterior_of(log_q: Tensor) -> MapaPosterior:
    """Of rows that are sorted already, over as many datapoints as there are columns."""
    indices = torch.arange(log_q.shape[1], dtype=torch.int32).expand(len(log_q), -1)
    return MapaPosterior(IndexedData(len(log_q), lambda rows: (rows,)), indices, log_q.double().log_softmax(1))


def skewed(number: int, spread: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    values = spread * torch.randn(number, generator=generator, dtype=torch.float64)
    return values.sort(descending=True).values.log_softmax(0)


def probability(log_q: Tensor, drawn: tuple[int, ...], first: int | None = None) -> float:
    """That the set `drawn` is drawn without replacement (given that `first` comes first): over all orders in turn."""
    q, total = log_q.exp().tolist(), 0.0
    for order in itertools.permutations(drawn):
        if first is not None and order[0] != first:
            continue
        left, chance = 1.0, 1.0
        for position, i in enumerate(order):
            chance *= 1.0 if first is not None and position == 0 else q[i] / left
            left -= q[i]
        total += chance
    return total


def log_weights_of(log_q: Tensor, drawn: tuple[int, ...]) -> Tensor:
    chosen = list(drawn)
    rest = [i for i in range(len(log_q)) if i not in drawn]
    log_rest = log_q[rest].logsumexp(0, keepdim=True) if rest else torch.full((1,), -torch.inf, dtype=torch.float64)
    return log_weights_without_replacement(log_q[None, chosen], log_rest)[0]


@pytest.mark.parametrize("spread", [0.0, 1.5, 8.0])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_weights_without_replacement_are_murthys(size: int, spread: float) -> None:
    log_q = skewed(5, spread)
    for drawn in itertools.combinations(range(5), size):
        expected = [probability(log_q, drawn, s) / probability(log_q, drawn) for s in drawn]
        weights = log_weights_of(log_q, drawn).exp()
        torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_without_replacement_is_unbiased_and_of_less_variance(size: int) -> None:
    """By enumeration: every set with its probability, every sequence with replacement with its own."""
    log_q = skewed(6)
    f = torch.rand(6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * log_q.exp() + 0.02
    mean = square = 0.0
    for drawn in itertools.combinations(range(6), size):
        estimate = float((log_weights_of(log_q, drawn).exp() * f[list(drawn)]).sum())
        chance = probability(log_q, drawn)
        mean, square = mean + chance * estimate, square + chance * estimate**2
    assert mean == pytest.approx(float(f.sum()), rel=1e-8)
    ratio = f / log_q.exp()
    with_replacement = float((log_q.exp() * (ratio - f.sum()).square()).sum()) / size
    variance = square - mean**2
    if size == 1:
        assert variance == pytest.approx(with_replacement, rel=1e-6)
    else:
        assert variance < 0.9 * with_replacement


def test_weights_stay_right_where_probabilities_are_extreme() -> None:
    log_q = torch.tensor([-1e-9, -400.0, -900.0, -2000.0], dtype=torch.float64)
    # The first takes all: it counts once, and the second stands for itself and what is behind it.
    torch.testing.assert_close(log_weights_of(log_q, (0, 1)), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)
    single = log_weights_of(log_q, (3,))
    torch.testing.assert_close(single, torch.tensor([2000.0], dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("size", "number"), [(1, 3), (8, 1000), (30, 60), (30, 100_000), (100, 200)])
def test_weights_of_equal_probabilities_are_those_of_plain_sampling(size: int, number: int) -> None:
    log_q = torch.full((1, size), -math.log(number), dtype=torch.float64)
    weights = log_weights_without_replacement(log_q, torch.tensor([math.log1p(-size / number)], dtype=torch.float64))
    torch.testing.assert_close(weights.exp(), torch.full_like(weights, number / size), rtol=1e-8, atol=0)


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize(("num_top", "num_samples"), [(0, 2), (1, 1), (2, 3), (3, 5)])
def test_sums_are_unbiased(replacement: bool, num_top: int, num_samples: int) -> None:
    number = 8
    posterior = posterior_of(skewed(number).expand(DRAWS, -1))
    f = torch.rand(number, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    columns, log_weights = explainers(posterior, torch.arange(DRAWS), num_top, num_samples, replacement=replacement)
    assert columns.shape == log_weights.shape == (DRAWS, num_top + num_samples)
    estimates = (log_weights.exp() * f[columns]).sum(1)
    error = float(estimates.std()) / math.sqrt(DRAWS)
    assert abs(float(estimates.mean() - f.sum())) < 4 * error + 1e-8
    if not replacement:
        assert all(len(row.unique()) == num_top + num_samples for row in columns[:50])
        if num_top + num_samples == number:
            assert float(estimates.std()) < 1e-8


@pytest.mark.parametrize("replacement", [True, False])
def test_what_has_no_probability_has_no_weight(replacement: bool) -> None:
    infinite = -torch.inf
    log_q = torch.tensor([[0.0, -1.0, infinite, infinite], [0.0, infinite, infinite, infinite]])
    columns, log_weights = explainers(posterior_of(log_q), torch.tensor([0, 1, 0]), 1, 3, replacement=replacement)
    assert not bool(log_weights.isnan().any())
    weights = log_weights.exp()
    torch.testing.assert_close((weights * (columns == 1)).sum(1), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    assert bool((columns[weights == 0] == 0).all())
    assert bool(((columns < 2) | (weights == 0)).all())
