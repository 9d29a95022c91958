"""The systems that are learned and controlled, and how much is known of them."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pyrogaps.models.controlled import ControlledLinear
from pyrogaps.models.lqg import Cost

STEPS = 12
COST = Cost(np.eye(1), 0.1 * np.eye(1))
# Of the outputs' noise that a model may learn: the bound of a filter would have none at all.
MIN_EMISSION_SCALE = 0.03

# An oscillator of about 30 steps a period, its position seen and its velocity pushed; and one that falls over.
OSCILLATOR, FALLING = [[1.0, 0.2], [-0.2, 0.9]], [[1.0, 0.2], [0.2, 1.0]]
PUSH, POSITION = [[0.0], [0.2]], [[1.0, 0.0]]


@dataclass(frozen=True)
class Setting:
    """A true system, the dimension of the state of its models, and the number of trajectories in a data set."""

    name: str
    transition: list[list[float]]
    action: list[list[float]]
    emission: list[list[float]]
    process: float
    noise: float = 0.3
    latent_dim: int = 2
    num_trajectories: int = 200
    random: bool = False

    def truths(self, number: int, seed: int) -> list[ControlledLinear]:
        """The true system of every data set; drawn for each where it is `random`."""
        if not self.random:
            return [self._system(torch.tensor(self.transition))] * number
        generator = torch.Generator().manual_seed(seed)
        return [self._system(_stable(generator)) for _ in range(number)]

    def _system(self, A: Tensor) -> ControlledLinear:
        B, C = torch.tensor(self.action), torch.tensor(self.emission)
        return ControlledLinear(A.double(), B.double(), C.double(), self.process, self.noise)


def _stable(generator: torch.Generator) -> Tensor:
    """A random 2 x 2 matrix of spectral radius 0.95, under which the velocity moves the position."""
    while True:
        A = torch.eye(2) + 0.3 * torch.randn(2, 2, generator=generator)
        if abs(float(A[0, 1])) > 0.1:
            return 0.95 * A / float(torch.linalg.eigvals(A).abs().max())


_BASE = Setting("oscillator", OSCILLATOR, PUSH, POSITION, 0.1)
SETTINGS = (
    _BASE,
    replace(_BASE, name="little process noise", process=0.02),
    replace(_BASE, name="much process noise", process=0.3),
    replace(_BASE, name="50 trajectories", num_trajectories=50),
    replace(_BASE, name="too small a state", latent_dim=1),
    Setting("scalar", [[0.95]], [[0.5]], [[1.0]], 0.3, 0.5, latent_dim=1),
    replace(_BASE, name="unstable system", transition=FALLING),
    replace(_BASE, name="random systems", random=True),
)
