"""What can be refined: guides whose parameters have an axis of datapoints."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pyrogaps.density import JointDensity
from pyrogaps.density.local import LocalGuide


class Refinable(Protocol):
    """A guide for the B datapoints of a chunk with parameters of their own.

    `parameters` are leaf tensors, `axes` their axes of datapoints, `rows` the datapoints that lie there, `units` the
    size of a natural step in each (a number or a tensor that broadcasts).
    """

    parameters: list[Tensor]
    axes: list[int]
    rows: list[slice]
    units: list[Tensor | float]

    @property
    def joint(self) -> JointDensity:
        """The density of the space that its draws lie in."""
        ...

    def at(self, indices: Tensor) -> LocalGuide:
        """The guide at datapoints `indices` of the chunk, differentiable in `parameters`."""
        ...


@runtime_checkable
class TakesPaths(Protocol):
    """A `Refinable` whose guides take `num_paths` joint states of discrete sites for each particle."""

    num_paths: int


def points_of(refinable: Refinable, num_particles: int) -> tuple[int, int]:
    """The number of particles of a step that has `num_particles` draws by default, and of points at which log p(x, z)
    is evaluated: particles share the draws with the paths of each, and there are two at least, a mirrored pair.
    """
    if not isinstance(refinable, TakesPaths):
        return num_particles, num_particles
    particles = 2 * max(1, num_particles // (2 * refinable.num_paths))
    return particles, particles * refinable.num_paths


def along(mask: Tensor, like: Tensor, axis: int) -> Tensor:
    """`mask (B,)` shaped to broadcast along `axis` of `like`."""
    shape = [1] * like.dim()
    if len(mask) > 1:
        shape[axis] = -1
    return mask.reshape(shape)


def keep_where(keep: Tensor, values: list[Tensor], refinable: Refinable) -> None:
    """Set the parameters of the datapoints in `keep (B,)` to `values`, in place."""
    with torch.no_grad():
        places = zip(refinable.parameters, values, refinable.axes, refinable.rows, strict=True)
        for parameter, value, axis, rows in places:
            parameter.copy_(torch.where(along(keep[rows], parameter, axis), value, parameter))
