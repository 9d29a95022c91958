"""Kalman recursions: exact inference in a linear-Gaussian state space, forward and backward in time."""

from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor, nn

from pyrogaps.errors import InputError

Matrix: TypeAlias = Tensor | float | list[list[float]]

NAME = "LinearGaussianStateSpace"


@dataclass(frozen=True)
class Filtered:
    """Moments of z_t given x_1 to x_{t-1} (`predicted_mean` `(N, T, d)`, `predicted_covariance` `(T, d, d)`) and given
    x_1 to x_t (`mean`, `covariance`, of the same shapes). Covariances do not depend on x.
    """

    predicted_mean: Tensor
    predicted_covariance: Tensor
    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Backward:
    r"""The likelihood of z_t given x_t to x_T, and the factors of the posterior:

    $$p(x_{t:T} | z_t) \propto \exp(\lambda_t' z_t - z_t' \Omega_t z_t / 2), \quad
    p(z_t | z_{t-1}, x) = \mathcal N(G_t z_{t-1} + R_t \lambda_t, R_t)$$

    `information` is $\Omega$, `gain` is G (zero at t = 1, because there is no z_0), `covariance` is R, each
    `(T, d, d)`. None of them depends on x.
    """

    information: Tensor
    gain: Tensor
    covariance: Tensor


class KalmanRecursions(nn.Module):
    """z_1 ~ N(0, P), z_t = F z_{t-1} + N(0, Q), x_t = H z_t + N(0, V): the matrices, and inference for any T.

    Arguments and errors are those of `LinearGaussianStateSpace`.
    """

    transition: Tensor
    transition_covariance: Tensor
    emission: Tensor
    emission_covariance: Tensor
    initial_covariance: Tensor

    def __init__(
        self,
        transition: Matrix,
        transition_covariance: Matrix,
        emission: Matrix,
        emission_covariance: Matrix,
        initial_covariance: Matrix,
    ) -> None:
        super().__init__()
        given = (transition, transition_covariance, emission, emission_covariance, initial_covariance)
        kinds = [value.dtype for value in given if isinstance(value, Tensor) and value.is_floating_point()]
        dtype = reduce(torch.promote_types, kinds) if kinds else torch.get_default_dtype()
        F, H = _matrix("transition", transition, dtype), _matrix("emission", emission, dtype)
        self.latent_dim, self.data_dim = len(F), len(H)
        _check_shape("transition", F, (self.latent_dim, self.latent_dim))
        _check_shape("emission", H, (self.data_dim, self.latent_dim))
        self.register_buffer("transition", F)
        self.register_buffer("emission", H)
        for name, value, size in (
            ("transition_covariance", transition_covariance, self.latent_dim),
            ("emission_covariance", emission_covariance, self.data_dim),
            ("initial_covariance", initial_covariance, self.latent_dim),
        ):
            self.register_buffer(name, _covariance(name, value, size, dtype))

    def covariances(self, steps: int) -> tuple[Tensor, Tensor]:
        """Covariances of z_t given x_1 to x_{t-1}, and given x_1 to x_t, each `(T, d, d)` for T = `steps`."""
        P, predicted, filtered = self.initial_covariance, [], []
        for _ in range(check_steps(steps)):
            predicted.append(P)
            K = self._kalman_gain(P)
            rest = torch.eye(self.latent_dim).to(P) - K @ self.emission
            filtered.append(symmetric(rest @ P @ rest.T + K @ self.emission_covariance @ K.T))
            P = symmetric(self.transition @ filtered[-1] @ self.transition.T) + self.transition_covariance
        return torch.stack(predicted), torch.stack(filtered)

    def filtered(self, x: Tensor) -> Filtered:
        """Moments of every state given the data before it, and up to it, for `x` `(N, T, D)`."""
        x = self.checked(x)
        covariances, updated = self.covariances(x.shape[1])
        m, before, after = x.new_zeros(len(x), self.latent_dim), [], []
        for t, K in enumerate(self._kalman_gain(covariances)):
            before.append(m)
            after.append(m + (x[:, t] - m @ self.emission.T) @ K.T)
            m = after[-1] @ self.transition.T
        return Filtered(torch.stack(before, 1), covariances, torch.stack(after, 1), updated)

    def smoothed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means `(N, T, d)` and covariances `(T, d, d)` of z_t given all of `x` `(N, T, D)` (Rauch, Tung, Striebel)."""
        filtered = self.filtered(x)
        means, covariances = [filtered.mean[:, -1]], [filtered.covariance[-1]]
        for t in reversed(range(filtered.mean.shape[1] - 1)):
            P, predicted = filtered.covariance[t], filtered.predicted_covariance[t + 1]
            gain = torch.linalg.solve(predicted, self.transition @ P).T
            means.append(filtered.mean[:, t] + (means[-1] - filtered.predicted_mean[:, t + 1]) @ gain.T)
            covariances.append(symmetric(P + gain @ (covariances[-1] - predicted) @ gain.T))
        return torch.stack(means[::-1], 1), torch.stack(covariances[::-1])

    def backward_information(self, steps: int) -> Backward:
        r"""Backward recursion from t = T = `steps`, for $\lambda_t = H' V^{-1} x_t + G_{t+1}' \lambda_{t+1}$:

        $$\Omega_t = H' V^{-1} H + G_{t+1}' \Omega_{t+1} F, \quad G_t = (I + Q \Omega_t)^{-1} F, \quad
        R_t = (I + Q \Omega_t)^{-1} Q$$

        At t = 1, P takes the place of Q.
        """
        own = information = self.one_observation()
        factors = []
        for t in reversed(range(check_steps(steps))):
            gain, covariance = self.factor(t, information)
            factors.append((information, gain, covariance))
            information = symmetric(own + gain.T @ information @ self.transition)
        return Backward(*(torch.stack(part[::-1]) for part in zip(*factors, strict=True)))

    def factor(self, t: int, information: Tensor) -> tuple[Tensor, Tensor]:
        """G and R, each `(d, d)`, of z_t (t from 0) given z_{t-1} and data with `information` `(d, d)` on z_t."""
        Q = self.transition_covariance if t else self.initial_covariance
        F = self.transition if t else torch.zeros_like(self.transition)
        identity = torch.eye(self.latent_dim).to(Q)
        G, R = torch.linalg.solve(identity + Q @ information, torch.cat([F, Q], 1)).split(self.latent_dim, 1)
        return G, symmetric(R)

    def expected_information(self, x: Tensor, lookahead: float) -> Tensor:
        r"""$E[\lambda_t | x_1 \dots x_s]$, s = min(t + `lookahead`, T), for `x` `(N, T, D)`; shape `(N, T, d)`.

        Given x_1 to x_s, the mean of $\lambda_{s+1}$ is $\Omega_{s+1} m$, with m the predicted mean of z_{s+1}.
        """
        x = self.checked(x)
        steps = x.shape[1]
        backward, predicted = self.backward_information(steps), self.filtered(x).predicted_mean
        direct = x @ torch.linalg.solve(self.emission_covariance, self.emission)
        expected = [direct[:, -1]]
        for t in reversed(range(steps - 1)):
            if t + lookahead >= steps - 1:
                last, value = t, expected[-1]
            else:
                last = t + int(lookahead)
                value = predicted[:, last + 1] @ backward.information[last + 1]
            for s in range(last, t - 1, -1):
                value = direct[:, s] + value @ backward.gain[s + 1]
            expected.append(value)
        return torch.stack(expected[::-1], 1)

    def one_observation(self) -> Tensor:
        """H' V^-1 H, the information about z_t in x_t, `(d, d)`."""
        return symmetric(self.emission.T @ torch.linalg.solve(self.emission_covariance, self.emission))

    def predictive(self, found: Filtered) -> MultivariateNormal:
        """p(x_t | x_1 .. x_{t-1}), batch shape `(N, T)`."""
        return MultivariateNormal(found.predicted_mean @ self.emission.T, self._innovation(found.predicted_covariance))

    def checked(self, x: Tensor) -> Tensor:
        """`x` in the model's dtype; raises `InputError` unless its shape is `(N, T, data_dim)` with T at least 1."""
        if x.dim() != 3 or x.shape[-1] != self.data_dim or not x.shape[1]:
            raise InputError(
                f"{NAME}: x must have shape (N, T, {self.data_dim}) with T at least 1, got {tuple(x.shape)}. N is the "
                "number of sequences, T the number of time steps."
            )
        return x.to(self.transition.dtype)

    def _innovation(self, P: Tensor) -> Tensor:
        return symmetric(self.emission @ P @ self.emission.T) + self.emission_covariance

    def _kalman_gain(self, P: Tensor) -> Tensor:
        return torch.linalg.solve(self._innovation(P), self.emission @ P).mT


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part of `(..., d, d)`, to remove asymmetry due to rounding."""
    return (matrix + matrix.mT) / 2


def check_steps(steps: int) -> int:
    """`steps`; raises `InputError` unless it is an integer of at least 1."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"{NAME}: steps must be an integer of at least 1, got {steps}")
    return steps


