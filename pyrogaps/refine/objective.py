"""What a refinement climbs: a density per datapoint, known exactly or step by step as an unbiased estimate."""

from typing import Protocol

from torch import Tensor

from pyrogaps.capture import BoundDensity
from pyrogaps.density import JointDensity


class Objective(Protocol):
    """The density that is refined against, at S points of each datapoint of a chunk."""

    def at_step(self, step: int) -> BoundDensity:
        """The density at one step, a function of the step alone: what is compared is compared on the same one."""
        ...


class Evaluator(Protocol):
    """A `GradientEvaluator`, or what binds another objective in its place."""

    @property
    def joint(self) -> JointDensity: ...

    def bind(self, indices: Tensor, num_particles: int) -> Objective:
        """The objective at `num_particles` points of each of the datapoints `indices`."""
        ...
