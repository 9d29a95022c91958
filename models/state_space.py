"""The linear-Gaussian state space: a sequence model whose every gap is known in closed form, looking ahead or not."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrogaps.conditioning import checked_lookahead
from pyrogaps.models.kalman import NAME, Backward, KalmanRecursions, check_steps


class LinearGaussianStateSpace(KalmanRecursions):
    r"""A Markov chain of Normal states, each seen through a linear map and Normal noise (Kalman 1960):

    $$z_1 \sim \mathcal N(0, P_1), \quad z_t = F z_{t-1} + \mathcal N(0, Q), \quad x_t = H z_t + \mathcal N(0, V)$$

    A Pyro model: `model(x)` with `x` `(N, T, D)`, any T; sites "z_1", "x_1" to "z_T", "x_T", `(N, d)` and `(N, D)`,
    in the plate "data". Nothing is trained. Exact in nats are `log_evidence`, `entropy`, `filtered`, `smoothed`, and
    the gaps of guides that look ahead by `lookahead` steps, k:

    $$q(z | x) = \prod_t q(z_t | z_{t-1}, x_1 \dots x_{\min(t+k, T)})$$

    Args:
        transition: F, `(d, d)`.
        transition_covariance: Q, `(d, d)`, positive definite.
        emission: H, `(D, d)`.
        emission_covariance: V, `(D, D)`, positive definite.
        initial_covariance: P_1, `(d, d)`, positive definite.

    Each is a matrix, or a number where d = D = 1; all are held in the dtype of those that are floating tensors.

    Raises `InputError` for matrices other than these and for `x` of another shape.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Run the model on `x` `(N, T, D)`; returns z, shape `(N, T, d)`."""
        x = self.checked(x)
        first, step = torch.linalg.cholesky(self.initial_covariance), torch.linalg.cholesky(self.transition_covariance)
        noise = torch.linalg.cholesky(self.emission_covariance)
        z, states = x.new_zeros(len(x), self.latent_dim), []
        with pyro.plate("data", len(x)):
            for t in range(x.shape[1]):
                root = step if t else first
                z = pyro.sample(f"z_{t + 1}", dist.MultivariateNormal(z @ self.transition.T, scale_tril=root))
                seen = dist.MultivariateNormal(z @ self.emission.T, scale_tril=noise)
                pyro.sample(f"x_{t + 1}", seen, obs=x[:, t])
                states.append(z)
        return torch.stack(states, 1)

    def simulate(self, num_sequences: int, steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Draws `x` `(N, T, D)` of the model, and the states `z` `(N, T, d)` behind them, from `seed` alone."""
        generator, like = torch.Generator().manual_seed(seed), self.transition
        sizes = (num_sequences, check_steps(steps))
        noise_z = torch.randn(*sizes, self.latent_dim, generator=generator, dtype=like.dtype).to(like.device)
        noise_x = torch.randn(*sizes, self.data_dim, generator=generator, dtype=like.dtype).to(like.device)
        states = [noise_z[:, 0] @ torch.linalg.cholesky(self.initial_covariance).T]
        root = torch.linalg.cholesky(self.transition_covariance)
        for t in range(1, steps):
            states.append(states[-1] @ self.transition.T + noise_z[:, t] @ root.T)
        z = torch.stack(states, 1)
        return z @ self.emission.T + noise_x @ torch.linalg.cholesky(self.emission_covariance).T, z

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) of `x` `(N, T, D)`, exact, by Kalman's filter; shape `(N,)`."""
        return self.predictive(self.filtered(x)).log_prob(self.checked(x)).sum(-1)

    def entropy(self, steps: int) -> Tensor:
        """H(x) = -E log p(x) of T = `steps` steps, the sum of the entropies of x_t given what came before it."""
        none = self.transition.new_zeros(1, check_steps(steps), self.data_dim)
        return self.predictive(self.filtered(none)).entropy().sum()

    def conditioning_gap(self, steps: int, lookahead: float = 0) -> Tensor:
        r"""How far the best guide of that lookahead k lies below log p(x), on average over x of T = `steps` steps:

        $$\tfrac12 \sum_{t + k < T} \mathrm{tr}\, R_t \mathrm{Cov}(\lambda_t | x_1 \dots x_{t+k}), \quad
        \mathrm{Cov} = M (\Omega_s + \Omega_s P_s \Omega_s) M', \; M = G_{t+1}' \cdots G_s', \; s = t + k + 1$$

        with G, R, $\Omega$ and $\lambda$ of `backward_information`, P_s the covariance of z_s given x_1 to x_{s-1}.
        `lookahead` is 0, 1, 2, ... or `math.inf`; from T - 1 on the gap is 0. Raises `InputError` for another.
        """
        lookahead, backward = checked_lookahead(NAME, lookahead), self.backward_information(steps)
        ahead, _ = self.covariances(steps)
        total = self.transition.new_zeros(())
        for s in range(steps - 1, 0, -1):
            t = s - 1 - lookahead
            if t < 0:
                break
            information = backward.information[s]
            spread = information + information @ ahead[s] @ information
            for gain in reversed(backward.gain[int(t) + 1 : s + 1]):
                spread = gain.T @ spread @ gain
            total = total + (backward.covariance[int(t)] * spread).sum() / 2
        return total

    def diagonal_gap(self, steps: int) -> Tensor:
        r"""What diagonal Normals add to the gap of a guide, whatever its lookahead (its approximation gap):

        $$\tfrac12 \sum_t [\ln |R_t| + \sum_i \ln (R_t^{-1})_{ii}]$$
        """
        R = self.backward_information(steps).covariance
        return (torch.logdet(R) + torch.linalg.inv(R).diagonal(dim1=-2, dim2=-1).log().sum(-1)).sum() / 2

    def local_filter_gap(self, steps: int) -> Tensor:
        r"""How far the guide of factors $p(z_t | z_{t-1}, x_t)$ lies below log p(x), on average over x:

        $$\mathbb E \sum_t \mathrm{KL}(p(z_t | z_{t-1}, x_t) \,\|\, p(z_t | z_{t-1}, x))$$

        z_{t-1} drawn from that guide. It sees less than the optimal filter, which knows x_1 to x_{t-1} as well.
        """
        backward, seen, F = self.backward_information(steps), self.one_observation(), self.transition
        # Second moments of z_{t-1} of the guide beside z_t of the model.
        moments, total = torch.block_diag(torch.zeros_like(F), self.initial_covariance), F.new_zeros(())
        for t in range(steps):
            (gain, S), R = self.factor(t, seen), backward.covariance[t]
            # The factors' means differ by something linear in both, in the noise of x_t and in that of the future.
            apart = torch.cat([backward.gain[t] - gain, R @ backward.information[t] - S @ seen], 1)
            spread = apart @ moments @ apart.T + (R - S) @ seen @ (R - S) + R @ self._noise_ahead(backward, t) @ R
            trace = torch.linalg.solve(R, S + spread).diagonal().sum()
            total = total + (trace - self.latent_dim + torch.logdet(R) - torch.logdet(S)) / 2
            step = torch.cat([torch.cat([gain, S @ seen], 1), torch.cat([torch.zeros_like(F), F], 1)])
            moments = step @ moments @ step.T + torch.block_diag(S + S @ seen @ S, self.transition_covariance)
        return total

    def _noise_ahead(self, backward: Backward, t: int) -> Tensor:
        """The covariance of what x_{t+1} to x_T add to lambda_t, given z_t, `(d, d)`; t from 0."""
        if t + 1 == len(backward.gain):
            return torch.zeros_like(self.transition)
        information, gain = backward.information[t + 1], backward.gain[t + 1]
        return gain.T @ (information + information @ self.transition_covariance @ information) @ gain

    def optimal_guide(self, lookahead: float = 0, *, diagonal: bool = False) -> "LookaheadGuide":
        """The guide of that lookahead, 0, 1, 2, ... or `math.inf`, whose ELBO is highest; see `LookaheadGuide`."""
        return LookaheadGuide(self, lookahead, diagonal=diagonal)


