r"""The mean ELBO of the best guide with a lookahead, in closed form: what SVI climbs to, as a function of the model.

Every guide is linear-Gaussian and sees c = (x_1 .. x_T, u_1 .. u_T) up to some step, so that the mean ELBO over data
depends on them through their second moments alone. With $\ell_t$ the linear map from c to $\lambda_t$ (the information
about z_t in the data from t on), R_t the covariance of $p(z_t | z_{t-1}, x, u)$, and $S_t$ the second moments of what a
regression of c on its seen part leaves,

$$\max_q \overline{\mathcal L} = \overline{\log p(x|u)} - \tfrac12 \sum_t \mathrm{tr}\, R_t \ell_t S_t \ell_t'$$
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.models.controlled import ControlledLinear


@dataclass(frozen=True)
class Moments:
    """Second moments `(*systems, n, n)` of c, n = T (D + K), and the sizes T, D and K."""

    second: Tensor
    steps: int
    data_dim: int
    action_dim: int

    @classmethod
    def of(cls, x: Tensor, u: Tensor) -> "Moments":
        """Those of data `(N, T, *systems, D)` and actions `(N, T, *systems, K)`."""
        c = torch.cat([part.movedim(1, -2).flatten(-2) for part in (x.double(), u.double())], -1)
        return cls(torch.einsum("n...i,n...j->...ij", c, c) / len(c), x.shape[1], x.shape[-1], u.shape[-1])

    def left(self, lookahead: float) -> Tensor:
        """S_t for every step, `(T, *systems, n, n)`."""
        rows, D, K = [], self.data_dim, self.action_dim
        for t in range(self.steps):
            s = int(min(t + lookahead + 1, self.steps))
            seen = [*range(s * D), *range(self.steps * D, self.steps * D + (s - 1) * K)]
            across = self.second[..., seen, :]
            rows.append(self.second - across.mT @ torch.linalg.solve(self.second[..., seen, :][..., seen], across))
        return torch.stack(rows)

    def unit_maps(self) -> tuple[Tensor, Tensor]:
        """The maps from c to every x_t, `(T, D, n)`, and to every u_t, `(T, K, n)`."""
        x, u = torch.eye(self.second.shape[-1], dtype=torch.float64).split(
            (self.steps * self.data_dim, self.steps * self.action_dim)
        )
        return x.unflatten(0, (self.steps, -1)), u.unflatten(0, (self.steps, -1))


def evidence(model: ControlledLinear, moments: Moments) -> Tensor:
    """The mean of log p(x|u) over data with these moments, `(*systems)`, nats."""
    xs, us = moments.unit_maps()
    scales = model.transition_scale, model.emission_scale, model.initial_scale
    W, V, P = (scale.square().diag_embed() for scale in scales)
    m = moments.second.new_zeros(*model.systems, model.latent_dim, moments.second.shape[-1])
    total = moments.second.new_zeros(model.systems)
    for x, u in zip(xs, us, strict=True):
        e, S = x - model.C @ m, model.C @ P @ model.C.mT + V
        root = torch.linalg.cholesky_ex(S).L  # NaN where a step of the search overflows
        whitened = torch.linalg.solve_triangular(root, e, upper=False)
        square = ((whitened @ moments.second) * whitened).sum((-2, -1))
        logdet = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        total = total - (square + logdet + moments.data_dim * math.log(2 * math.pi)) / 2
        K = torch.cholesky_solve(model.C @ P, root).mT
        m = model.A @ (m + K @ e) + model.B @ u
        P = model.A @ (P - K @ S @ K.mT) @ model.A.mT + W
    return total


def gap(model: ControlledLinear, moments: Moments, left: Tensor) -> Tensor:
    """By how much the best guide's mean ELBO falls short, `(*systems)`, nats; `left` is that of its lookahead."""
    xs, us = moments.unit_maps()
    W, P = (scale.square().diag_embed() for scale in (model.transition_scale, model.initial_scale))
    by_noise = model.C.mT / model.emission_scale.square()[..., None, :]
    own, identity = by_noise @ model.C, torch.eye(model.latent_dim, dtype=torch.float64)
    information, mapped = own, by_noise @ xs[-1]
    total = moments.second.new_zeros(model.systems)
    for t in reversed(range(moments.steps)):
        Q = W if t else P
        solved = torch.linalg.solve_ex(identity + Q @ information, torch.cat([model.A.expand_as(Q), Q], -1)).result
        G, R = solved.split(model.latent_dim, -1)
        total = total + (R * (mapped @ left[t] @ mapped.mT)).sum((-2, -1)) / 2
        if t:
            mapped = by_noise @ xs[t - 1] + G.mT @ (mapped - information @ model.B @ us[t - 1])
            information = own + G.mT @ information @ model.A
    return total


def true_moments(truth: ControlledLinear, steps: int) -> Tensor:
    """The second moments `(n, n)` that infinitely many trajectories of `truth` under standard Normal actions have."""
    exact, D, K = truth.without_actions(), truth.data_dim, truth.action_dim
    units = torch.eye(steps * K, dtype=truth.dtype).reshape(-1, steps, K)
    by_actions = (truth.response(units) @ truth.C.mT).flatten(1).T
    z = torch.zeros(steps, steps, truth.latent_dim, truth.latent_dim, dtype=truth.dtype)
    P = exact.initial_covariance
    for t in range(steps):
        across = P
        for s in range(t, steps):
            z[s, t], z[t, s] = across, across.mT
            across = truth.A @ across
        P = truth.A @ P @ truth.A.mT + exact.transition_covariance
    own = (truth.C @ z @ truth.C.mT).permute(0, 2, 1, 3).reshape(steps * D, steps * D)
    noise = torch.block_diag(*[exact.emission_covariance] * steps)
    return torch.cat(
        [
            torch.cat([own + noise + by_actions @ by_actions.mT, by_actions], 1),
            torch.cat([by_actions.mT, torch.eye(steps * K, dtype=truth.dtype)], 1),
        ]
    )
