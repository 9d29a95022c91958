"""Two toy models for guides that see only part of the data, with closed-form conditioning gaps."""

import math
from functools import reduce

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyrogaps.errors import InputError
from pyrogaps.models.linear_gaussian import LinearGaussian, Numbers

Pair = tuple[float, float]


class MissingGaussian(LinearGaussian):
    r"""A linear-Gaussian model of x = (C, Cbar) for a guide that sees only C.

    $$z \sim \mathcal N(0, I), \quad x | z \sim \mathcal N(W z + b, \mathrm{diag}(s)^2)$$

    `shown` selects the elements of x in C: a number of leading elements, or a boolean mask `(D,)`. With S_f = Cov(z|C)
    and S_s = Cov(z|x), the same for all x, the best guide that sees only C is $\mathcal N(E[z|C], S_s)$: the filter's
    mean and the smoother's covariance. Other arguments, sites and methods are those of `LinearGaussian`.

    A guide for it declares `conditions = model.conditions`. Raises `InputError` for any other `shown`.
    """

    shown: Tensor

    def __init__(
        self,
        weight: Tensor | list[list[float]],
        bias: Numbers = 0.0,
        noise_scale: Numbers = 1.0,
        prior_scale: Numbers = 1.0,
        *,
        shown: int | Tensor | list[bool],
    ) -> None:
        super().__init__(weight, bias, noise_scale, prior_scale)
        self.register_buffer("shown", _mask(shown, self.data_dim).to(self.weight.device))

    @classmethod
    def random(
        cls,
        data_dim: int = 8,
        latent_dim: int = 2,
        noise_scale: float = 1.0,
        seed: int = 0,
        shown: int | Tensor | list[bool] = 1,
    ) -> "MissingGaussian":
        """The model of `LinearGaussian.random` with `shown` elements."""
        model = LinearGaussian.random(data_dim, latent_dim, noise_scale, seed)
        return cls(model.weight, model.bias, noise_scale, shown=shown)

    @classmethod
    def unit(cls) -> "MissingGaussian":
        """z ~ N(0, 1), C | z ~ N(z, 1), Cbar | z ~ N(z, 1).

        Conditioning gap 1/4, mutual information ln(3/2)/2, filter's gap (1 - ln(3/2))/2.
        """
        return cls([[1.0], [1.0]], shown=1)

    def conditions(self, x: Tensor) -> Tensor:
        """Which elements of `x` `(N, D)` are shown, boolean, `(N, D)`."""
        return self.shown.expand(x.shape)

    def conditional(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `(N, d)` and covariance `(d, d)` of p(z|C) for `x` `(N, D)`; only C is read."""
        W, noise = self.weight[self.shown], self.noise_scale[self.shown]
        root = torch.linalg.cholesky(self._shown_precision())
        information = ((x[:, self.shown] - self.bias[self.shown]) / noise**2) @ W
        return torch.cholesky_solve(information.T, root).T, torch.cholesky_inverse(root)

    def shared_posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `(N, d)` and covariance `(d, d)` of q_C, proportional to exp E[ln p(z|C, Cbar) | C]."""
        return self.conditional(x)[0], torch.linalg.inv(self.precision)

    def conditioning_gap(self) -> Tensor:
        r"""E KL(q_C || p(z|x)), the least gap of guides that see only C: $(\mathrm{tr}(S_s^{-1} S_f) - d) / 2$."""
        ratio = torch.linalg.solve(self._shown_precision(), self.precision)
        return (ratio.diagonal().sum() - self.latent_dim) / 2

    def mutual_information(self) -> Tensor:
        r"""I(z; Cbar | C): $\ln(|S_f| / |S_s|) / 2$."""
        return (torch.logdet(self.precision) - torch.logdet(self._shown_precision())) / 2

    def filter_gap(self) -> Tensor:
        """E KL(p(z|C) || p(z|x)), the gap of the guide p(z|C): 2 conditioning gap - mutual information."""
        return 2 * self.conditioning_gap() - self.mutual_information()

    def _shown_precision(self) -> Tensor:
        """S_f^-1, `(d, d)`."""
        whitened = (self.weight / self.noise_scale[:, None])[self.shown]
        return whitened.T @ whitened + self.prior_scale.pow(-2).diag()


class MissingBit(nn.Module):
    r"""A mixture of two Normals whose component x is a bit, for a guide that sees no data.

    $$z \sim \sum_i w_i \mathcal N(m_i, 1/L_i), \quad x | z \sim \mathrm{Bernoulli}(\mathrm{logit} =
    \ln w_1 \mathcal N(z; m_1, 1/L_1) - \ln w_0 \mathcal N(z; m_0, 1/L_0))$$

    so that p(x = i) = w_i and p(z | x = i) = N(m_i, 1/L_i). The best q(z) is Normal: the renormalised product of the
    posteriors to the powers w_i. A Pyro model: `model(x)` with `x` `(N,)` or `(N, 1)` of zeros and ones; sites "z"
    `(N, 1)` and "x" in the plate "data". A guide for it declares `conditions = model.conditions`.

    Raises `InputError` for `weights` that are not positive or do not sum to 1, for `precisions` that are not positive,
    and for `x` of another shape or with other values.
    """

    weights: Tensor
    means: Tensor
    precisions: Tensor

    def __init__(
        self,
        weights: Tensor | Pair = (0.5, 0.5),
        means: Tensor | Pair = (-2.0, 2.0),
        precisions: Tensor | Pair = (1.0, 4.0),
    ) -> None:
        super().__init__()
        given = {"weights": weights, "means": means, "precisions": precisions}
        kinds = [value.dtype for value in given.values() if isinstance(value, Tensor) and value.is_floating_point()]
        dtype = reduce(torch.promote_types, kinds) if kinds else torch.get_default_dtype()
        for name, value in given.items():
            pair = torch.as_tensor(value, dtype=dtype).detach().clone()
            if pair.shape != (2,):
                raise InputError(f"MissingBit: {name} must be two numbers, for x = 0 and x = 1, got {value}")
            self.register_buffer(name, pair)
        if not bool((self.weights > 0).all()) or abs(float(self.weights.sum()) - 1) > 1e-6:
            raise InputError(f"MissingBit: weights must be positive and sum to 1, got {self.weights.tolist()}")
        if not bool((self.precisions > 0).all()):
            raise InputError(f"MissingBit: precisions must be positive, got {self.precisions.tolist()}")

    def forward(self, x: Tensor) -> Tensor:
        """Run the model on `x` `(N,)` or `(N, 1)`; returns z, shape `(N, 1)`."""
        _check_shape(x)
        modes = dist.Normal(self.means[:, None], self.precisions[:, None].rsqrt()).to_event(1)
        with pyro.plate("data", len(x)):
            z: Tensor = pyro.sample("z", _Mixture(dist.Categorical(self.weights), modes))
            likelihood = dist.Bernoulli(logits=self.log_odds(z).reshape(-1, *x.shape[1:]))
            pyro.sample("x", likelihood.to_event(x.dim() - 1), obs=x.to(z.dtype))
        return z

    def log_odds(self, z: Tensor) -> Tensor:
        """ln p(x=1|z) - ln p(x=0|z) for `z` `(N, 1)`, `(N,)`."""
        log_joint = self.weights.log() + dist.Normal(self.means, self.precisions.rsqrt()).log_prob(z)
        return log_joint[..., 1] - log_joint[..., 0]

    def conditions(self, x: Tensor) -> Tensor:
        """Which elements of `x` are shown: none. Boolean, of the shape of `x`."""
        return torch.zeros_like(x, dtype=torch.bool)

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) of `x` `(N,)` or `(N, 1)`: ln w_x, `(N,)`."""
        return self.weights.log()[_bits(x)]

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of p(z|x), each `(N, 1)`."""
        bits = _bits(x)
        return self.means[bits][:, None], 1 / self.precisions[bits][:, None]

    def shared_posterior(self) -> tuple[Tensor, Tensor]:
        r"""Mean m and variance 1/L of the best q(z), scalars:

        $$L = \sum_i w_i L_i, \quad m = L^{-1} \sum_i w_i L_i m_i$$
        """
        weighted = self.weights * self.precisions
        return (weighted * self.means).sum() / weighted.sum(), 1 / weighted.sum()

    def conditioning_gap(self) -> Tensor:
        r"""E KL(q || p(z|x)) of the best q(z), the gap due to not seeing x, a scalar:

        $$[\sum_i w_i L_i m_i^2 - L m^2 + \ln L - \sum_i w_i \ln L_i] / 2$$
        """
        m, variance = self.shared_posterior()
        spread = (self.weights * self.precisions * self.means**2).sum() - m**2 / variance
        return (spread - variance.log() - (self.weights * self.precisions.log()).sum()) / 2


