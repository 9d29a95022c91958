"""Adam (Kingma and Ba, arXiv:1412.6980) for many optimisations side by side, each parameter in units of its own."""

import torch
from torch import Tensor

from pyrogaps.refine.local import Refinable

BETAS, EPSILON = (0.9, 0.99), 1e-8
STEADY, FASTER, SLOWER, FASTEST = 0.9, 1.05, 0.8, 100.0


class Adam:
    """Adam with steps in each parameter's own units; no element, so no datapoint, feels another.

    Where slopes point one way step after step, the optimum is many units off and steps grow; there they shrink.
    """

    def __init__(self, refinable: Refinable) -> None:
        self.refinable, self.count = refinable, 0
        self.pace = [torch.ones_like(p) for p in refinable.parameters]
        self.first = [torch.zeros_like(p) for p in refinable.parameters]
        self.second = [torch.zeros_like(p) for p in refinable.parameters]

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...], rate: float, clip: float) -> None:
        self.count += 1
        moments = zip(self.first, self.second, self.pace, strict=True)
        zipped = zip(self.refinable.parameters, gradients, self.refinable.units, moments, strict=True)
        for parameter, gradient, unit, (first, second, pace) in zipped:
            scaled = torch.nan_to_num(gradient * unit).clamp(-clip, clip)
            first.lerp_(scaled, 1 - BETAS[0])
            second.lerp_(scaled.square(), 1 - BETAS[1])
            mean = first / (1 - BETAS[0] ** self.count)
            spread = (second / (1 - BETAS[1] ** self.count)).sqrt()
            direction = mean / (spread + EPSILON)
            pace.copy_(torch.where(direction.abs() > STEADY, pace * FASTER, pace * SLOWER).clamp(1.0, FASTEST))
            parameter += rate * unit * pace * direction
