"""Linear-quadratic-Gaussian control: costs against the textbook's formula, brute force and simulation."""

import numpy as np
import pytest
import torch
from scipy import linalg

from pyrogaps import InputError
from pyrogaps.models.controlled import ControlledLinear
from pyrogaps.models.lqg import (
    ClosedLoop,
    Controller,
    Cost,
    LinearSystem,
    Matrix,
    best_controller,
    expected_cost,
    kalman_gain,
    regret,
    regulator_gain,
)

GENERATOR = np.random.default_rng(0)


def random_system(d: int = 3, D: int = 2, K: int = 2, seed: int = 0) -> LinearSystem:
    """Slightly unstable, and nothing in it symmetric that need not be."""
    draws = np.random.default_rng(seed)
    A = draws.normal(size=(d, d))
    A *= 1.05 / np.abs(np.linalg.eigvals(A)).max()
    roots = [draws.normal(size=(n, n)) for n in (d, D)]
    W, V = (root @ root.T + 0.2 * np.eye(len(root)) for root in roots)
    return LinearSystem(A, draws.normal(size=(d, K)), draws.normal(size=(D, d)), W, V)


def cost_of(D: int = 2, K: int = 2) -> Cost:
    return Cost(np.diag(np.arange(1.0, D + 1)), 0.3 * np.eye(K) + 0.1)


def perturbed(system: LinearSystem, size: float, seed: int = 1) -> LinearSystem:
    draws = np.random.default_rng(seed)
    parts = (system.transition, system.action, system.emission)
    moved = [part + size * draws.normal(size=part.shape) for part in parts]
    return LinearSystem(*moved, 2 * system.transition_covariance, system.emission_covariance)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1), (3, 2, 2), (4, 2, 3)])
def test_best_cost_is_the_textbooks(sizes: tuple[int, int, int]) -> None:
    """tr S W + tr P K' (R + B'SB) K + tr QV: regulation with the state seen, and what estimation adds."""
    system, cost = random_system(*sizes), cost_of(*sizes[1:])
    A, B, C, V = system.transition, system.action, system.emission, system.emission_covariance
    S = linalg.solve_discrete_are(A, B, C.T @ cost.output @ C, cost.action)
    predicted = linalg.solve_discrete_are(A.T, C.T, system.transition_covariance, V)
    P, K = (np.eye(len(A)) - kalman_gain(system) @ C) @ predicted, regulator_gain(system, cost)
    exact = S @ system.transition_covariance, P @ K.T @ (cost.action + B.T @ S @ B) @ K, cost.output @ V
    found = expected_cost(system, best_controller(system, cost), cost)
    assert found == pytest.approx(sum(np.trace(part) for part in exact), rel=1e-9)


def test_no_other_controller_is_better() -> None:
    system, cost = random_system(), cost_of()
    best = best_controller(system, cost)
    least = expected_cost(system, best, cost)
    for size in (1e-3, 1e-2):
        for _ in range(20):
            parts = (best.transition, best.correction, best.gain, best.direct)
            other = Controller(*(part + size * GENERATOR.normal(size=part.shape) for part in parts))
            assert expected_cost(system, other, cost) > least


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 2, 2)])
def test_true_model_has_no_regret_in_any_coordinates(sizes: tuple[int, int, int]) -> None:
    system, cost = random_system(*sizes), cost_of(*sizes[1:])
    best = expected_cost(system, best_controller(system, cost), cost)
    assert regret(system, system, cost) == 0
    for seed in range(5):
        T = np.random.default_rng(seed).normal(size=(sizes[0], sizes[0])) + 2 * np.eye(sizes[0])
        assert abs(regret(system, system.in_other_coordinates(T), cost)) < 1e-9 * best


@pytest.mark.parametrize("size", [0.02, 0.1])
def test_regret_is_the_same_in_all_coordinates(size: float) -> None:
    system, cost = random_system(), cost_of()
    model = perturbed(system, size)
    value = regret(system, model, cost)
    assert 0 < value < np.inf
    T = GENERATOR.normal(size=(3, 3)) + 2 * np.eye(3)
    assert regret(system, model.in_other_coordinates(T), cost) == pytest.approx(value, rel=1e-7)
    assert regret(system.in_other_coordinates(T), model, cost) == pytest.approx(value, rel=1e-7)


