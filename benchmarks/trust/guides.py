"""The guides of the problems: amortized Normals, and their images under a bijection."""

from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

Encoder = Callable[[Tensor], Tensor]


class NormalGuide(nn.Module):
    """q(z|x) = T(N(mean(x) + shift, scale)), with T the composition of `transforms`, none by default.

    `mean` maps data to `(N, d)`; `scale` `(d,)` is the same for all datapoints.
    """

    def __init__(self, mean: Encoder, scale: Tensor, transforms: Sequence[object] = ()) -> None:
        super().__init__()
        self.mean, self.transforms = mean, list(transforms)
        self.log_scale, self.shift = nn.Parameter(scale.log()), nn.Parameter(torch.zeros_like(scale))

    def parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale before the bijection, `(N, d)` each."""
        mean = self.mean(x) + self.shift
        return mean, self.log_scale.exp().expand_as(mean)

    def exact_parameters(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same in double precision, without a graph."""
        mean, scale = self.parameters_of(x)
        return mean.detach().double(), scale.detach().double()

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.distribution(*self.parameters_of(x)))

    def distribution(self, mean: Tensor, scale: Tensor) -> dist.TorchDistribution:
        """q(z|x)."""
        base = dist.Normal(mean, scale).to_event(1)
        return dist.TransformedDistribution(base, self.transforms) if self.transforms else base


class LogNormalGuide(NormalGuide):
    """q(z|x) = exp N(mean(x) + shift, scale)."""

    def distribution(self, mean: Tensor, scale: Tensor) -> dist.TorchDistribution:
        return dist.LogNormal(mean, scale).to_event(1)


def constant(*values: float) -> Encoder:
    """A mean that no datapoint changes."""
    row = torch.tensor(values, dtype=torch.float64)
    return lambda x: row.to(x.dtype).expand(len(x), -1)
