"""Adam (Kingma and Ba, arXiv:1412.6980) for many optimisations side by side, each parameter in units of its own."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.refine.local import Refinable

BETAS, EPSILON = (0.9, 0.99), 1e-8
STEADY, FASTER, SLOWER, FASTEST = 0.9, 1.05, 0.8, 100.0
# Flows have many weights for each datapoint: a step over them is bound by memory unless it goes stretch by stretch.
# Small parameters, of which guides with many sites have many, share a stretch: a step over one is bound by calls.
STRETCH = 1 << 15


@dataclass
class _Stretch:
    """A stretch of one parameter, or several small parameters, flattened, with what Adam keeps for it."""

    parts: list[Tensor]
    unit: Tensor | float
    first: Tensor
    second: Tensor
    pace: Tensor

    @classmethod
    def of(cls, parts: list[Tensor], units: list[Tensor | float]) -> "_Stretch":
        """The stretch of `parts`, whose units are tensors of their shapes or numbers."""
        if len(parts) > 1:
            units = [torch.cat([_filled(part, unit) for part, unit in zip(parts, units, strict=True)])]
        whole = _joined(parts)
        return cls(parts, units[0], torch.zeros_like(whole), torch.zeros_like(whole), torch.ones_like(whole))

    @property
    def sizes(self) -> list[int]:
        return [len(part) for part in self.parts]


class Adam:
    """Adam with steps in each parameter's own units; no element, so no datapoint, feels another.

    Where slopes point one way step after step, the optimum is many units off and steps grow; there they shrink.
    """

    def __init__(self, refinable: Refinable) -> None:
        self.count = 0
        self.stretches: list[_Stretch] = []
        parts: list[Tensor] = []
        units: list[Tensor | float] = []
        for parameter, unit in zip(refinable.parameters, refinable.units, strict=True):
            for part, own in _stretches(parameter, unit):
                if parts and (sum(map(len, parts)) + len(part) > STRETCH or part.dtype != parts[0].dtype):
                    self.stretches.append(_Stretch.of(parts, units))
                    parts, units = [], []
                parts.append(part)
                units.append(own)
        self.stretches += [_Stretch.of(parts, units)] if parts else []

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...], rate: float, clip: float) -> None:
        """Move every parameter by about `rate` units, uphill; slopes in units are clipped to `clip`."""
        self.count += 1
        slopes = [slope for gradient in gradients for slope in gradient.reshape(-1).split(STRETCH)]
        for stretch in self.stretches:
            number = len(stretch.parts)
            self._move(stretch, _joined(slopes[:number]), rate, clip)
            del slopes[:number]

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
        change = direction.mul_(pace).mul_(stretch.unit).mul_(rate)
        torch._foreach_add_(stretch.parts, change.split(stretch.sizes))


def _stretches(parameter: Tensor, unit: Tensor | float) -> list[tuple[Tensor, Tensor | float]]:
    flat = parameter.detach().view(-1)
    if not isinstance(unit, Tensor):
        return [(part, unit) for part in flat.split(STRETCH)]
    units = unit.expand_as(parameter).reshape(-1)
    return list(zip(flat.split(STRETCH), units.split(STRETCH), strict=True))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _filled(part: Tensor, unit: Tensor | float) -> Tensor:
    return unit if isinstance(unit, Tensor) else torch.full_like(part, unit)