def _matrix(name: str, value: Matrix, dtype: torch.dtype) -> Tensor:
    try:
        matrix = torch.as_tensor(value, dtype=dtype).detach().clone()
    except (TypeError, ValueError):
        raise InputError(f"{NAME}: {name} must be a number or a matrix, got {value!r}") from None
    if matrix.dim() not in (0, 2) or not matrix.numel():
        raise InputError(f"{NAME}: {name} must be a number or a matrix, got shape {tuple(matrix.shape)}")
    if not bool(torch.isfinite(matrix).all()):
        raise InputError(f"{NAME}: {name} must be finite, but it contains NaN or infinity")
    return matrix if matrix.dim() else matrix.reshape(1, 1)


def _check_shape(name: str, matrix: Tensor, shape: tuple[int, int]) -> None:
    if matrix.shape != shape:
        raise InputError(f"{NAME}: {name} must have shape {shape}, got {tuple(matrix.shape)}")


def _covariance(name: str, value: Matrix, size: int, dtype: torch.dtype) -> Tensor:
    matrix = _matrix(name, value, dtype)
    _check_shape(name, matrix, (size, size))
    if not torch.allclose(matrix, matrix.T):
        raise InputError(f"{NAME}: {name} must be symmetric")
    if int(torch.linalg.cholesky_ex(matrix).info):
        raise InputError(f"{NAME}: {name} must be positive definite")
    return matrix