class LookaheadGuide(nn.Module):
    r"""The best of all guides whose factors see x up to `lookahead` steps ahead, k:

    $$q(z_t | z_{t-1}, x_{1:s}) = \mathcal N(G_t z_{t-1} + R_t E[\lambda_t | x_{1:s}],\, R_t), \quad s = \min(t+k, T)$$

    G, R and $\lambda$ as of `Backward`. Its mean ELBO is -H(x) - `conditioning_gap`. For infinity it is p(z|x), whose
    draws all have the ELBO log p(x). With `diagonal`, the best of diagonal covariances, diag(R_t^-1)^-1, in the place
    of R_t; the means stay.

    A Pyro guide: `guide(x)` with the sites "z_1" to "z_T" `(N, d)` in the plate "data"; nothing is trained. Raises
    `InputError` for a `lookahead` other than 0, 1, 2, ... or `math.inf`, and for `x` of another shape.
    """

    def __init__(self, model: LinearGaussianStateSpace, lookahead: float = 0, *, diagonal: bool = False) -> None:
        super().__init__()
        self.model, self.lookahead, self.diagonal = model, checked_lookahead(NAME, lookahead), diagonal

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of N(offset_t + G_t z_{t-1}, L_t L_t'): offsets `(N, T, d)`, gains G and L, each `(T, d, d)`; G_1 = 0."""
        expected = self.model.expected_information(x, self.lookahead)
        backward = self.model.backward_information(x.shape[1])
        R = backward.covariance
        best = torch.diag_embed(1 / torch.linalg.inv(R).diagonal(dim1=-2, dim2=-1)) if self.diagonal else R
        return torch.einsum("tij,ntj->nti", R, expected), backward.gain, torch.linalg.cholesky(best)

    def forward(self, x: Tensor) -> Tensor:
        """Run the guide on `x` `(N, T, D)`; returns z, shape `(N, T, d)`."""
        offsets, gains, roots = self.factors(x)
        z, states = torch.zeros_like(offsets[:, 0]), []
        with pyro.plate("data", len(x)):
            for t, (gain, root) in enumerate(zip(gains, roots, strict=True)):
                factor = dist.MultivariateNormal(offsets[:, t] + z @ gain.T, scale_tril=root)
                z = pyro.sample(f"z_{t + 1}", factor)
                states.append(z)
        return torch.stack(states, 1)
