"""Adam (Kingma and Ba, arXiv:1412.6980) for many optimisations side by side, each parameter in units of its own."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.refine.local import Refinable

BETAS, EPSILON = (0.9, 0.99), 1e-8
STEADY, FASTER, SLOWER, FASTEST = 0.9, 1.05, 0.8, 100.0
# Flows have many weights for each datapoint: a step over them is bound by memory unless it goes stretch by stretch.
STRETCH = 1 << 15


@dataclass
class _Stretch:
    """A stretch of one parameter, flattened, with what Adam keeps for it."""

    parameter: Tensor
    unit: Tensor | float
    first: Tensor
    second: Tensor
    pace: Tensor


class Adam:
    """Adam with steps in each parameter's own units; no element, so no datapoint, feels another.

    Where slopes point one way step after step, the optimum is many units off and steps grow; there they shrink.
    """

    def __init__(self, refinable: Refinable) -> None:
        self.count = 0
        self.stretches = [
            [
                _Stretch(part, unit, torch.zeros_like(part), torch.zeros_like(part), torch.ones_like(part))
                for part, unit in parts
            ]
            for parts in map(_stretches, refinable.parameters, refinable.units)
        ]

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...], rate: float, clip: float) -> None:
        """Move every parameter by about `rate` units, uphill; slopes in units are clipped to `clip`."""
        self.count += 1
        for stretches, gradient in zip(self.stretches, gradients, strict=True):
            for stretch, slope in zip(stretches, gradient.reshape(-1).split(STRETCH), strict=True):
                self._move(stretch, slope, rate, clip)

    def _move(self, stretch: _Stretch, slope: Tensor, rate: float, clip: float) -> None:
        first, second, pace = stretch.first, stretch.second, stretch.pace
        scaled = torch.nan_to_num_(slope * stretch.unit)
        if clip < math.inf:
            scaled.clamp_(-clip, clip)
        first.lerp_(scaled, 1 - BETAS[0])
        second.lerp_(scaled.square_(), 1 - BETAS[1])
        spread = (second / (1 - BETAS[1] ** self.count)).sqrt_().add_(EPSILON)
        direction = (first / (1 - BETAS[0] ** self.count)).div_(spread)
        # 1 where slopes are steady, else 0: arithmetic is faster than booleans.
        steady = direction.abs().sub_(STEADY).mul_(1e30).clamp_(0.0, 1.0)
        pace.mul_(steady.mul_(FASTER - SLOWER).add_(SLOWER)).clamp_(1.0, FASTEST)
        stretch.parameter.add_(direction.mul_(pace).mul_(stretch.unit).mul_(rate))


def _stretches(parameter: Tensor, unit: Tensor | float) -> list[tuple[Tensor, Tensor | float]]:
    flat = parameter.detach().view(-1)
    if not isinstance(unit, Tensor):
        return [(part, unit) for part in flat.split(STRETCH)]
    units = unit.expand_as(parameter).reshape(-1)
    return list(zip(flat.split(STRETCH), units.split(STRETCH), strict=True))
