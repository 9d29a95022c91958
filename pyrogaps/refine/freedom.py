r"""What the weights of a guide are free to do with the parameters of its site distributions.

The guide is run at the same draws with slightly different weights, and for different datapoints. Parameters are
compared as real numbers, $\eta$: scales by their logarithms. Two elements of a parameter that always change alike are
*tied*: a single number per datapoint for all latent dimensions stays a single number. An element that never changes is
fixed.

Where a guide draws discrete sites, parameters may also change with the states drawn before them; see `slopes`.

The factor of a full covariance is an exception: the family is the distribution's. Once any of its elements changes, all
of them are free, those that the guide holds at 0 too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.density import GuideDensity
from pyrogaps.density.data import evenly_spaced
from pyrogaps.density.local import FactorisedGuide, PlaceValues
from pyrogaps.density.runs import evaluating
from pyrogaps.refine.finetune import Weight, substituted, used_weights
from pyrogaps.refine.parameters import rows_of
from pyrogaps.refine.slopes import Indicators, Slopes, StateGrid
from pyrogaps.streams import seeded

NUM_ROWS = 64
# Of float32 numbers, two changes are within rounding by chance in about one of a thousand pairs.
NUM_PERTURBED = 3
# Weights move by this share of their size. Rounding is told apart by a multiple of the machine's precision.
RELATIVE, ROUNDING = 0.01, 100.0
# Beyond so many, slopes in earlier draws are not freed. A combination of slopes counts as free where the weights move
# it by this share of what they move the others; what they move by less than the second is fixed.
MAX_SLOPES, MIN_FREE, NEGLIGIBLE = 64, 0.01, 1e-3
# Beyond so many, with those of states, nobody looks whether the weights move them independently.
MAX_SPANNED = 256
NUM_DRAWS = 64

LINEAR = ("loc", "logits")  # parameters whose slopes in z are freed

Key = tuple[str, str]  # a term and a parameter of its distribution


@dataclass(frozen=True)
class Freedom:
    """For each parameter of each term, the number of each element among the free ones, -1 where it is fixed: `(K,)`.

    `slopes`: of the parameters that depend on earlier draws.
    """

    labels: dict[Key, Tensor]
    slopes: dict[Key, Slopes]

    @property
    def any(self) -> bool:
        """Whether anything is free."""
        return any(bool((labels >= 0).any()) for labels in self.labels.values())

    def tied(self, key: Key) -> Tensor | None:
        """The labels where some elements are tied or fixed and others are free; None else."""
        labels = self.labels[key]
        count = int(labels.max()) + 1
        return labels if 0 < count < len(labels) else None


def freedom_of(density: GuideDensity, weights: list[Weight], states: Tensor | None = None) -> Freedom:
    """The freedom of a guide that uses `weights` and of which all site distributions have a `free_leaf`; `states`
    `(K, E)` are the joint states of the discrete elements that it draws.
    """
    with seeded(0, "freedom"), evaluating(density.guide), torch.no_grad():
        indices = evenly_spaced(density.num_datapoints, NUM_ROWS) if density.joint.plate else torch.zeros(1).long()
        z = density.at(indices).sample(1)[0][0]
        z = z[:1].expand_as(z)  # so that rows differ by their data alone
        labels = _told_apart(lambda: _read(density, z, indices), lambda: weights)
        slopes = _slopes(density, weights, labels, states)
    return Freedom(labels, slopes)


def ties_of(density: GuideDensity, local: FactorisedGuide, varies: dict[str, set[str]]) -> Freedom:
    """The freedom of a factorised guide, in the parameters that `varies` names for each term.

    The guide is run again only where its output `local` for some datapoints leaves elements that may be tied.
    """
    in_plate, first = density.joint.plate is not None, [local]

    def read() -> dict[Key, Tensor]:
        guide = first.pop() if first else density.at(local.indices)
        assert isinstance(guide, FactorisedGuide)
        values = rows_of(guide.terms, guide.distributions, in_plate)
        return {key: value for key, value in values.items() if key[1] in varies[key[0]]}

    with seeded(0, "freedom"), evaluating(density.guide), torch.no_grad():
        return Freedom(_told_apart(read, lambda: used_weights(density), alone=False), {})


def _told_apart(
    read: Callable[[], dict[Key, Tensor]], weights: Callable[[], list[Weight]], *, alone: bool = True
) -> dict[Key, Tensor]:
    """The labels of the elements of all parameters that `read` returns.

    Weights are perturbed as long as elements look tied or fixed: further changes can only tell more apart. A single
    element is compared with none; `alone` says whether it matters that it may be fixed.
    """
    before = read()
    changes = {key: [value - value.mean(0)] for key, value in before.items()}

    def labelled() -> dict[Key, Tensor]:
        return {key: _labels(torch.cat(parts).T, before[key], key) for key, parts in changes.items()}

    def settled() -> bool:
        least = 1 if alone else 2
        return all(int(each.max()) + 1 == len(each) for each in labels.values() if len(each) >= least)

    labels = labelled()
    if settled() or not (used := weights()):
        return labels
    for _ in range(NUM_PERTURBED):
        with _perturbed(used):
            for key, value in read().items():
                changes[key].append(value - before[key])
        labels = labelled()
        if settled():
            break
    return labels


def _read(density: GuideDensity, z: Tensor, indices: Tensor) -> dict[Key, Tensor]:
    """Each parameter as real numbers, by rows, `(R, K)`, with the draws `z` `(R, dim)` in the guide's sites."""
    in_plate = density.joint.plate is not None
    runs = [(z, indices)] if in_plate else [(row[None], indices[:1]) for row in z]
    read: dict[Key, list[Tensor]] = {}
    for points, rows in runs:
        messages = density.messages(rows, 1, PlaceValues(density.terms, points, in_plate))
        distributions = {term.name: messages[term.name]["fn"] for term in density.terms}
        for key, value in rows_of(density.terms, distributions, in_plate).items():
            read.setdefault(key, []).append(value)
    return {key: torch.cat(parts) for key, parts in read.items()}


