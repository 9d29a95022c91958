r"""Funnels, $v \sim N(0, w)$, $z_j \sim N(0, e^{v/2})$, $x_j \sim N(z_j, \sigma)$, and their best mean fields."""

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Generator, Tensor, nn

from benchmarks.trust.truths import log_integral, maximised

LOG_2PI = math.log(2 * math.pi)


class ScaleGuide(nn.Module):
    """q(v) = N(loc_v, scale_v), q(z_j|x) = N(slope x_j, scale_z): a guide that ignores what x says of v."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.tensor(math.log(0.8), dtype=torch.float64))
        self.slope = nn.Parameter(torch.tensor(0.6, dtype=torch.float64))
        self.log_scale_z = nn.Parameter(torch.full((dim,), math.log(0.7), dtype=torch.float64))

    def forward(self, x: Tensor) -> None:
        """For `x` `(N, J)` in the plate "data", or `(J,)` without a plate."""
        if x.dim() == 1:
            self._draw(x)
            return
        with pyro.plate("data", len(x)):
            self._draw(x)

    def _draw(self, x: Tensor) -> None:
        pyro.sample("v", dist.Normal(self.loc.expand(x.shape[:-1]), self.log_scale.exp()))
        pyro.sample("z", dist.Normal(self.slope * x, self.log_scale_z.exp()).to_event(1))


@dataclass(frozen=True)
class Scales:
    """A funnel: the standard deviation of v, and that of the noise."""

    width: float
    noise: float

    def guide(self, dim: int) -> ScaleGuide:
        return ScaleGuide(dim)

    def draw(self, number: int, dim: int, generator: Generator) -> Tensor:
        """Data `(number, dim)`."""
        unit = torch.randn(number, 2 * dim + 1, generator=generator, dtype=torch.float64)
        z = (self.width * unit[:, :1] / 2).exp() * unit[:, 1 : dim + 1]
        return z + self.noise * unit[:, dim + 1 :]

    def log_evidence(self, x: Tensor) -> Tensor:
        """By quadrature over v: given v the data are N(0, e^v + noise^2), `(N,)`."""

        def given(v: Tensor) -> Tensor:
            spread = (v.exp() + self.noise**2).sqrt()
            return dist.Normal(0.0, spread).log_prob(x).sum(-1) + dist.Normal(0.0, self.width).log_prob(v[..., 0])

        return log_integral(given, -12 * self.width, 12 * self.width, 8001)

    def of_mean_field(self, x: Tensor, m: Tensor, s: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        r"""The ELBO of N(m, s) for v, `(*, N)`, and N(mean, scale) for z, `(*, N, J)`; $E[e^{-v}] = e^{-m+s^2/2}$."""
        size = x.shape[-1]
        inverse = (-m + s**2 / 2).exp()[..., None]
        second = mean**2 + scale**2
        prior_v = -0.5 * (m**2 + s**2) / self.width**2 - math.log(self.width) - 0.5 * LOG_2PI
        prior_z = -0.5 * (inverse * second).sum(-1) - 0.5 * size * (m + LOG_2PI)
        error = ((x - mean) ** 2 + scale**2).sum(-1) / self.noise**2
        likelihood = -0.5 * error - size * (math.log(self.noise) + 0.5 * LOG_2PI)
        entropy = s.log() + scale.log().sum(-1) + 0.5 * (size + 1) * (1 + LOG_2PI)
        return prior_v + prior_z + likelihood + entropy

    def elbo(self, guide: ScaleGuide, x: Tensor) -> Tensor:
        """L[q] of a guide, `(N,)`."""
        with torch.no_grad():
            ones = torch.ones(len(x), dtype=torch.float64)
            scale = guide.log_scale_z.exp().expand_as(x)
            return self.of_mean_field(x, guide.loc * ones, guide.log_scale.exp() * ones, guide.slope * x, scale)

    def best(self, x: Tensor) -> Tensor:
        """L[q*] over mean fields, `(N,)`: of each q(v) the best q(z) is known, so that two parameters are searched."""

        def objective(theta: Tensor) -> Tensor:
            m, s = theta[..., 0], theta[..., 1].exp()
            precision = (-m + s**2 / 2).exp()[..., None] + self.noise**-2
            return self.of_mean_field(
                x, m, s, x / self.noise**2 / precision, precision.rsqrt().expand(*m.shape, x.shape[-1])
            )

        centres = torch.linspace(-4 * self.width, 4 * self.width, 65, dtype=torch.float64)
        log_scales = torch.linspace(-2.5, 1.5, 17, dtype=torch.float64)
        grid = torch.cartesian_prod(centres, log_scales)[:, None].expand(-1, len(x), -1)
        best = objective(grid).topk(4, 0).indices
        return maximised(objective, grid[best, torch.arange(len(x))]).amax(0)