class _Mixture(dist.MixtureSameFamily):
    """A mixture of vectors with real support; Pyro cannot transform torch's own constraint for mixtures."""

    support = constraints.real_vector


def _mask(shown: int | Tensor | list[bool], size: int) -> Tensor:
    """`shown` as a boolean mask `(size,)`."""
    if isinstance(shown, int) and not isinstance(shown, bool):
        if not 0 <= shown <= size:
            raise InputError(f"MissingGaussian: shown must be from 0 to {size}, the size of x, got {shown}")
        return torch.arange(size) < shown
    mask = torch.as_tensor(shown)
    if mask.dtype != torch.bool or mask.shape != (size,):
        raise InputError(f"MissingGaussian: shown must be a number or a boolean mask of shape ({size},), got {shown}")
    return mask.clone()


def _check_shape(x: Tensor) -> None:
    if x.dim() not in (1, 2) or math.prod(x.shape[1:]) != 1:
        raise InputError(f"MissingBit: x must have shape (N,) or (N, 1), got {tuple(x.shape)}")


def _bits(x: Tensor) -> Tensor:
    """`x` as indices `(N,)`."""
    _check_shape(x)
    if not bool(((x == 0) | (x == 1)).all()):
        raise InputError("MissingBit: x must contain only zeros and ones")
    return x.reshape(-1).long()
