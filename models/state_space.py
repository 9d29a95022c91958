"""The linear-Gaussian state space: a sequence model with closed-form gaps for guides of any lookahead."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrogaps.conditioning import checked_lookahead
from pyrogaps.models.kalman import NAME, Backward, KalmanRecursions, check_steps


class LinearGaussianStateSpace(KalmanRecursions):
    r"""A linear-Gaussian Markov chain with linear-Gaussian observations (Kalman 1960):

    $$z_1 \sim \mathcal N(0, P_1), \quad z_t = F z_{t-1} + \mathcal N(0, Q), \quad x_t = H z_t + \mathcal N(0, V)$$

    A Pyro model: `model(x)` with `x` `(N, T, D)`, any T; sites "z_1", "x_1" to "z_T", "x_T", `(N, d)` and `(N, D)`,
    in the plate "data". There are no trainable parameters. The methods `log_evidence`, `entropy`, `filtered` and
    `smoothed` are exact, and so are the gaps, in nats, of guides with a `lookahead` of k steps:

    $$q(z | x) = \prod_t q(z_t | z_{t-1}, x_1 \dots x_{\min(t+k, T)})$$

    Args:
        transition: F, `(d, d)`.
        transition_covariance: Q, `(d, d)`, positive definite.
        emission: H, `(D, d)`.
        emission_covariance: V, `(D, D)`, positive definite.
        initial_covariance: P_1, `(d, d)`, positive definite.

    Each is a matrix, or a number if d = D = 1. All are stored in the common dtype of those that are floating tensors.

    Raises `InputError` for other matrices and for `x` of another shape.
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
                observation = dist.MultivariateNormal(z @ self.emission.T, scale_tril=noise)
                pyro.sample(f"x_{t + 1}", observation, obs=x[:, t])
                states.append(z)
        return torch.stack(states, 1)

    def simulate(self, num_sequences: int, steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Draw `x` `(N, T, D)` and its states `z` `(N, T, d)`; the draws depend only on `seed`."""
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
        """Exact log p(x) of `x` `(N, T, D)`, by the Kalman filter; shape `(N,)`."""
        return self.predictive(self.filtered(x)).log_prob(self.checked(x)).sum(-1)

    def entropy(self, steps: int) -> Tensor:
        """H(x) = -E log p(x) of T = `steps` steps: the sum of the entropies of x_t given x_1 to x_{t-1}."""
        placeholder = self.transition.new_zeros(1, check_steps(steps), self.data_dim)
        return self.predictive(self.filtered(placeholder)).entropy().sum()

    def conditioning_gap(self, steps: int, lookahead: float = 0) -> Tensor:
        r"""Mean of log p(x) minus the ELBO of the best guide with lookahead k, over x of T = `steps` steps:

        $$\tfrac12 \sum_{t + k < T} \mathrm{tr}\, R_t \mathrm{Cov}(\lambda_t | x_1 \dots x_{t+k}), \quad
        \mathrm{Cov} = M (\Omega_s + \Omega_s P_s \Omega_s) M', \; M = G_{t+1}' \cdots G_s', \; s = t + k + 1$$

        with G, R, $\Omega$ and $\lambda$ of `backward_information`, P_s the covariance of z_s given x_1 to x_{s-1}.
        `lookahead` is 0, 1, 2, ... or `math.inf`; the gap is 0 from T - 1 on. Raises `InputError` for other values.
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
        r"""The approximation gap of diagonal Normals; it adds to the gap of a guide with any lookahead:

        $$\tfrac12 \sum_t [\ln |R_t| + \sum_i \ln (R_t^{-1})_{ii}]$$
        """
        R = self.backward_information(steps).covariance
        return (torch.logdet(R) + torch.linalg.inv(R).diagonal(dim1=-2, dim2=-1).log().sum(-1)).sum() / 2

    def local_filter_gap(self, steps: int) -> Tensor:
        r"""Mean of log p(x) minus the ELBO of the guide with factors $p(z_t | z_{t-1}, x_t)$:

        $$\mathbb E \sum_t \mathrm{KL}(p(z_t | z_{t-1}, x_t) \,\|\, p(z_t | z_{t-1}, x))$$

        where z_{t-1} is drawn from that guide. It sees less than the optimal filter, which also sees x_1 to x_{t-1}.
        """
        backward, own, F = self.backward_information(steps), self.one_observation(), self.transition
        # Joint second moments of z_{t-1} of the guide and z_t of the model.
        moments, total = torch.block_diag(torch.zeros_like(F), self.initial_covariance), F.new_zeros(())
        for t in range(steps):
            (gain, S), R = self.factor(t, own), backward.covariance[t]
            # The difference of the factors' means is linear in both states, in the noise of x_t and in future noise.
            difference = torch.cat([backward.gain[t] - gain, R @ backward.information[t] - S @ own], 1)
            spread = difference @ moments @ difference.T + (R - S) @ own @ (R - S)
            spread = spread + R @ self._noise_ahead(backward, t) @ R
            trace = torch.linalg.solve(R, S + spread).diagonal().sum()
            total = total + (trace - self.latent_dim + torch.logdet(R) - torch.logdet(S)) / 2
            step = torch.cat([torch.cat([gain, S @ own], 1), torch.cat([torch.zeros_like(F), F], 1)])
            moments = step @ moments @ step.T + torch.block_diag(S + S @ own @ S, self.transition_covariance)
        return total

    def _noise_ahead(self, backward: Backward, t: int) -> Tensor:
        """Covariance, given z_t, of the contribution of x_{t+1} to x_T to lambda_t, `(d, d)`; t from 0."""
        if t + 1 == len(backward.gain):
            return torch.zeros_like(self.transition)
        information, gain = backward.information[t + 1], backward.gain[t + 1]
        return gain.T @ (information + information @ self.transition_covariance @ information) @ gain

    def optimal_guide(self, lookahead: float = 0, *, diagonal: bool = False) -> "LookaheadGuide":
        """The guide with the highest ELBO among those with this lookahead (0, 1, 2, ... or `math.inf`)."""
        return LookaheadGuide(self, lookahead, diagonal=diagonal)


class LookaheadGuide(nn.Module):
    r"""The best guide whose factors see x up to k = `lookahead` steps ahead:

    $$q(z_t | z_{t-1}, x_{1:s}) = \mathcal N(G_t z_{t-1} + R_t E[\lambda_t | x_{1:s}],\, R_t), \quad s = \min(t+k, T)$$

    G, R and $\lambda$ are those of `Backward`. The mean ELBO is -H(x) - `conditioning_gap`. For infinite lookahead the
    guide is p(z|x), and every draw has the ELBO log p(x). `diagonal` replaces R_t by the best diagonal covariance,
    diag(R_t^-1)^-1, with the same means.

    A Pyro guide: `guide(x)` with the sites "z_1" to "z_T" `(N, d)` in the plate "data", without trainable parameters.
    Raises `InputError` for a `lookahead` other than 0, 1, 2, ... or `math.inf`, and for `x` of another shape.
    """

    def __init__(self, model: LinearGaussianStateSpace, lookahead: float = 0, *, diagonal: bool = False) -> None:
        super().__init__()
        self.model, self.lookahead, self.diagonal = model, checked_lookahead(NAME, lookahead), diagonal

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets o `(N, T, d)`, G and L, each `(T, d, d)`, of the factors N(o_t + G_t z_{t-1}, L_t L_t'); G_1 = 0."""
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
