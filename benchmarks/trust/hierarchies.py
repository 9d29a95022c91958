"""Hierarchies without a data plate: one data set is one datapoint, and the guide an autoguide or alike."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Generator, Tensor, nn

from benchmarks.trust.problem import Bounds, Instance, Problem
from benchmarks.trust.scales import Scales
from benchmarks.trust.truths import log_integral, maximised

LOG_2PI = math.log(2 * math.pi)


def _c(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


GROUPS, EACH, TOP, BETWEEN, WITHIN = 6, 4, 5.0, 0.7, 1.5


def known_scale(number: int, generator: Generator) -> Instance:
    """m ~ N(0, 5), theta_j ~ N(m, 0.7), four observations of each of six with noise 1.5; all Gaussian."""
    unit = torch.randn(1 + GROUPS * (1 + EACH), generator=generator, dtype=torch.float64)
    theta = TOP * unit[0] + BETWEEN * unit[1 : 1 + GROUPS]
    y = theta[:, None] + WITHIN * unit[1 + GROUPS :].reshape(GROUPS, EACH)

    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(y.new_zeros(()), TOP))
        with pyro.plate("groups", GROUPS, dim=-2):
            theta = pyro.sample("theta", dist.Normal(m, BETWEEN))
            with pyro.plate("observations", EACH, dim=-1):
                pyro.sample("y", dist.Normal(theta, WITHIN), obs=y)

    # Of (m, theta_1, ..., theta_6).
    precision = torch.diag(
        torch.cat([_c(TOP**-2 + GROUPS / BETWEEN**2), _c(BETWEEN**-2 + EACH / WITHIN**2).expand(GROUPS)])
    )
    precision[0, 1:] = precision[1:, 0] = -(BETWEEN**-2)
    information = torch.cat([_c(0.0), y.sum(-1) / WITHIN**2])
    mean = torch.linalg.solve(precision, information)
    guide = AutoNormal(model)
    guide(y)
    # As after training that stopped early: half a standard deviation off, and too wide by a fifth.
    scale = precision.diagonal().rsqrt()
    for site, part in (("m", slice(0, 1)), ("theta", slice(1, None))):
        shape = getattr(guide.locs, site).shape
        setattr(guide.locs, site, nn.Parameter((mean + 0.5 * scale)[part].reshape(shape)))
        setattr(guide.scales, site, (1.2 * scale)[part].reshape(shape))
    same_group = torch.block_diag(*[torch.ones(EACH, EACH, dtype=torch.float64)] * GROUPS)
    covariance = TOP**2 + BETWEEN**2 * same_group + WITHIN**2 * torch.eye(GROUPS * EACH, dtype=torch.float64)
    log_evidence = dist.MultivariateNormal(torch.zeros(len(covariance)).double(), covariance).log_prob(y.flatten())

    def bounds() -> Bounds:
        loc = torch.cat([guide.locs.m.reshape(1), guide.locs.theta.flatten()]).detach().double()
        scale = torch.cat([guide.scales.m.reshape(1), guide.scales.theta.flatten()]).detach().double()
        off, diagonal = loc - mean, precision.diagonal()
        divergence = off @ precision @ off + (diagonal * scale**2 - 1).sum() - torch.logdet(precision)
        gap = (diagonal.log().sum() - torch.logdet(precision)) / 2
        given = log_evidence - divergence / 2 + scale.log().sum()
        return Bounds(given[None], (log_evidence - gap)[None])

    return Instance(model, guide, y, log_evidence[None], bounds, False)


SIGMAS = _c(1.5, 1.0, 1.6, 1.1, 0.9, 1.1, 1.0, 1.8)  # those of the eight schools, over 10


class SchoolsGuide(nn.Module):
    """Independent Normals of m, log tau and the effects, not trained far."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.cat([_c(float(y.mean()), -0.3), 0.5 * (y + y.mean())]))
        self.log_scale = nn.Parameter(torch.cat([_c(-0.6, -0.4), torch.full_like(y, -0.5)]))

    def forward(self, y: Tensor) -> None:
        scale = self.log_scale.exp()
        pyro.sample("m", dist.Normal(self.loc[0], scale[0]))
        pyro.sample("log_tau", dist.Normal(self.loc[1], scale[1]))
        with pyro.plate("schools", len(y)):
            pyro.sample("theta", dist.Normal(self.loc[2:], scale[2:]))


