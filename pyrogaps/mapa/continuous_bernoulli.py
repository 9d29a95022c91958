"""The continuous Bernoulli distribution in its natural parameter, and the kernel of its likelihood."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyrogaps.errors import InputError
from pyrogaps.mapa.distances import Comparison, Divergences
from pyrogaps.mapa.kernels import Alpha, flat
from pyrogaps.settings import Positive, checked

_SMALL = 0.1  # below it the closed forms lose digits; four terms of their series are exact in double precision
_NEWTON_STEPS = 4  # the start has two correct digits, and each step doubles their number
_BLOCK_ROWS = 1024  # intermediate results of the natural parameter take several times its memory


def log_normaliser(eta: Tensor) -> Tensor:
    r"""$A(\eta) = \log \int_0^1 e^{\eta x} dx = \log((e^\eta - 1) / \eta)$, elementwise."""
    half = eta.abs() / 2
    safe = half.clamp(min=_SMALL)
    large = safe + torch.log1p(-torch.exp(-2 * safe)) - torch.log(2 * safe)
    # Both branches must be finite everywhere: the gradient of the branch not taken is multiplied by 0.
    square = torch.where(half < _SMALL, half, torch.zeros_like(half)).square()
    small = square * (1 / 6 - square * (1 / 180 - square * (1 / 2835 - square / 37800)))
    return eta / 2 + torch.where(half < _SMALL, small, large)


def natural_parameter(mean: Tensor) -> Tensor:
    r"""The $\eta$ with $A'(\eta) = 1 / (1 - e^{-\eta}) - 1 / \eta$ = `mean`, elementwise, for means inside (0, 1).

    With $\eta = 2 u$ the mean is $(1 + L(u)) / 2$, where L is the Langevin function. Newton's method inverts L,
    starting at A. Cohen's approximation (Rheologica Acta 30, 1991, doi:10.1007/BF00366640).
    """
    y = 2 * mean - 1
    u = y * (3 - y.square()) / (1 - y.square())
    for _ in range(_NEWTON_STEPS):
        value, slope = _langevin(u)
        u = u - (value - y) / slope
    return 2 * u


def _langevin(u: Tensor) -> tuple[Tensor, Tensor]:
    """L(u) = coth u - 1 / u and its derivative."""
    safe = torch.where(u.abs() < _SMALL, torch.full_like(u, _SMALL), u)
    square = u.square()
    value = u * (1 / 3 - square * (1 / 45 - square * (2 / 945 - square / 4725)))
    slope = 1 / 3 - square * (1 / 15 - square * (2 / 189 - square / 675))
    coth = 1 / torch.tanh(safe)
    # Not coth^2 - 1, which cancels for large u. There sinh overflows to infinity, which gives the right limit.
    far = (coth - 1 / safe, 1 / safe.square() - 1 / torch.sinh(safe).square())
    near = u.abs() < _SMALL
    return torch.where(near, value, far[0]), torch.where(near, slope, far[1])


@checked("ContinuousBernoulliKernel")
@dataclass(frozen=True)
class ContinuousBernoulliKernel:
    r"""The tempered likelihood of one datapoint with the other as its mean, for data between 0 and 1:

    $$\log \kappa(x, y) = \frac1b \sum_d \eta_d x_d - A(\eta_d), \quad A'(\eta_d) = 1 - \alpha + (2 \alpha - 1) y_d,$$

    $A(\eta) = \log((e^\eta - 1) / \eta)$. As in the Gaussian and the Bernoulli kernel, the datapoint that explains
    takes the place of its decoder's reconstruction, the mean. Alpha softens it; without softening, a datapoint with
    zeros or ones would explain itself infinitely well. The kernel is not symmetric.

    Args:
        temperature: b, the bandwidth; 1 is the likelihood itself, more is flatter.
        alpha: the softening, as in `BernoulliKernel`. Distances depend on it.

    Raises:
        InputError: where `temperature` is not positive and finite, or `alpha` not inside (0.5, 1).

    Example:
        >>> import torch, pyrogaps as pg
        >>> x = torch.tensor([[0.1, 0.1], [0.1, 0.8], [0.9, 0.9]])
        >>> pg.mapa_posterior(x, pg.ContinuousBernoulliKernel()).to_dense()[0].exp().argmax().item()
        0
    """

    temperature: Positive = 1.0
    alpha: Alpha = 0.99

    @property
    def bandwidth(self) -> float:
        return self.temperature

    @property
    def distance(self) -> str:
        return f"continuous Bernoulli, alpha {self.alpha!r}"

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        eta = self._natural(flat(y))
        return self.of_distances(Divergences.between(flat(x), eta, log_normaliser(eta).sum(1)))

    def check(self, x: Tensor) -> None:
        if not bool(((x >= 0) & (x <= 1)).all()):
            raise InputError(
                "data: outside the support of a continuous Bernoulli likelihood, from 0 to 1. Divide them by their "
                "largest value, or use GaussianKernel"
            )

    def compare(self, x: Tensor) -> Comparison:
        eta = torch.cat([self._natural(rows) for rows in flat(x).split(_BLOCK_ROWS)])
        normaliser = torch.cat([log_normaliser(rows).sum(1) for rows in eta.split(_BLOCK_ROWS)])
        return Divergences(flat(x), eta, normaliser)

    def of_distances(self, distances: Tensor) -> Tensor:
        return -distances / self.temperature

    def with_bandwidth(self, bandwidth: float) -> "ContinuousBernoulliKernel":
        return replace(self, temperature=bandwidth)

    def _natural(self, y: Tensor) -> Tensor:
        """The natural parameters of the softened means."""
        return natural_parameter(1 - self.alpha + (2 * self.alpha - 1) * y.double())
