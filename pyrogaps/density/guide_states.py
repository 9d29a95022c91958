"""What a guide's distributions say of the discrete sites that it draws, at every joint state of these."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrogaps.density.data import evenly_spaced
from pyrogaps.density.given_states import columns_of
from pyrogaps.density.guide import GuideDensity
from pyrogaps.density.layout import leaf
from pyrogaps.density.local import GuideSite, PlaceValues, score_term
from pyrogaps.density.runs import evaluating
from pyrogaps.density.score import log_prob
from pyrogaps.density.state_numbers import all_joint_states
from pyrogaps.errors import InputError, counted
from pyrogaps.streams import seeded

# Joint states of a datapoint that are listed, and datapoints at which dependences are looked for.
MAX_STATES, NUM_ROWS = 128, 16


@dataclass(frozen=True)
class GuideStates:
    """The joint states of the E discrete elements that a guide draws, and what depends on what in it.

    Attributes:
        states: `(K, E)`, the numbers of the states of the elements, by column of `z`.
        parents: `(E, E)`, True at [e, f] where the distribution of element e depends on the state of f.
        steers: `(E,)`, the elements on which a distribution of z depends.
        factorised: whether the distributions of z given the states are known before any draw.
    """

    states: Tensor
    parents: Tensor
    steers: Tensor
    factorised: bool

    @property
    def cells(self) -> tuple[Tensor, Tensor]:
        """The joint states in cells between which q(z | x, y) may differ: positions `(C, J)` of the states, and the
        cell of each state `(K,)`.
        """
        cell = torch.zeros(len(self.states), dtype=torch.long)
        if self.steers.any():
            cell = self.states[:, self.steers].unique(dim=0, return_inverse=True)[1]
        number = int(cell.max()) + 1
        return torch.stack([(cell == c).nonzero()[:, 0] for c in range(number)]), cell


def listed_states(density: GuideDensity) -> Tensor:
    """The joint states `(K, E)` of the discrete elements that a guide draws; `InputError` where they are too many."""
    joint = density.joint
    names, numbers = list(joint.structure.drawn), _numbers(density)
    states = all_joint_states(numbers, MAX_STATES)
    if states is None:
        raise InputError(
            f"site '{names[0]}': the guide draws {too_many(numbers)}, and its refinement takes every one of at most "
            f"{MAX_STATES}. Call elbo and iwae, which draw them, or leave the site out of the guide: it is then summed "
            "out exactly"
        )
    return states


def _numbers(density: GuideDensity) -> list[int]:
    """The number of states of each element."""
    sites = density.joint.sites
    return [sites[name].num_states for name in density.joint.structure.drawn for _ in range(sites[name].size)]


def read_states(density: GuideDensity) -> GuideStates | None:
    """Read what depends on what in a guide that draws discrete sites; None where one depends on continuous latents.

    Raises `InputError` where there are too many joint states.
    """
    joint, states, numbers = density.joint, listed_states(density), _numbers(density)
    indices = evenly_spaced(density.num_datapoints, NUM_ROWS)
    with seeded(0, "guide states", device=joint.device), torch.no_grad():
        draws = [density.at(indices).sample(1)[0][0] for _ in range(2)]
        first, second = (_tables(density, states, indices, z) for z in draws)
        factorised = _same_runs(density, states, indices)
    if not _same(first.elements, second.elements):
        return None
    shape = [len(indices), *numbers]
    parents = torch.stack([_varies(first.elements[..., e], shape) for e in range(len(numbers))])
    parents = parents & ~torch.eye(len(numbers), dtype=torch.bool)
    steers = torch.stack([_varies(term, shape) for term in first.latents] or [torch.zeros(len(numbers)).bool()]).any(0)
    return GuideStates(states, parents, steers, factorised)


def too_many(numbers: list[int]) -> str:
    """The count of joint states, in words."""
    total = math.prod(numbers)
    return counted(total, "joint state") if total < 10**6 else f"10^{math.log10(total):.0f} joint states"


def element_tables(density: GuideDensity, states: Tensor, indices: Tensor) -> Tensor:
    """log q of the state of each element, given those of the others, at all joint states: `(B, K, E)`.

    An element that the model masks out has one state only, its first.
    """
    # Where these are, z says nothing of the states, see `read_states`.
    return _tables(density, states, indices, density.joint.zeros(len(indices))).elements


@dataclass(frozen=True)
class _Tables:
    """Log-probabilities at all joint states: of `elements` `(B, K, E)`, and of each continuous term `(B, K)`."""

    elements: Tensor
    latents: list[Tensor]


def _tables(density: GuideDensity, states: Tensor, indices: Tensor, z: Tensor) -> _Tables:
    """The tables with the continuous latents at `z` `(B, dim)`."""
    joint, number = density.joint, len(states)
    drawn = columns_of(joint, drawn=True)
    flat = z.repeat_interleave(number, 0)
    flat[:, drawn] = states.repeat(len(z), 1).to(flat)
    active = joint.active(indices)
    active = None if active is None else active.repeat_interleave(number, 0)
    elements, latents = torch.zeros_like(flat), []
    for place, messages in _runs(density, density.terms, flat, indices.repeat_interleave(number)):
        rows, own = len(flat[place]), None if active is None else active[place]
        for position, term in enumerate(density.terms):
            message = messages[term.name]
            if term.site.num_states:
                elements[place, term.site.columns] = _by_element(term, message, rows, joint.plate is not None)
                continue
            scored = score_term(term, message["fn"], message["value"][None], own, joint.plate is not None, (1, rows))
            latents.append((position, scored[1][0]))
    if active is not None:
        elements = torch.where(active, elements, torch.where(flat == 0, 0.0, -math.inf).to(elements))
    positions = dict.fromkeys(position for position, _ in latents)
    terms = [torch.cat([part for at, part in latents if at == position]) for position in positions]
    shape = (len(z), number)
    return _Tables(elements[:, drawn].reshape(*shape, -1), [term.reshape(shape) for term in terms])


def _runs(
    density: GuideDensity, terms: list[GuideSite], flat: Tensor, indices: Tensor
) -> Iterator[tuple[slice, dict[str, Any]]]:
    """Runs of a guide with `terms` at `flat` `(R, dim)`: all rows at once, or one at a time without a plate."""
    in_plate = density.joint.plate is not None
    with evaluating(density.guide):
        for part in [slice(None)] if in_plate else [slice(k, k + 1) for k in range(len(flat))]:
            yield part, density.messages(indices[part], 1, PlaceValues(terms, flat[part], in_plate))


def _by_element(term: GuideSite, message: Any, rows: int, in_plate: bool) -> Tensor:
    """log q of the elements of a discrete term `(R, size)`."""
    inner, value = leaf(message["fn"]), message["value"]
    term_log_prob = log_prob(inner, value, term.name)
    shape = value.shape[: value.dim() - inner.event_dim]
    term_log_prob = term_log_prob.expand(shape)
    return term.site.flatten(term_log_prob) if in_plate else term_log_prob.reshape(rows, -1)


def _same_runs(density: GuideDensity, states: Tensor, indices: Tensor) -> bool:
    """Whether the distributions of z are the same in two runs with the same states and other draws."""
    joint = density.joint
    flat = joint.zeros(len(indices))
    flat[:, columns_of(joint, drawn=True)] = states[torch.arange(len(indices)) % len(states)].to(flat)
    terms = [term for term in density.terms if term.site.num_states]
    latents = [term for term in density.terms if not term.site.num_states]
    if len(latents) <= 1:
        return True
    for (_, first), (_, second) in zip(
        _runs(density, terms, flat, indices), _runs(density, terms, flat, indices), strict=True
    ):
        for term in latents:
            value = first[term.name]["value"]
            pair = [log_prob(run[term.name]["fn"], value, term.name) for run in (first, second)]
            if not torch.equal(*pair):
                return False
    return True


def _varies(table: Tensor, shape: list[int]) -> Tensor:
    """Along which elements a table over rows and joint states `(B, K)` varies: `(E,)`."""
    grid, result = table.reshape(shape), []
    for axis in range(1, len(shape)):
        same = grid.narrow(axis, 0, 1).expand_as(grid)
        result.append(not _same(grid, same))
    return torch.tensor(result)


def _same(left: Tensor, right: Tensor) -> bool:
    """Whether log-probabilities agree up to rounding: what an untrained network adds is small, but it is there."""
    tolerance = 1e-10 if left.dtype == torch.float64 else 1e-5
    return torch.allclose(left, right, rtol=tolerance, atol=tolerance, equal_nan=True)
