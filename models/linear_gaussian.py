"""Probabilistic PCA and factor analysis: a latent-variable model with all gaps in closed form."""

import math
from typing import TypeAlias

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrogaps.errors import InputError

Numbers: TypeAlias = Tensor | float | list[float]


class LinearGaussian(nn.Module):
    """z ~ N(0, diag(prior_scale^2)), x | z ~ N(W z + b, diag(noise_scale^2)) (Tipping and Bishop 1999,
    doi:10.1111/1467-9868.00196).

    A Pyro model: `model(x)` with `x` `(N, D)`; sites "z" `(N, d)` and "x" `(N, D)` in the plate "data". `weight` is W
    `(D, d)`, `bias` is b `(D,)` or one number, `noise_scale` `(D,)` or one number, `prior_scale` `(d,)` or one
    number. W, b and the noise are trainable, the prior is fixed. The posterior is Gaussian with precision
    L = diag(prior_scale^-2) + W' diag(noise_scale^-2) W for all x, so every method below is exact, in nats.

    Raises `InputError` for shapes that do not fit and for scales that are not positive.
    """

    prior_scale: Tensor

    def __init__(
        self,
        weight: Tensor | list[list[float]],
        bias: Numbers = 0.0,
        noise_scale: Numbers = 1.0,
        prior_scale: Numbers = 1.0,
    ) -> None:
        super().__init__()
        W = torch.as_tensor(weight)
        W = W if W.is_floating_point() else W.to(torch.get_default_dtype())
        if W.dim() != 2:
            raise InputError(f"LinearGaussian: weight must have shape (D, d), got {tuple(W.shape)}")
        self.data_dim, self.latent_dim = W.shape
        self.weight = nn.Parameter(W.detach().clone())
        self.bias = nn.Parameter(_vector("bias", bias, self.data_dim, W))
        self.log_noise_scale = nn.Parameter(_positive("noise_scale", noise_scale, self.data_dim, W).log())
        self.register_buffer("prior_scale", _positive("prior_scale", prior_scale, self.latent_dim, W))

    @classmethod
    def random(
        cls, data_dim: int = 8, latent_dim: int = 2, noise_scale: float = 1.0, seed: int = 0
    ) -> "LinearGaussian":
        """A model with standard Normal weights and biases drawn from `seed`."""
        draws = torch.randn(data_dim, latent_dim + 1, generator=torch.Generator().manual_seed(seed))
        return cls(draws[:, 1:], draws[:, 0], noise_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Run the model on `x` `(N, D)`; returns z, shape `(N, d)`."""
        with pyro.plate("data", len(x)):
            z: Tensor = pyro.sample("z", dist.Normal(torch.zeros_like(self.prior_scale), self.prior_scale).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T + self.bias, self.noise_scale).to_event(1), obs=x)
        return z

    @property
    def noise_scale(self) -> Tensor:
        """Standard deviations of the noise, shape `(D,)`."""
        return self.log_noise_scale.exp()

    @property
    def precision(self) -> Tensor:
        """The posterior's precision L, shape `(d, d)`, the same for every x."""
        whitened = self.weight / self.noise_scale[:, None]
        return whitened.T @ whitened + self.prior_scale.pow(-2).diag()

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) of `x` `(N, D)`, shape `(N,)`."""
        factor = self.weight * self.prior_scale
        return dist.LowRankMultivariateNormal(self.bias, factor, self.noise_scale**2).log_prob(x)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `(N, d)` and covariance `(d, d)` of p(z|x)."""
        root = torch.linalg.cholesky(self.precision)
        information = ((x - self.bias) / self.noise_scale**2) @ self.weight
        return torch.cholesky_solve(information.T, root).T, torch.cholesky_inverse(root)

    def mean_field_optimum(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `(N, d)` and scale `(d,)` of the best diagonal Gaussian: the posterior mean and L_ii^(-1/2)."""
        mean, _ = self.posterior(x)
        return mean, self.precision.diagonal().rsqrt()

    def elbo(self, x: Tensor, mean: Tensor, *, scale: Tensor | None = None, scale_tril: Tensor | None = None) -> Tensor:
        """The exact ELBO of q = N(mean, C), shape `(N,)`:

            log p(x, mean) - tr(L C) / 2 + (d ln(2 pi e) + ln |C|) / 2.

        `mean` is `(N, d)`. Give one of `scale` `(N, d)` or `(d,)`, with C = diag(scale^2), and `scale_tril`
        `(N, d, d)` or `(d, d)`, with C = scale_tril scale_tril'. Raises `InputError` for none or both.
        """
        if (scale is None) == (scale_tril is None):
            raise InputError("LinearGaussian.elbo: pass either scale or scale_tril, not both or neither")
        root = torch.diag_embed(scale) if scale is not None else scale_tril
        assert root is not None
        trace = torch.einsum("...ki,kl,...li->...", root, self.precision, root)
        entropy = root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + self.latent_dim * (1 + math.log(2 * math.pi)) / 2
        return self._log_joint(x, mean) - trace / 2 + entropy

    def _log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        prior = dist.Normal(torch.zeros_like(self.prior_scale), self.prior_scale).log_prob(z).sum(-1)
        likelihood = dist.Normal(z @ self.weight.T + self.bias, self.noise_scale).log_prob(x).sum(-1)
        return prior + likelihood

    def approximation_gap(self) -> Tensor:
        """log p(x) minus the best ELBO of diagonal Gaussians, equal for all x: (sum_i ln L_ii - ln |L|) / 2."""
        L = self.precision
        return (L.diagonal().log().sum() - torch.logdet(L)) / 2

    def amortization_gap(self, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        """ELBO of the best diagonal Gaussian minus that of q = N(mean, diag(scale^2)), shape `(N,)`:

            [(mean - m)' L (mean - m) + sum_i (L_ii scale_i^2 - 1 - ln L_ii scale_i^2)] / 2,   m the posterior mean.

        `mean` is `(N, d)`, `scale` `(N, d)` or `(d,)`.
        """
        difference = mean - self.posterior(x)[0]
        ratio = self.precision.diagonal() * scale**2
        squared_distance = torch.einsum("ni,ij,nj->n", difference, self.precision, difference)
        return (squared_distance + (ratio - 1 - ratio.log()).sum(-1)) / 2


def _vector(name: str, value: Numbers, size: int, like: Tensor) -> Tensor:
    vector = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
    if vector.shape not in ((), (size,)):
        shape = tuple(vector.shape)
        raise InputError(f"LinearGaussian: {name} must be one number or have shape ({size},), got {shape}")
    return vector.expand(size).clone()


def _positive(name: str, value: Numbers, size: int, like: Tensor) -> Tensor:
    vector = _vector(name, value, size, like)
    if not bool((vector > 0).all()):
        raise InputError(f"LinearGaussian: {name} must be positive")
    return vector
