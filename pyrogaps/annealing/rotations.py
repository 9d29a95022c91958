r"""Annealing from a Gaussian by moves that keep it exactly.

The Hamiltonian of $\log f_b = \log f_0 + b\, r$, with $r = \log p(x, z) - \log f_0(z)$, is split into the Gaussian's,
whose flow is a rotation known in closed form, and that of $b\, r$, a kick. In coordinates $u$ with
$z = \mu + L u$ one step of length $\varepsilon$ is

$$v \leftarrow v + \tfrac\varepsilon2 b\, \nabla_u r, \quad
  (u, v) \leftarrow (u \cos\varepsilon + v \sin\varepsilon,\; v \cos\varepsilon - u \sin\varepsilon), \quad
  v \leftarrow v + \tfrac\varepsilon2 b\, \nabla_u r$$

It is reversible and keeps volume, as a leapfrog step does, but its error is that of the residual alone: near a Gaussian
$\varepsilon$ is about a quarter turn, and one gradient makes a draw that is nearly independent of the last.

Split HMC: Shahbaba et al. (2014), arXiv:1106.5941.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from pyrogaps.annealing.loop import Adaptation
from pyrogaps.capture.slots import PointDensity
from pyrogaps.gaussians import Gaussian
from pyrogaps.scales import apply_transpose

QUARTER_TURN = 0.5 * math.pi
# At b = 0 a rotation is exact, and a pilot would learn nothing there.
ADAPTATION = Adaptation(first=1.0, warm_up_rate=0.7, rate=0.7, warm_up_at=1, longest=QUARTER_TURN)


class Whitened(NamedTuple):
    """Whitened positions u `(S, B, dim)`, the residual r `(S, B)` there and its gradient in u."""

    position: Tensor
    residual: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Rotation:
    """Moves along the path from the Gaussian f_0 = `start` to log p(x, z) = `density`, see `Move`."""

    start: Gaussian
    density: PointDensity
    num_steps: int
    adaptation: Adaptation = ADAPTATION

    def start_at(self, noise: Tensor) -> Whitened:
        """The state at the draws of f_0 that standard noise `(S, B, dim)` makes."""
        return self.state(self.start.kept(noise))

    def points(self, state: Whitened) -> Tensor:
        """z `(S, B, dim)` of a state."""
        return self.start.draw(state.position)

    def state(self, position: Tensor) -> Whitened:
        """The state at whitened positions `(S, B, dim)`."""
        start = self.start
        z = start.draw(position)
        (log_joint,), (gradient,) = self.density(z.contiguous())
        residual = log_joint - start.peak + 0.5 * position.square().sum(-1)
        return Whitened(position, residual, start.kept(apply_transpose(start.scale, gradient)) + position)

    def target(self, beta: Tensor) -> Tensor:
        return beta.to(self.start.loc)

    def difference(self, state: Whitened) -> Tensor:
        return state.residual.double()

    def propose(self, state: Whitened, velocity: Tensor, at: Tensor, step: Tensor) -> tuple[Whitened, Tensor]:
        velocity, cosine, sine = self.start.kept(velocity), step.cos(), step.sin()
        half_kick = 0.5 * at[..., None] * step
        for _ in range(self.num_steps):
            velocity = velocity + half_kick * state.gradient
            position = state.position * cosine + velocity * sine
            velocity = velocity * cosine - state.position * sine
            state = self.state(position)
            velocity = velocity + half_kick * state.gradient
        return state, velocity

    def log_density(self, state: Whitened, velocity: Tensor, at: Tensor) -> Tensor:
        velocity = self.start.kept(velocity)
        return at * state.residual - 0.5 * (state.position.square().sum(-1) + velocity.square().sum(-1))
