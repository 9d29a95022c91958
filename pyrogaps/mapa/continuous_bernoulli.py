"""The continuous Bernoulli distribution in its natural parameter, and the parameter that has a given mean."""

import torch
from torch import Tensor

_SMALL = 0.1  # below it the closed forms lose digits, and four terms of their series are exact in double precision
_NEWTON_STEPS = 4  # each doubles the digits, from two


def log_normaliser(eta: Tensor) -> Tensor:
    r"""$A(\eta) = \log \int_0^1 e^{\eta x} dx = \log((e^\eta - 1) / \eta)$, elementwise."""
    half = eta.abs() / 2
    safe = half.clamp(min=_SMALL)
    large = safe + torch.log1p(-torch.exp(-2 * safe)) - torch.log(2 * safe)
    # Where the other branch is taken this one must stay finite too: its gradient is multiplied by 0.
    square = torch.where(half < _SMALL, half, torch.zeros_like(half)).square()
    small = square * (1 / 6 - square * (1 / 180 - square * (1 / 2835 - square / 37800)))
    return eta / 2 + torch.where(half < _SMALL, small, large)


def natural_parameter(mean: Tensor) -> Tensor:
    r"""The $\eta$ with $A'(\eta) = 1 / (1 - e^{-\eta}) - 1 / \eta$ = `mean`, elementwise, for means inside (0, 1).

    With $\eta = 2 u$ the mean is $(1 + L(u)) / 2$, L the Langevin function. Its inverse is Newton's, from A. Cohen's
    approximation (Rheologica Acta 30, 1991, doi:10.1007/BF00366640).
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
    # 1 / sinh^2 = coth^2 - 1 would cancel far out; sinh overflows to infinity there, which is right.
    far = (coth - 1 / safe, 1 / safe.square() - 1 / torch.sinh(safe).square())
    near = u.abs() < _SMALL
    return torch.where(near, value, far[0]), torch.where(near, slope, far[1])
