r"""What the weights of a guide are free to do with the parameters of its site distributions.

The guide is run at the same draws with slightly different weights, and for different datapoints. Parameters are
compared as real numbers, $\eta$: scales by their logarithms. Two elements of a parameter that always change alike are
*tied*: a single number per datapoint for all latent dimensions stays a single number. An element that never changes is
fixed.

Where a guide draws discrete sites, parameters may also change with the states drawn before them; see `slopes`.

The factor of a full covariance is an exception: the family is the distribution's. Once any of its elements changes, all
of them are free, those that the guide holds at 0 too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.density import GuideDensity
from pyrogaps.density.data import evenly_spaced
from pyrogaps.density.local import FactorisedGuide
from pyrogaps.density.runs import evaluating
from pyrogaps.refine.finetune import Weight, used_weights
from pyrogaps.refine.parameters import rows_of
from pyrogaps.refine.perturbed import NUM_PERTURBED, NUM_ROWS, Key, perturbed, read_parameters, rounding_of
from pyrogaps.refine.slopes import Slopes, slopes_of
from pyrogaps.streams import seeded


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
        labels = _told_apart(lambda: read_parameters(density, z, indices), lambda: weights)
        slopes = slopes_of(density, weights, labels, states)
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
        with perturbed(used):
            for key, value in read().items():
                changes[key].append(value - before[key])
        labels = labelled()
        if settled():
            break
    return labels


def _labels(changes: Tensor, values: Tensor, key: Key) -> Tensor:
    """Elements with equal `changes` `(K, F)` have one label; those without any have -1."""
    changes = torch.nan_to_num(changes)
    tolerance = rounding_of(values)
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
