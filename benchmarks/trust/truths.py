r"""Exact integrals and exact best Gaussians of densities in one and two dimensions, in double precision.

Densities are functions `log_joint(z)` from points `(*, N, d)` to log p(x_n, z) `(*, N)` in nats, in the space where the
guide is Gaussian. Integrals are sums over an even grid, whose error falls exponentially with the spacing for smooth
integrands that vanish at the ends (Trefethen and Weideman 2014, doi:10.1137/130932132).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LogDensity = Callable[[Tensor], Tensor]

# Of the grid on which expectations under a Gaussian are taken, in standard deviations: 9 are 1e-19 of its mass.
REACH = 9.0
SPACING = {1: 0.03, 2: 0.4}
# Newton's method ends when no datapoint has more than this left to gain, nats.
NUM_NEWTON, TOLERANCE = 60, 1e-9


def log_integral(log_joint: LogDensity, low: float, high: float, points: int = 20001) -> Tensor:
    """log of the integral over the line from `low` to `high`, `(N,)`."""
    grid = torch.linspace(low, high, points, dtype=torch.float64)
    values = log_joint(grid[:, None, None])
    # The ends count half, which matters only where the density is cut off there.
    ends = torch.zeros(points, dtype=torch.float64)
    ends[0] = ends[-1] = -math.log(2)
    return torch.logsumexp(values + ends[:, None], 0) + math.log((high - low) / (points - 1))


def log_integral_of_plane(log_joint: LogDensity, low: Sequence[float], high: Sequence[float], points: int) -> Tensor:
    """log of the integral over a rectangle, `(N,)`, with `points` to each side."""
    lines = [torch.linspace(a, b, points, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    area = sum(math.log(float(line[1] - line[0])) for line in lines)
    return torch.logsumexp(log_joint(torch.cartesian_prod(*lines)[:, None]), 0) + area


def gaussian_elbo(log_joint: LogDensity, mean: Tensor, scale: Tensor) -> Tensor:
    """The ELBO of independent Normals, `mean` and `scale` `(*, N, d)` with d of 1 or 2; `(*, N)`."""
    d = mean.shape[-1]
    number = round(2 * REACH / SPACING[d]) + 1
    line = torch.linspace(-REACH, REACH, number, dtype=torch.float64)
    noise = torch.cartesian_prod(*[line] * d).reshape(-1, d)
    weight = torch.softmax(-0.5 * noise.square().sum(-1), 0)
    shape = (-1, *[1] * (mean.dim() - 1))
    values = log_joint(mean + scale * noise.reshape(*shape, d))
    entropy = scale.log().sum(-1) + 0.5 * d * math.log(2 * math.pi * math.e)
    return (weight.reshape(shape) * values).sum(0) + entropy


def best_gaussian(
    log_joint: LogDensity, means: Tensor, scales: Sequence[float], number: int, polished: int = 3
) -> Tensor:
    r"""The ELBO of the best independent Normals, `(N,)` for N = `number`, searched from `means` `(G, 1 or N, d)`:

    $$\max_{m, s} \mathbb E_{\mathcal N(m, \mathrm{diag}(s)^2)}[\log p(x_n, z)] + \text{entropy}$$

    Every pair of a mean and a scale is tried for every datapoint, then the `polished` best are improved by Newton's
    method, damped until each step gains. The grid must be as fine as the modes are wide: the best of it is then in the
    basin of the global optimum.
    """
    centres = means.double().expand(-1, number, -1)
    tried = [gaussian_elbo(log_joint, centre, torch.full_like(centre, scale)) for centre in centres for scale in scales]
    best = torch.stack(tried).topk(min(polished, len(tried)), 0).indices
    mean = centres[best // len(scales), torch.arange(number)]
    log_scale = torch.tensor(scales, dtype=torch.float64).log()[best % len(scales)][..., None].expand_as(mean)

    def objective(theta: Tensor) -> Tensor:
        m, log_s = theta.chunk(2, -1)
        return gaussian_elbo(log_joint, m, log_s.exp())

    return maximised(objective, torch.cat([mean, log_scale], -1)).amax(0)


def maximised(objective: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """Local maxima of `objective`, from `(*, p)` to `(*,)`, element by element, by damped Newton steps."""
    damping = torch.ones(theta.shape[:-1], dtype=torch.float64)
    value = objective(theta).detach()
    for _ in range(NUM_NEWTON):
        gradient, hessian = _derivatives(objective, theta)
        eigenvalues, vectors = torch.linalg.eigh(-hessian)
        # Against saddles: every direction counts as curved downwards.
        curvature, along = eigenvalues.abs(), (vectors.mT @ gradient[..., None])[..., 0]
        left = (along**2 / curvature.clamp(min=1e-6)).sum(-1)
        if float(left.max()) < TOLERANCE:
            break
        step = (vectors @ (along / (curvature + damping[..., None]))[..., None])[..., 0].clamp(-2.0, 2.0)
        reached = objective(theta + step).detach()
        gains = reached >= value
        theta = torch.where(gains[..., None], theta + step, theta)
        value = torch.where(gains, reached, value)
        damping = torch.where(gains, damping * 0.2, damping * 8)
    return value


def _derivatives(objective: Callable[[Tensor], Tensor], theta: Tensor) -> tuple[Tensor, Tensor]:
    theta = theta.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(theta).sum(), theta, create_graph=True)
    rows = [torch.autograd.grad(part.sum(), theta, retain_graph=True)[0] for part in gradient.unbind(-1)]
    return gradient.detach(), torch.stack(rows, -2)


def line(low: float, high: float, points: int) -> Tensor:
    """Means to search from in one dimension, `(points, 1, 1)`."""
    return torch.linspace(low, high, points, dtype=torch.float64)[:, None, None]


def plane(first: tuple[float, float, int], second: tuple[float, float, int]) -> Tensor:
    """Means to search from in two dimensions: a grid `(points, 1, 2)` of (low, high, number) each."""
    lines = [torch.linspace(*side, dtype=torch.float64) for side in (first, second)]
    return torch.cartesian_prod(*lines)[:, None]