@contextmanager
def _perturbed(weights: list[Weight], sign: float = 1.0) -> Iterator[None]:
    """Run a guide with slightly different weights, drawn anew each time."""
    values = []
    for weight in weights:
        value = weight.value.detach()
        size = value.square().mean().sqrt()
        typical = torch.where(size > 0, 0.1 * size, torch.ones_like(size))
        values.append(value + sign * RELATIVE * torch.maximum(value.abs(), typical) * torch.randn_like(value))
    with substituted(weights, values):
        yield


def _labels(changes: Tensor, values: Tensor, key: Key) -> Tensor:
    """Elements with equal `changes` `(K, F)` have one label; those without any have -1."""
    changes = torch.nan_to_num(changes)
    tolerance = _rounding(values)
    labels = torch.full((len(changes),), -1)
    moved = (changes.abs().amax(1) > tolerance).nonzero()[:, 0]
    if key[1] == "scale_tril":
        return torch.arange(len(changes)) if len(moved) else labels
    # Candidates for equality are neighbours along a random direction.
    direction = torch.randn(changes.shape[1], dtype=changes.dtype, device=changes.device)
    along = changes[moved] @ direction
    order = along.argsort()
    reach = tolerance * float(direction.abs().sum())
    starts = torch.cat([order.new_zeros(1), (along[order].diff() > reach).nonzero()[:, 0] + 1]).tolist()
    count = 0
    for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
        left = moved[order[start:stop]]
        while len(left):
            same = (changes[left] - changes[left[0]]).abs().amax(1) <= tolerance
            labels[left[same].cpu()] = count
            left, count = left[~same], count + 1
    return _in_order(labels)


def _in_order(labels: Tensor) -> Tensor:
    """The same labels, numbered as they first appear."""
    numbers: dict[int, int] = {-1: -1}
    for label in labels.tolist():
        numbers.setdefault(label, len(numbers) - 1)
    return torch.tensor([numbers[label] for label in labels.tolist()])


def _rounding(values: Tensor) -> float:
    size = torch.nan_to_num(values, posinf=0.0, neginf=0.0).abs().max()
    return float(ROUNDING * torch.finfo(values.dtype).eps * (1 + size))


def _slopes(
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
        read = _read(density, points, index.expand(len(points)))
        return {key: read[key] for key in keys}

    def change() -> dict[Key, Tensor]:
        state = torch.get_rng_state()
        with _perturbed(weights):
            above = values()
        torch.set_rng_state(state)
        with _perturbed(weights, -1.0):
            below = values()
        return {key: (above[key] - below[key]) / 2 for key in keys}

    before, changes = values(), [change() for _ in range(NUM_PERTURBED)]
    indicators: dict[Key, Indicators | None] = dict.fromkeys(keys)
    if grid is not None:
        for key in keys:
            seen = torch.stack([each[key] for each in (before, *changes)])
            indicators[key] = grid.indicators(seen, _rounding(before[key]))

    def by_feature(key: Key, each: dict[Key, Tensor]) -> Tensor:
        return each[key] if grid is None else grid.by_feature(each[key], indicators[key])

    free = {}
    for key in keys:
        features = torch.stack([by_feature(key, each) for each in changes])
        moved = (features[:, 1:] - features[:, :1]).abs().amax(0) > _rounding(before[key])
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
