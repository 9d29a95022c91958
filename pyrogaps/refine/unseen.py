"""How much of a Gaussian's ELBO lies where its draws do not reach, because log p(x, z) falls off a cliff there."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyrogaps.capture.slots import Slots
from pyrogaps.gaussians import Gaussian
from pyrogaps.streams import Noise

# Distances in standard deviations: a few hundred draws end about where the first is.
NEAR, FAR = 3.5, 5.0
# Nats below the Gaussian's own fall. A smooth fall that is less steep at `FAR` is seen nearer by, or costs under
# 0.005 nats.
STEEP = 20.0
# Half of the draws that do reach there are so many times as wide along one axis.
STRETCH = 3.0


class Unseen(NamedTuple):
    """Of M datapoints: the nats that lie beyond the reach of draws, `(M,)`, and which axes are `steep`, `(M, dim)`."""

    nats: Tensor
    steep: Tensor

    @classmethod
    def none(cls, gaussian: Gaussian) -> "Unseen":
        """Where nobody looked."""
        loc = gaussian.loc
        return cls(torch.zeros_like(loc[:, 0], dtype=torch.float64), torch.zeros_like(loc, dtype=torch.bool))


def unseen(slots: Slots, gaussian: Gaussian, positions: Tensor) -> Unseen:
    r"""What `gaussian` loses beyond `NEAR` standard deviations, for the datapoints at `positions` `(M,)`.

    Along the columns of its factor L, either way, log p(x, z) should fall as the Gaussian does. With g(t) the nats by
    which it falls further at $m \pm t L_i$, the ELBO is lower by

    $$\sum_{\pm, i} \int_t^\infty \varphi(t)\, g(t)\, dt$$

    than few draws show. The integrand is known at two distances, and exponential between and beyond. +infinity where
    log p(x, z) is -infinity or NaN there. Only where g is above `STEEP` is the nearer distance evaluated. What lies
    off the axes is not looked at.
    """
    far = _further(slots, gaussian, positions, FAR)
    nats = torch.zeros(len(positions), dtype=torch.float64, device=far.device)
    steep = (far > STEEP).unflatten(0, (2, -1)).any(0).T
    left = steep.any(1).nonzero()[:, 0]
    if len(left):
        some = left.to(positions.device)
        near = _further(slots, gaussian.at(some), positions[some], NEAR)
        nats[left] = _integral(_log_integrand(near, NEAR), _log_integrand(far[:, left], FAR)).sum(0)
    return Unseen(nats, steep)


class Draws(NamedTuple):
    """Noise `(S, M, dim)` with weights `(S, M)` that turn means into those over standard noise, and the axes that are
    `steep`, `(M, dim)`.
    """

    noise: Tensor
    weights: Tensor
    steep: Tensor

    @classmethod
    def standard(cls, noise: Tensor) -> "Draws":
        """Standard noise, where no axis is steep."""
        return cls(noise, torch.ones_like(noise[..., 0]), torch.zeros_like(noise[0], dtype=torch.bool))


def reaching(noise: Noise, choices: Noise, number: int, positions: Tensor, steep: Tensor) -> Draws:
    r"""Noise for the datapoints at `positions` that reaches far along their `steep` axes, chosen by `choices`.

    Half of it is standard; in the other half one of the steep axes is stretched. The weights have the mean 1 and are at
    most 2. Where no axis is steep, all is standard and they are 1.
    """
    axes = noise.normal(number, steep.shape[-1])[:, positions]
    if not steep.any():
        return Draws.standard(axes)
    choice, which = choices.uniform(number, 2)[:, positions].unbind(-1)
    places = steep.cumsum(-1)
    axis = (places[None] <= (which * places[:, -1]).floor()[..., None]).sum(-1)  # one of the steep ones
    chosen = torch.nn.functional.one_hot(axis.clamp(max=steep.shape[-1] - 1), steep.shape[-1]).bool()
    axes = torch.where(chosen & steep & (choice < 0.5)[..., None], STRETCH * axes, axes)
    ratio = (0.5 * (1 - STRETCH**-2) * axes.double().square()).exp() / STRETCH
    mean = (ratio * steep).sum(-1) / places[:, -1].clamp(min=1)
    return Draws(axes, torch.where(steep.any(-1), 2 / (1 + mean), 1.0), steep)


def _further(slots: Slots, gaussian: Gaussian, positions: Tensor, distance: float) -> Tensor:
    """g at `distance`, 0 or more, `(2 dim, M)`; +infinity where it is not known."""
    dim = slots.dim
    axes = torch.eye(dim).to(gaussian.loc)[:, None].expand(-1, len(positions), -1)
    steps = gaussian.kept(distance * axes)
    values = slots.values(positions, gaussian.draw(torch.cat([torch.zeros_like(steps[:1]), steps, -steps]))).double()
    own = 0.5 * distance**2 * torch.cat([steps, steps]).any(-1)
    fall = values[0] - values[1:] - own
    return torch.nan_to_num(fall, nan=torch.inf).clamp(min=0.0)


def _log_integrand(fall: Tensor, distance: float) -> Tensor:
    return fall.log() - 0.5 * distance**2 - 0.5 * math.log(2 * math.pi)


def _integral(near: Tensor, far: Tensor) -> Tensor:
    """From `NEAR` on, of what has these logarithms at `NEAR` and `FAR`. At least 1 / length is its rate of decay."""
    length = FAR - NEAR
    rate = torch.nan_to_num((near - far) / length, nan=0.0).clamp(min=1 / length)
    return torch.where(far.isposinf() | near.isposinf(), torch.inf, torch.maximum(near.exp(), far.exp()) / rate)