def simulated_costs(system: LinearSystem, controller: Controller, cost: Cost, draws: np.random.Generator) -> Matrix:
    """Mean cost of each of 400 runs of 300 steps after 100, run as one would run them: act, then move."""
    d, D, runs = len(system.transition), len(system.emission), 400
    W, V = (np.linalg.cholesky(S) for S in (system.transition_covariance, system.emission_covariance))
    x, m, total = np.zeros((runs, d)), np.zeros((runs, len(controller.transition))), np.zeros(runs)
    for step in range(400):
        y = x @ system.emission.T + draws.normal(size=(runs, D)) @ V.T
        u = -m @ controller.gain.T - y @ controller.direct.T
        if step >= 100:
            total += np.einsum("ni,ij,nj->n", y, cost.output, y) + np.einsum("ni,ij,nj->n", u, cost.action, u)
        x = x @ system.transition.T + u @ system.action.T + draws.normal(size=(runs, d)) @ W.T
        m = m @ controller.transition.T + y @ controller.correction.T
    return total / 300


def test_regret_of_a_wrong_model_is_that_of_a_simulation() -> None:
    """The controllers run on the same noise, so that the error of the difference is small."""
    system, cost = random_system(seed=3), cost_of()
    model = perturbed(system, 0.1)
    wrong, best = (
        simulated_costs(system, best_controller(of, cost), cost, np.random.default_rng(5)) for of in (model, system)
    )
    exact = regret(system, model, cost)
    for values, expected in (
        (wrong - best, exact),
        (best, expected_cost(system, best_controller(system, cost), cost)),
    ):
        error = values.std(ddof=1) / len(values) ** 0.5
        assert abs(values.mean() - expected) < 4 * error
    assert exact > 4 * (wrong - best).std(ddof=1) / len(wrong) ** 0.5, "so that 0 would not have passed"


def test_unstable_loops_have_infinite_regret() -> None:
    one = np.eye(1)
    system, cost = LinearSystem(1.2 * one, one, one, one, one), Cost(one, one)
    backwards = LinearSystem(1.2 * one, -one, one, one, one)
    loop = ClosedLoop.of(system, best_controller(backwards, cost))
    assert loop.radius > 1
    assert regret(system, backwards, cost) == np.inf
    # A model that is unstable and cannot be moved has no controller at all.
    stuck = LinearSystem(1.2 * one, 0 * one, one, one, one)
    assert regret(system, stuck, cost) == np.inf
    with pytest.raises(np.linalg.LinAlgError):
        regret(stuck, system, cost)


def test_one_state_by_hand() -> None:
    """The stationary variances of x' = a x + u + w with u = -k y, whose controller has no memory."""
    one = np.eye(1)
    a, k, w, v = 0.8, 0.5, 0.3, 0.2
    system = LinearSystem(a * one, one, one, w * one, v * one)
    memoryless = Controller(0 * one, 0 * one, 0 * one, k * one)
    variance = (w + k**2 * v) / (1 - (a - k) ** 2)
    expected = variance + v + 2 * k**2 * (variance + v)
    assert expected_cost(system, memoryless, Cost(one, 2 * one)) == pytest.approx(expected)


def test_a_model_of_one_system_is_taken_over() -> None:
    model = ControlledLinear([[0.9, 0.1], [0.0, 0.8]], [[0.0], [1.0]], [[1.0, 0.0]], [0.1, 0.2], 0.5)
    system = LinearSystem.of(model)
    np.testing.assert_allclose(system.transition_covariance, np.diag([0.01, 0.04]), rtol=1e-6)
    np.testing.assert_allclose(system.emission_covariance, [[0.25]], rtol=1e-6)
    assert system.action.shape == (2, 1)
    many = ControlledLinear(torch.ones(3, 1, 1), torch.ones(3, 1, 1), torch.ones(3, 1, 1))
    with pytest.raises(InputError, match=r"^LinearSystem: the model holds \(3,\) systems\. Take one with system"):
        LinearSystem.of(many)
    assert LinearSystem.of(many.system(2)).emission.shape == (1, 1)
