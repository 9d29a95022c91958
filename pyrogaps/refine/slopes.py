"""Slopes of a guide's parameters in earlier draws: in coordinates of z, and in which states were drawn."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.density import GuideDensity, JointDensity
from pyrogaps.density.given_states import columns_of
from pyrogaps.refine.finetune import Weight
from pyrogaps.refine.perturbed import NUM_PERTURBED, NUM_ROWS, Key, perturbed, read_parameters, rounding_of

# Beyond so many, slopes in earlier draws are not freed. A combination of slopes counts as free where the weights move
# it by this share of what they move the others; what they move by less than the second is fixed.
MAX_SLOPES, MIN_FREE, NEGLIGIBLE = 64, 0.01, 1e-3
# Beyond so many, with those of states, nobody looks whether the weights move them independently.
MAX_SPANNED = 256
NUM_DRAWS = 64
LINEAR = ("loc", "logits")  # parameters whose slopes in z are freed


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


def slopes_of(
    density: GuideDensity, weights: list[Weight], labels: dict[Key, Tensor], states: Tensor | None
) -> dict[Key, Slopes]:
    """The slopes in earlier draws that the weights move: of locations and logits, in z, and of all in the states.

    Slopes in z are differences over a step as long as the draws spread. Their freedom, and that of the intercepts, is
    the span of their changes under small changes of the weights, of which the even part is left out: for a product of
    two weights the rest is exact.
    """
    joint, keys = density.joint, [key for key in labels if key[1] in LINEAR or states is not None]
    everyone = torch.arange(density.num_datapoints) if joint.plate else torch.zeros(1).long()
    active = joint.active(everyone[:NUM_ROWS])
    index = everyone[:1] if active is None else everyone[active.sum(1).argmax()][None]
    draws = density.at(index).sample(NUM_DRAWS)[0][:, 0]
    step = torch.where(draws.std(0) > 0, draws.std(0), 1.0)
    grid = None if states is None else StateGrid(joint, states)
    points = draws[:1] + torch.cat([torch.zeros_like(draws[:1]), torch.diag(step)])
    if grid is not None:
        points = grid.added(points)

    def values() -> dict[Key, Tensor]:
        read = read_parameters(density, points, index.expand(len(points)))
        return {key: read[key] for key in keys}

    def change() -> dict[Key, Tensor]:
        state = torch.get_rng_state()
        with perturbed(weights):
            above = values()
        torch.set_rng_state(state)
        with perturbed(weights, -1.0):
            below = values()
        return {key: (above[key] - below[key]) / 2 for key in keys}

    before, changes = values(), [change() for _ in range(NUM_PERTURBED)]
    indicators: dict[Key, Indicators | None] = dict.fromkeys(keys)
    if grid is not None:
        for key in keys:
            seen = torch.stack([each[key] for each in (before, *changes)])
            indicators[key] = grid.indicators(seen, rounding_of(before[key]))

    def by_feature(key: Key, each: dict[Key, Tensor]) -> Tensor:
        return each[key] if grid is None else grid.by_feature(each[key], indicators[key])

    free = {}
    for key in keys:
        features = torch.stack([by_feature(key, each) for each in changes])
        moved = (features[:, 1:] - features[:, :1]).abs().amax(0) > rounding_of(before[key])
        pairs = moved.nonzero()
        in_z = pairs[:, 0] < joint.dim
        free[key] = pairs if key[1] in LINEAR and int(in_z.sum()) <= MAX_SLOPES else pairs[~in_z]
    chosen = [key for key in keys if len(free[key])]
    spanned = [key for key in chosen if len(free[key]) <= MAX_SPANNED]
    number = 2 * max((len(labels[key]) + len(free[key]) for key in spanned), default=0)
    changes += [change() for _ in range(number - len(changes))]
    slopes = {}
    for key in chosen:
        coordinates, elements = free[key].unbind(1)
        if key in spanned:
            each = torch.stack([by_feature(key, each) for each in changes])
            extra = each.shape[1] - 1 - joint.dim
            point = torch.nn.functional.pad(points[0], (0, extra))
            steps = torch.nn.functional.pad(step, (0, extra), value=1.0)
            basis = _span(each, point, steps, coordinates, elements, labels[key])
        elif _untied(labels[key]):
            basis = None
        else:
            continue
        slopes[key] = Slopes(coordinates, elements, basis, indicators[key])
    return slopes


def _span(
    changes: Tensor, point: Tensor, step: Tensor, coordinates: Tensor, elements: Tensor, labels: Tensor
) -> Tensor | None:
    """A basis of the span of `changes` `(P, 1 + F, K)` of a parameter at a point, and a step from it in each feature;
    None where all slopes, and all intercepts that are not fixed, are free by themselves.
    """
    slopes = (changes[:, 1:] - changes[:, :1]) / step[:, None]
    intercepts = changes[:, 0] - torch.einsum("d,pdk->pk", point, slopes)
    both = torch.cat([intercepts, slopes[:, coordinates, elements]], 1)
    sizes = both.norm(dim=0)
    kept = sizes > NEGLIGIBLE * sizes.max()
    _, singular, directions = torch.linalg.svd(both[:, kept] / sizes[kept], full_matrices=False)
    rank = int((singular > MIN_FREE * singular[0]).sum())
    single = torch.cat([labels.to(kept.device) >= 0, torch.ones_like(elements, dtype=torch.bool)])
    if rank == int(single.sum()) and torch.equal(kept, single):
        return None
    basis = both.new_zeros(rank, len(sizes))
    basis[:, kept] = directions[:rank] * sizes[kept] / sizes.max()
    return basis


def _untied(labels: Tensor) -> bool:
    """Whether the elements that are not fixed are free by themselves."""
    return int((labels >= 0).sum()) == int(labels.max()) + 1
