"""A normal hierarchy with known gaps, and guides for it."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

NOISE = 0.5  # of x given z; z given m, and m, have unit variance
X = torch.randn(12, generator=torch.Generator().manual_seed(5)) + 1.0
SHARE = 1 / (1 + NOISE**2)  # of x in the mean of p(z | x, m)


def hierarchy(x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("d", len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


class Structured(nn.Module):
    """q(m) = N(loc, scale), q(z | x, m) = N(E[z | x, m] + shift, local)."""

    def __init__(self, loc: float = 0.5, scale: float = 0.22, shift: float = 0.1, local: float = 0.6) -> None:
        super().__init__()
        values = {"loc": loc, "scale": scale, "shift": shift, "local": local}
        self.values = nn.ParameterDict({name: torch.tensor(value) for name, value in values.items()})

    def shared(self, x: Tensor) -> Tensor:
        m: Tensor = pyro.sample("m", dist.Normal(self.values["loc"], self.values["scale"]))
        return m

    def forward(self, x: Tensor) -> None:
        m = self.shared(x)
        with pyro.plate("d", len(x)):
            mean = SHARE * x + (1 - SHARE) * m + self.values["shift"]
            pyro.sample("z", dist.Normal(mean, self.values["local"]))


class Amortised(Structured):
    """q(m) depends on the data."""

    def shared(self, x: Tensor) -> Tensor:
        m: Tensor = pyro.sample("m", dist.Normal(x.mean(), self.values["scale"]))
        return m


class Backwards(Structured):
    """q(m) depends on the local latents."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("d", len(x)):
            z = pyro.sample("z", dist.Normal(SHARE * x, self.values["local"]))
        pyro.sample("m", dist.Normal(z.mean(), self.values["scale"]))


def auto_list() -> AutoGuideList:
    """Full covariance over the shared latents, independent Normals for the others."""
    guide = AutoGuideList(hierarchy)
    guide.append(AutoMultivariateNormal(poutine.block(hierarchy, expose=["m"])))
    guide.append(AutoNormal(poutine.block(hierarchy, hide=["m"])))
    return guide


def log_evidence(x: Tensor = X) -> float:
    number = len(x)
    covariance = (1 + NOISE**2) * torch.eye(number) + torch.ones(number, number)
    return float(dist.MultivariateNormal(torch.zeros(number), covariance).log_prob(x))


def global_gap(loc: float, scale: float, x: Tensor = X) -> float:
    """KL of q(m) from p(m | x)."""
    precision = 1 + len(x) * SHARE
    return normal_kl(loc, scale, SHARE * float(x.sum()) / precision, precision**-0.5)


def local_gap(shift: float, local: float) -> float:
    """KL of q(z | x, m) from p(z | x, m), the same for all datapoints and all m."""
    return normal_kl(shift, local, 0.0, NOISE * SHARE**0.5)


def normal_kl(loc: float, scale: float, other_loc: float, other_scale: float) -> float:
    ratio = scale / other_scale
    return 0.5 * (ratio**2 + ((loc - other_loc) / other_scale) ** 2 - 1) - math.log(ratio)
