"""Linear-quadratic-Gaussian control: the cost, in closed form, of one system's controller on another system."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import linalg  # type: ignore[import-untyped]

from pyrogaps.errors import InputError
from pyrogaps.models.controlled import ControlledLinear

Matrix: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class LinearSystem:
    """x' = A x + B u + N(0, W), y = C x + N(0, V): `transition` A `(d, d)`, `action` B `(d, K)`, `emission` C `(D, d)`,
    `transition_covariance` W `(d, d)` and `emission_covariance` V `(D, D)`.
    """

    transition: Matrix
    action: Matrix
    emission: Matrix
    transition_covariance: Matrix
    emission_covariance: Matrix

    @classmethod
    def of(cls, model: ControlledLinear) -> "LinearSystem":
        """The system that a `ControlledLinear` describes at its present values. Raises `InputError` for several."""
        if model.systems:
            raise InputError(f"LinearSystem: the model holds {model.systems} systems. Take one with system(index).")
        values = model.A, model.B, model.C, model.transition_scale, model.emission_scale
        A, B, C, w, v = (value.detach().double().cpu().numpy() for value in values)
        return cls(A, B, C, np.diag(w**2), np.diag(v**2))

    def in_other_coordinates(self, T: Matrix) -> "LinearSystem":
        """The same system for the state T x, with T `(d, d)` invertible."""
        inverse = np.linalg.inv(T)
        W = T @ self.transition_covariance @ T.T
        return LinearSystem(
            T @ self.transition @ inverse, T @ self.action, self.emission @ inverse, W, self.emission_covariance
        )


@dataclass(frozen=True)
class Cost:
    """The long-run mean of y'Qy + u'Ru: `output` is Q `(D, D)`, positive semi-definite, `action` R `(K, K)`, positive
    definite.

    It is a cost on outputs, because the coordinates of a learned state are arbitrary.
    """

    output: Matrix
    action: Matrix


@dataclass(frozen=True)
class Controller:
    """m' = `transition` m + `correction` y, u = -`gain` m - `direct` y: m is the state predicted from y before."""

    transition: Matrix
    correction: Matrix
    gain: Matrix
    direct: Matrix


def kalman_gain(system: LinearSystem) -> Matrix:
    """The stationary gain L of the Kalman filter, E[x|y up to now] = m + L (y - C m), `(d, D)`.

    Raises `np.linalg.LinAlgError` where the Riccati equation has no stabilising solution.
    """
    C, V = system.emission, system.emission_covariance
    P = linalg.solve_discrete_are(system.transition.T, C.T, system.transition_covariance, V)
    gain: Matrix = np.linalg.solve(C @ P @ C.T + V, C @ P).T
    return gain


def regulator_gain(system: LinearSystem, cost: Cost) -> Matrix:
    """The stationary gain K of the best state feedback u = -K x, `(K, d)`; raises as `kalman_gain`."""
    A, B = system.transition, system.action
    S = linalg.solve_discrete_are(A, B, system.emission.T @ cost.output @ system.emission, cost.action)
    gain: Matrix = np.linalg.solve(cost.action + B.T @ S @ B, B.T @ S @ A)
    return gain


def best_controller(system: LinearSystem, cost: Cost) -> Controller:
    """The Kalman filter of `system` with its Riccati gain, the best controller of that system; raises as they do."""
    L, K = kalman_gain(system), regulator_gain(system, cost)
    moved = system.transition - system.action @ K
    unseen = np.eye(len(L)) - L @ system.emission
    return Controller(moved @ unseen, moved @ L, K @ unseen, K @ L)


@dataclass(frozen=True)
class ClosedLoop:
    """The joint state s = (x, m) of a system and a controller: s' = `matrix` s + `noise` (w, v), `(d + e, d + e)` and
    `(d + e, d + D)`; and what is paid for: y = `output` s + v, u = -`action` s - `direct` v.
    """

    matrix: Matrix
    noise: Matrix
    output: Matrix
    action: Matrix
    direct: Matrix

    @classmethod
    def of(cls, system: LinearSystem, controller: Controller) -> "ClosedLoop":
        """`controller` run on `system`."""
        A, B, C = system.transition, system.action, system.emission
        d, e = len(A), len(controller.transition)
        action = np.hstack([controller.direct @ C, controller.gain])
        matrix = np.vstack(
            [
                np.hstack([A, np.zeros((d, e))]) - B @ action,
                np.hstack([controller.correction @ C, controller.transition]),
            ]
        )
        by_v = np.vstack([-B @ controller.direct, controller.correction])
        noise = np.hstack([np.eye(d + e, d), by_v])
        return cls(matrix, noise, np.hstack([C, np.zeros((len(C), e))]), action, controller.direct)

    @property
    def radius(self) -> float:
        """The largest modulus of the loop's eigenvalues; below 1 it is stable."""
        return float(np.abs(np.linalg.eigvals(self.matrix)).max())


def expected_cost(system: LinearSystem, controller: Controller, cost: Cost) -> float:
    r"""The stationary mean of y'Qy + u'Ru of `controller` on `system`; infinite where the loop is unstable.

    $$\Sigma = F \Sigma F' + N\, \mathrm{diag}(W, V)\, N', \quad
    J = \mathrm{tr}\, Q (H \Sigma H' + V) + \mathrm{tr}\, R (U \Sigma U' + D V D')$$

    with F, N, H, U and D of the `ClosedLoop`, $\Sigma$ by the discrete Lyapunov equation.
    """
    loop, V = ClosedLoop.of(system, controller), system.emission_covariance
    if not loop.radius < 1:
        return np.inf
    spread = linalg.block_diag(system.transition_covariance, V)
    S = linalg.solve_discrete_lyapunov(loop.matrix, loop.noise @ spread @ loop.noise.T)
    outputs = loop.output @ S @ loop.output.T + V
    actions = loop.action @ S @ loop.action.T + loop.direct @ V @ loop.direct.T
    return float(np.trace(cost.output @ outputs) + np.trace(cost.action @ actions))


def regret(system: LinearSystem, model: LinearSystem, cost: Cost) -> float:
    """The cost on `system` of the best controller of `model`, less that of the best controller of `system`.

    It is 0 for the true system in any coordinates, never negative, and infinite where the loop is unstable or the model
    has no stabilising controller. Raises `np.linalg.LinAlgError` where `system` has none.

    Source: Kayalibay, Mirchev and van der Smagt 2021, "Less Suboptimal Learning and Control in Variational POMDPs";
    the formulas are those of linear-quadratic-Gaussian control (Åström 1970).

    Example:
        >>> import numpy as np
        >>> from pyrogaps.models.lqg import Cost, LinearSystem, regret
        >>> one = np.eye(1)
        >>> true, learned = (LinearSystem(a * one, one, one, one, one) for a in (0.9, 0.7))
        >>> round(regret(true, learned, Cost(one, one)), 4)
        0.116
    """
    best = expected_cost(system, best_controller(system, cost), cost)
    try:
        controller = best_controller(model, cost)
    except np.linalg.LinAlgError:
        return np.inf
    return expected_cost(system, controller, cost) - best
