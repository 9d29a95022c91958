r"""Model and guide given the states y of discrete sites: densities over the continuous latents z alone.

A *cell* is a set of joint states, and a row is a datapoint in one of its cells. With weights w over the J states of a
row's cell, the density of a row is

$$\sum_j w_j \log p(x_n, y_j, z) \;\text{[nats]}$$

which for J = 1 is log p(x_n, y, z). Row n C + c is datapoint n in cell c of C. Rows are datapoints to everything that
works on datapoints.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrogaps.density.data import IndexedData
from pyrogaps.density.guide import GuideDensity, GuideStructure
from pyrogaps.density.joint import JointDensity
from pyrogaps.density.layout import Site
from pyrogaps.density.local import PlaceValues
from pyrogaps.density.reading import ModelStructure


class Cells(NamedTuple):
    """The joint states of the elements that a guide draws, in cells: `states` `(C, J, E)`, numbers of states."""

    states: Tensor

    @property
    def number(self) -> int:
        """C, the number of cells."""
        return len(self.states)


class Given(NamedTuple):
    """What rows are given: states `(R, J, E)`, their weights `(R, J)`, and the rows' datapoints `(R,)`."""

    states: Tensor
    weights: Tensor
    origin: Tensor


class StatesDensity(JointDensity):
    """The density of every datapoint in every cell, see above; `scored` is that of y and z together."""

    def __init__(self, scored: JointDensity, data: IndexedData) -> None:
        self.scored = scored
        super().__init__(scored.model, data, structure=without_drawn(scored.structure))
        self.data = data  # of several rows without a plate too
        self._kept = columns_of(scored, drawn=False)
        self._drawn = columns_of(scored, drawn=True)

    @classmethod
    def of(cls, scored: JointDensity, cells: Cells, weights: Tensor, first: int = 0) -> "StatesDensity":
        """The rows of all datapoints; `weights` `(B, C, J)` are those of the datapoints from `first` on, the only ones
        that can be fetched.
        """
        number, (_, count, _) = cells.number, cells.states.shape

        def fetch(rows: Tensor) -> tuple[Any, ...]:
            origin = rows // number
            args = scored.data.fetch(origin.repeat_interleave(count))
            own = weights[(origin - first).to(weights.device), (rows % number).to(weights.device)]
            return (*args, cells.states[rows % number], own, origin)

        return cls(scored, IndexedData(scored.num_datapoints * number, fetch))

    def cells_of(self, rows: Tensor) -> Given:
        """The cells of the rows, which are what they are given."""
        return Given(*self.data.fetch(rows)[-3:])

    def placed(self, z: Tensor, states: Tensor) -> Tensor:
        """Points `(R, dim)` of `scored`: `z` `(R, dim)` beside the states `(R, E)`."""
        flat = z.new_zeros(len(z), self.scored.dim)
        flat = flat.index_copy(1, self._kept.to(z.device), z)
        return flat.index_copy(1, self._drawn.to(z.device), states.to(z))

    def score(self, flat: Tensor, args: tuple[Any, ...], indices: Tensor) -> tuple[Tensor, Tensor]:
        *own, states, weights, origin = args
        count = states.shape[1]
        if self.plate is None:  # one row's arguments, whatever the number of points
            states, weights = states.expand(len(flat), -1, -1), weights.expand(len(flat), -1)
            origin = origin.expand(len(flat))
        # A plate of the data set's full size chooses its rows by value, which a record cannot.
        origin = self.cells_of(indices).origin if self.plate is not None and self.structure.bound else origin
        points = self.placed(flat.repeat_interleave(count, 0), states.flatten(0, 1))
        parts = self.scored.score(points, tuple(own), origin.repeat_interleave(count))
        weights = weights.to(flat)

        def weighted(part: Tensor) -> Tensor:
            part = part.reshape(-1, count)
            return torch.where(weights > 0, weights * part, torch.zeros_like(part)).sum(1)

        return weighted(parts[0]), weighted(parts[1])

    def total(self, flat: Tensor, args: tuple[Any, ...], indices: Tensor) -> Tensor:
        """The density of rows `(R,)`."""
        log_prior, log_likelihood = self.score(flat, args, indices)
        return log_prior + log_likelihood

    def active(self, indices: Tensor) -> Tensor | None:
        active = self.scored.active(self.cells_of(indices).origin)
        return None if active is None else active[:, self._kept.to(active.device)]

    def sample_prior(self, num_particles: int, indices: Tensor | None = None) -> Tensor:
        """Draws of z whatever y is, for scales."""
        rows = torch.arange(self.num_datapoints) if indices is None else indices
        return self.scored.sample_prior(num_particles, self.cells_of(rows).origin)[..., self._kept]

    def over(self, data: IndexedData) -> "StatesDensity":
        return StatesDensity(self.scored, data)


class GivenStatesGuide(GuideDensity):
    """q(z | x_n, y) of the guide `whole`, of y and z together, at the rows of `joint`."""

    def __init__(
        self,
        whole: GuideDensity,
        joint: StatesDensity,
        *,
        factorised: bool = False,
        structure: GuideStructure | None = None,
    ) -> None:
        self.whole, self.states_joint = whole, joint
        if structure is None:
            terms = tuple(
                replace(term, site=replace(term.site, start=joint.sites[term.site.name].start))
                for term in whole.terms
                if not term.site.num_states
            )
            size = joint.num_datapoints
            structure = replace(whole.structure, terms=terms, origin=None, size=size, factorised=factorised)
        super().__init__(whole.guide, None, joint, structure=structure)

    def messages(self, indices: Tensor, num_particles: int = 1, handler: Messenger | None = None) -> dict[str, Any]:
        given = self.states_joint.cells_of(indices)
        drawn = [term for term in self.whole.terms if term.site.num_states]
        flat = self.states_joint.placed(self.joint.zeros(len(indices)), given.states[:, 0])
        with PlaceValues(drawn, flat.repeat(num_particles, 1), in_plate=self.joint.plate is not None):
            return self.whole.messages(given.origin, num_particles, handler)

    @property
    def num_datapoints(self) -> int:
        """The number of rows, or without a plate, where a run holds one, 1."""
        return 1 if self.joint.plate is None else self.joint.num_datapoints

    def restrict(self, joint: JointDensity, origin: Tensor) -> "GivenStatesGuide":
        assert isinstance(joint, StatesDensity)
        return GivenStatesGuide(self.whole, joint, structure=self.structure)


def columns_of(scored: JointDensity, *, drawn: bool) -> Tensor:
    """The columns of the discrete sites that a guide draws, or of all others."""
    sites = [site for site in scored.sites.values() if bool(site.num_states) == drawn]
    return torch.cat([torch.arange(site.start, site.start + site.size) for site in sites] or [torch.empty(0).long()])


def without_drawn(structure: ModelStructure) -> ModelStructure:
    """`structure` with the continuous latents alone."""
    sites: dict[str, Site] = {}
    start = 0
    for name, site in structure.sites.items():
        if not site.num_states:
            sites[name] = replace(site, start=start)
            start += site.size
    return replace(structure, sites=sites, drawn=())
