"""The best q(y) of a family, against enumeration and numerical optimisation."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from pyrogaps.refine.tables import Factors, elbo_of

STATES = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(2))
CHAIN = torch.tensor([[False, False, False], [True, False, False], [False, True, False]])
FULL = torch.tensor([[False, False, False], [True, False, False], [True, True, False]])


def uniform(rows: int) -> Tensor:
    return torch.log(torch.tensor([1 / 2, 1 / 3, 1 / 2], dtype=torch.float64)).expand(rows, len(STATES), 3)


def bounds(rows: int = 6, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, len(STATES), dtype=torch.float64)


def logits_of(parents: Tensor, params: Tensor) -> Tensor:
    """log q (K,) of a family from free parameters: a softmax for every state of an element's parents."""
    total, used = torch.zeros(len(STATES), dtype=torch.float64), 0
    for element, number in enumerate((2, 3, 2)):
        contexts = torch.zeros(len(STATES), dtype=torch.long)
        if parents[element].any():
            contexts = STATES[:, parents[element]].unique(dim=0, return_inverse=True)[1]
        table = params[used : used + number * (int(contexts.max()) + 1)].reshape(-1, number).log_softmax(-1)
        used += table.numel()
        total = total + table[contexts, STATES[:, element]]
    return total


def climbed(parents: Tensor, values: Tensor) -> float:
    """The best bound of many optimisations from random starts."""
    best = -math.inf
    for _ in range(8):
        params = (2 * torch.randn(40, dtype=torch.float64)).requires_grad_()
        adam = torch.optim.LBFGS([params], max_iter=300, line_search_fn="strong_wolfe")

        def loss(params: Tensor = params, adam: torch.optim.LBFGS = adam) -> Tensor:
            adam.zero_grad()
            value = -elbo_of(values[None], logits_of(parents, params)[None])[0]
            value.backward()
            return value

        adam.step(loss)
        best = max(best, -float(loss().detach()))
    return best


def test_a_free_table_is_the_softmax_and_its_bound_log_sum_exp() -> None:
    values = bounds()
    log_q, reached = Factors(STATES, FULL).best(values, uniform(6))
    torch.testing.assert_close(log_q, values.log_softmax(-1))
    torch.testing.assert_close(reached, values.logsumexp(-1))


@pytest.mark.parametrize("parents", [torch.zeros(3, 3, dtype=torch.bool), CHAIN], ids=["independent", "chain"])
def test_factors_reach_the_best_of_their_family(parents: Tensor) -> None:
    values = bounds(rows=4)
    log_q, reached = Factors(STATES, parents).best(values, uniform(4))
    torch.testing.assert_close(log_q.logsumexp(-1), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(elbo_of(values, log_q), reached)
    for row in range(4):
        assert float(reached[row]) == pytest.approx(climbed(parents, values[row]), abs=1e-4)
    assert bool((reached < values.logsumexp(-1)).all())


def test_independent_factors_are_exact_where_the_bounds_are_a_sum() -> None:
    first, second, third = (torch.randn(number, dtype=torch.float64) for number in (2, 3, 2))
    values = (first[STATES[:, 0]] + second[STATES[:, 1]] + third[STATES[:, 2]])[None]
    log_q, reached = Factors(STATES, torch.zeros(3, 3, dtype=torch.bool)).best(values, uniform(1))
    torch.testing.assert_close(reached, values.logsumexp(-1))
    torch.testing.assert_close(log_q, values.log_softmax(-1))


def test_a_probability_near_zero_comes_back() -> None:
    values = torch.tensor([[0.0, 5.0, 0.0, 5.0]], dtype=torch.float64)
    states = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    own = torch.tensor([[0.0, -500.0, 0.0, -500.0]], dtype=torch.float64)
    factors = torch.stack([torch.full_like(own, math.log(0.5)), own], -1)
    for parents in (torch.zeros(2, 2, dtype=torch.bool), torch.tensor([[False, False], [True, False]])):
        _, reached = Factors(states, parents).best(values, factors)
        torch.testing.assert_close(reached, values.logsumexp(-1))


def test_the_higher_of_two_optima_is_found_whatever_the_start() -> None:
    """q(y1) q(y2) for y1 = y2: all on the first pair, or all on the second, which is better."""
    states = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    values = torch.tensor([[0.0, -30.0, -30.0, 1.0]], dtype=torch.float64)
    near_first = torch.tensor([0.999, 0.001], dtype=torch.float64).log()
    own = torch.stack([near_first[states[:, e]] for e in range(2)], -1)[None]
    log_q, reached = Factors(states, torch.zeros(2, 2, dtype=torch.bool)).best(values, own)
    assert float(reached) == pytest.approx(1.0, abs=1e-6)
    assert int(log_q.argmax()) == 3


def test_states_that_are_masked_or_impossible_have_no_probability() -> None:
    values, own = bounds(rows=2), uniform(2).clone()
    own[0, STATES[:, 1] == 2, 1] = -math.inf  # no such state
    own[0, STATES[:, 1] != 2, 1] = math.log(1 / 2)
    values[1, STATES[:, 0] == 0] = -math.inf  # of density 0
    for parents in (FULL, CHAIN, torch.zeros(3, 3, dtype=torch.bool)):
        log_q, reached = Factors(STATES, parents).best(values, own)
        assert bool((log_q[0, STATES[:, 1] == 2] == -math.inf).all())
        assert bool((log_q[1, STATES[:, 0] == 0] == -math.inf).all())
        torch.testing.assert_close(log_q.logsumexp(-1), torch.zeros(2, dtype=torch.float64))
        assert bool(torch.isfinite(reached).all())


def test_every_sweep_raises_the_bound() -> None:
    values = bounds(rows=20, scale=5.0)
    factors = Factors(STATES, CHAIN)
    for start in factors._starts(values, uniform(20)):
        before = elbo_of(values, start.sum(-1))
        assert bool((elbo_of(values, factors._ascended(values, start).sum(-1)) >= before - 1e-9).all())


def test_starts_are_distributions_of_the_family() -> None:
    for start in Factors(STATES, CHAIN)._starts(bounds(), uniform(6)):
        torch.testing.assert_close(start.sum(-1).logsumexp(-1), torch.zeros(6, dtype=torch.float64))
        for element, inner in itertools.product(range(3), range(3)):
            if inner not in (element, *CHAIN[element].nonzero()[:, 0].tolist()):
                table = start[..., element].reshape(6, 2, 3, 2)
                torch.testing.assert_close(table, table.narrow(inner + 1, 0, 1).expand_as(table))
