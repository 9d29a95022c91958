"""Features of earlier draws that a guide's parameters may depend on: coordinates of z, and which states were drawn."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.density import JointDensity
from pyrogaps.density.given_states import columns_of


@dataclass(frozen=True)
class Indicators:
    """Features that are 1 in one joint state of some discrete elements and else 0: for each state but the first.

    Attributes:
        columns: of these elements in z.
        numbers: of the states of each.
    """

    columns: tuple[int, ...]
    numbers: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of features."""
        return math.prod(self.numbers) - 1

    def of(self, z: Tensor) -> Tensor:
        """The features `(R, count)` of rows `(R, dim)`."""
        state = torch.zeros(len(z), dtype=torch.long, device=z.device)
        for column, number in zip(self.columns, self.numbers, strict=True):
            state = state * number + z[:, column].detach().round().long()
        return (state[:, None] == torch.arange(1, self.count + 1, device=z.device)).to(z)


@dataclass(frozen=True)
class Slopes:
    """Which slopes in earlier draws are free: pairs of a feature and an element of the parameter, `(E,)` each.

    Features are the coordinates of z, for locations and logits, then the `indicators` of the states that the parameter
    depends on.

    Where the weights do not move the K intercepts and the E slopes independently, as with a bottleneck, one number for
    all dimensions or a location without an intercept, `basis` `(rank, K + E)` spans what they can do.
    """

    coordinates: Tensor
    elements: Tensor
    basis: Tensor | None
    indicators: Indicators | None = None

    def features(self, z: Tensor) -> Tensor:
        """The features `(R, F)` of rows `(R, dim)`."""
        return z if self.indicators is None else torch.cat([z, self.indicators.of(z)], 1)

    def padded(self, values: Tensor, fill: float) -> Tensor:
        """`values` `(R, dim)` of the coordinates, and `fill` for the indicators, `(R, F)`."""
        count = 0 if self.indicators is None else self.indicators.count
        return torch.nn.functional.pad(values, (0, count), value=fill) if count else values


@dataclass(frozen=True)
class StateGrid:
    """Points at all joint states, `(K, E)`, after those that differ in one coordinate of z each."""

    joint: JointDensity
    states: Tensor

    @property
    def columns(self) -> Tensor:
        """Those of the discrete elements in z."""
        return columns_of(self.joint, drawn=True)

    @property
    def numbers(self) -> list[int]:
        """The number of states of each element."""
        return [int(number) + 1 for number in self.states.amax(0)]

    def added(self, points: Tensor) -> Tensor:
        """`points` `(1 + dim, dim)`, all in the first joint state, and then the first of them in every state."""
        points = points.clone()
        points[:, self.columns] = 0.0
        at_states = points[:1].repeat(len(self.states), 1)
        at_states[:, self.columns] = self.states.to(points)
        return torch.cat([points, at_states])

    def indicators(self, seen: Tensor, tolerance: float) -> Indicators | None:
        """Of the elements with which a parameter changes, from its values or changes `(P, 1 + dim + K, n)`."""
        table = torch.nan_to_num(seen[:, 1 + self.joint.dim :]).movedim(1, 0).reshape(*self.numbers, -1)
        columns, numbers = list[int](), list[int]()
        for axis, (column, number) in enumerate(zip(self.columns.tolist(), self.numbers, strict=True)):
            if bool(((table - table.narrow(axis, 0, 1)).abs() > tolerance).any()):
                columns.append(column)
                numbers.append(number)
        return Indicators(tuple(columns), tuple(numbers)) if columns else None

    def by_feature(self, values: Tensor, indicators: Indicators | None) -> Tensor:
        """Values `(1 + F, n)` at a point and at a step from it in each feature, from `(1 + dim + K, n)`."""
        size = 1 + self.joint.dim
        if indicators is None:
            return values[:size]
        others = torch.tensor([column not in indicators.columns for column in self.columns.tolist()])
        rows = (self.states[:, others] == 0).all(1).nonzero()[1:, 0]
        return torch.cat([values[:size], values[size + rows]])
