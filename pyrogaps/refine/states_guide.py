"""Guides q(y) q(z | y) of the datapoints of a chunk, with a table of probabilities over joint states y of each."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.density import JointDensity
from pyrogaps.density.given_states import columns_of
from pyrogaps.density.local import Draws, LocalGuide
from pyrogaps.gaussians import Gaussian
from pyrogaps.refine.families import Start
from pyrogaps.refine.gaussian_guides import LocalGaussian
from pyrogaps.refine.local import Refinable


@dataclass(frozen=True)
class StatesSpace:
    """The space of y and z: its density, the joint states `(K, E)`, and the cell of each `(K,)` of the C in which
    q(z | x, y) is one distribution.
    """

    joint: JointDensity
    states: Tensor
    cell: Tensor

    @property
    def num_cells(self) -> int:
        """C, the number of cells."""
        return int(self.cell.max()) + 1

    def joined(self, z: Tensor, chosen: Tensor) -> Tensor:
        """Points `(S, B, dim)` of the space, from continuous latents and the numbers `(S, B)` of joint states."""
        flat = z.new_zeros(*z.shape[:2], self.joint.dim)
        flat[..., columns_of(self.joint, drawn=False)] = z
        flat[..., columns_of(self.joint, drawn=True)] = self.states.to(z.device)[chosen].to(z)
        return flat

    def split(self, flat: Tensor) -> Draws:
        """Continuous latents and the numbers of joint states, from points of the space."""
        z, y = (flat[..., columns_of(self.joint, drawn=drawn)] for drawn in (False, True))
        same = (y.round().long()[..., None, :] == self.states.to(y.device)).all(-1)
        return z, same.long().argmax(-1)


class StatesGuide:
    """The guides of a chunk, see `Refinable`: `log_weights` `(B, K)` of the joint states, and guides of z for each cell
    of each datapoint, `latents`: one for all, or one for each cell where there is no plate; none without latents.

    `log_weights` are probabilities, no free parameters: refinement sets them to the best there are.
    """

    def __init__(self, space: StatesSpace, first: int, log_weights: Tensor, latents: Sequence[Refinable]) -> None:
        self.space, self.joint, self.latents = space, space.joint, latents
        self._first = first
        self.log_weights = log_weights
        number, cells = len(log_weights), space.num_cells
        self.parameters: list[Tensor] = [log_weights]
        self.axes = [0]
        for guide in latents:
            for parameter, axis in zip(guide.parameters, guide.axes, strict=True):
                # Views: rows of a datapoint, one for each cell, lie together.
                whole = self.joint.plate is None
                view = parameter.detach() if whole else parameter.detach().unflatten(axis, (number, cells))
                self.parameters.append(view)
                self.axes.append(axis)
        self.rows = [slice(None)] * len(self.parameters)
        self.units: list[Tensor | float] = [1.0] * len(self.parameters)

    def at(self, indices: Tensor) -> LocalGuide:
        """The guide at datapoints `indices` of the chunk."""
        cells = self.space.num_cells
        # Without a plate, each cell has a guide of its own.
        rows = indices if self.joint.plate is None else (indices[:, None] * cells + torch.arange(cells)).flatten()
        parts = [guide.at(rows) for guide in self.latents]
        return StatesLocal(self.space, indices, self.log_weights[indices - self._first], parts)


class StatesLocal:
    """A `LocalGuide`: y from its table, then z from the guide of its cell; see `StatesGuide`."""

    mean_field = False

    def __init__(self, space: StatesSpace, indices: Tensor, log_weights: Tensor, latents: Sequence[LocalGuide]) -> None:
        self.space, self.joint, self.indices = space, space.joint, indices
        self.log_weights, self.latents = log_weights, latents

    def sample(self, num_particles: int, antithetic: bool = False) -> Draws:
        number = len(self.indices)
        chosen = torch.multinomial(self.log_weights.exp(), num_particles, replacement=True).T
        log_q = self.log_weights.T.gather(0, chosen)
        if not self.latents:
            z = self.joint.zeros(num_particles * number).reshape(num_particles, number, -1)[..., :0]
            return self.space.joined(z, chosen), log_q.to(z)
        draws = [guide.sample(num_particles) for guide in self.latents]
        rows = self._rows(chosen)
        z = _gathered(torch.cat([part for part, _ in draws], 1), rows)
        inner = torch.cat([part for _, part in draws], 1).gather(1, rows)
        return self.space.joined(z, chosen), log_q.to(z) + inner

    def log_prob(self, z: Tensor) -> Tensor:
        z, chosen = self.space.split(z)
        log_q = self.log_weights.T.gather(0, chosen).to(z)
        if not self.latents:
            return log_q
        spread = z if self.joint.plate is None else z.repeat_interleave(self.space.num_cells, 1)
        inner = torch.cat([guide.log_prob(spread) for guide in self.latents], 1)
        return log_q + inner.gather(1, self._rows(chosen))

    def _rows(self, chosen: Tensor) -> Tensor:
        """The rows `(S, B)` of the guides of z that belong to joint states."""
        first = torch.arange(len(self.indices), device=chosen.device) * self.space.num_cells
        return first + self.space.cell.to(chosen.device)[chosen]


def _gathered(z: Tensor, rows: Tensor) -> Tensor:
    return z.gather(1, rows[..., None].expand(*rows.shape, z.shape[-1]))


@dataclass(frozen=True)
class StartPosterior:
    """The Gaussians `start` of the datapoints of a chunk from `first` on, each for `repeats` rows of `joint`."""

    joint: JointDensity
    start: Start
    first: int
    repeats: int

    def at(self, indices: Tensor) -> LocalGuide:
        """The Gaussians at rows."""
        places = indices // self.repeats - self.first
        gaussian = Gaussian(self.start.loc[places], self.start.scale[places], self.joint.active(indices))
        return LocalGaussian(self.joint, indices, gaussian)
