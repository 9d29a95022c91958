"""The guides of the problems: amortized Normals, and their images under a bijection."""

from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

Encoder = Callable[[Tensor], Tensor]


class NormalGuide(nn.Module):
    """q(z|x) = T(N(mean(x) + shift, scale)), with T the composition of `transforms`, none by default.

    `mean` maps data to `(N, d)`; `scale` `(d,)` is the same for all datapoints. `event` False: z is `(N,)`, d is 1.
    """

    def __init__(self, mean: Encoder, scale: Tensor, transforms: Sequence[object] = (), shift: float = 0.0) -> None:
        super().__init__()
        self.mean, self.transforms = mean, list(transforms)
        self.log_scale = nn.Parameter(scale.log())
        self.shift = nn.Parameter(torch.full_like(scale, shift))

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
            base = dist.Normal(*self.parameters_of(x)).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, self.transforms) if self.transforms else base)


def constant(*values: float) -> Encoder:
    """A mean that no datapoint changes."""
    row = torch.tensor(values, dtype=torch.float64)
    return lambda x: row.to(x.dtype).expand(len(x), -1)