def schools_elbo(y: Tensor, t: Tensor, s: Tensor, m: Tensor, s_m: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    r"""The ELBO of N(t, s) for log tau and N(m, s_m) for m, `(*,)`, N(mean, scale) for the effects, `(*, 8)`."""
    size = len(SIGMAS)
    inverse = (-2 * t + 2 * s**2).exp()  # E[1 / tau^2]
    spread = ((mean - m[..., None]) ** 2 + scale**2).sum(-1) + size * s_m**2
    top = -0.5 * (m**2 + s_m**2) / TOP**2 - math.log(TOP) - 0.5 * (t**2 + s**2) - LOG_2PI
    effects = -0.5 * inverse * spread - size * (t + 0.5 * LOG_2PI)
    error = ((y - mean) ** 2 + scale**2) / SIGMAS**2
    likelihood = (-0.5 * error - SIGMAS.log()).sum(-1) - 0.5 * size * LOG_2PI
    entropy = s.log() + s_m.log() + scale.log().sum(-1) + 0.5 * (size + 2) * (1 + LOG_2PI)
    return top + effects + likelihood + entropy


def schools(number: int, generator: Generator) -> Instance:
    """Eight schools, centred: m ~ N(0, 5), log tau ~ N(0, 1), theta_j ~ N(m, tau), y_j ~ N(theta_j, sigma_j)."""
    size = len(SIGMAS)
    unit = torch.randn(2 * size, generator=generator, dtype=torch.float64)
    y = 0.8 + 0.7 * unit[:size] + SIGMAS * unit[size:]

    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(y.new_zeros(()), TOP))
        log_tau = pyro.sample("log_tau", dist.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("schools", size):
            theta = pyro.sample("theta", dist.Normal(m, log_tau.exp()))
            pyro.sample("y", dist.Normal(theta, SIGMAS), obs=y)

    def given(t: Tensor) -> Tensor:
        """Of log tau, the rest integrated in closed form."""
        spread = (2 * t[..., 0]).exp()[..., None] + SIGMAS**2
        covariance = torch.diag_embed(spread) + TOP**2
        return dist.MultivariateNormal(torch.zeros(size).double(), covariance).log_prob(y) + dist.Normal(
            0.0, 1.0
        ).log_prob(t[..., 0])

    guide = SchoolsGuide(y)

    def objective(theta: Tensor) -> Tensor:
        """Of (mean, log scale) of log tau and the mean of m; the rest is at its best."""
        t, s, m = theta[..., 0], theta[..., 1].exp(), theta[..., 2]
        inverse = (-2 * t + 2 * s**2).exp()[..., None]
        precision = inverse + SIGMAS**-2
        mean = (inverse * m[..., None] + y / SIGMAS**2) / precision
        return schools_elbo(y, t, s, m, (TOP**-2 + size * inverse[..., 0]).rsqrt(), mean, precision.rsqrt())

    def bounds() -> Bounds:
        loc, scale = guide.loc.detach(), guide.log_scale.detach().exp()
        elbo = schools_elbo(y, loc[1], scale[1], loc[0], scale[0], loc[2:], scale[2:])
        lines = [torch.linspace(*side, dtype=torch.float64) for side in ((-6, 3, 19), (-2, 1, 7), (-2, 4, 13))]
        grid = torch.cartesian_prod(*lines)
        best = maximised(objective, grid[objective(grid).topk(6).indices]).amax()
        return Bounds(elbo[None], best[None])

    return Instance(model, guide, y, log_integral(given, -12.0, 12.0, 4001), bounds, False)


def funnel(number: int, generator: Generator) -> Instance:
    """Neal's funnel: v ~ N(0, 3), nine variables of scale exp(v / 2), each seen once, noise 1."""
    of, dim = Scales(3.0, 1.0), 9

    def model(x: Tensor) -> None:
        v = pyro.sample("v", dist.Normal(x.new_zeros(()), 3.0))
        scale = (v / 2).exp()[..., None].expand(*v.shape, dim)
        z = pyro.sample("z", dist.Normal(torch.zeros_like(scale), scale).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    x = of.draw(1, dim, generator)
    guide = of.guide(dim)
    return Instance(model, guide, x[0], of.log_evidence(x), lambda: Bounds(of.elbo(guide, x), of.best(x)), False)


PROBLEMS = (
    Problem(
        "schools-known-scale",
        known_scale,
        "a Gaussian hierarchy of 7 latents, plate=False, AutoNormal",
        1,
        1,
        easy=True,
    ),
    Problem("schools", schools, "eight schools, centred, plate=False", 1, 1),
    Problem("funnel-9", funnel, "Neal's funnel of 10 dimensions, plate=False", 1, 1),
)
