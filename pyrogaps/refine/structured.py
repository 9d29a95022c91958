r"""A guide's own family, kind (c): sites that depend on earlier draws, their parameters freed as residuals.

At each site the guide's program computes the parameters of its distribution from the data and from earlier draws. As
real numbers (scales by their logarithms) they become

$$\eta(z_{<}, x_n) = \eta_\phi(z_{<}, x_n) + r_n + A_n (z_{<} - c_n),$$

with the residual $r_n$ of datapoint n, and, for locations, slopes $A_n$ in the earlier draws. Both are 0 at the guide
itself; $c_n$ is a constant, the guide's sites without noise. The network is frozen and runs once for all datapoints and
particles. Only what the guide's weights can move is free, see `freedom`: elements that they move together stay tied,
and r and A of a site stay in the span of what they can do to intercepts and slopes. Above 64 slopes of a site they are
not freed. Ties between different sites are not seen. Discrete sites that depend on earlier continuous ones belong to
the family too, see `enumerated`.

The family contains the guide, and every guide whose locations differ from it by a linear function and whose scales
differ by a factor. What a network with weights for each datapoint could do beyond that (curved dependence, a scale that
changes with earlier draws in another way) is left out: L[q*] is a lower bound of the best of the guide's class.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyrogaps.capture import RecordedDraws
from pyrogaps.capture.programs import Values
from pyrogaps.density import GuideDensity, JointDensity
from pyrogaps.density.guide import SequentialGuide
from pyrogaps.density.layout import leaf
from pyrogaps.density.local import Draws, LocalGuide, PlaceValues
from pyrogaps.density.runs import evaluating
from pyrogaps.refine.families import Start
from pyrogaps.refine.freedom import Freedom
from pyrogaps.refine.parameters import axis_of, free_leaf, names_of, to_rows, transform_of, unit_of, value_of
from pyrogaps.refine.perturbed import Key
from pyrogaps.refine.residuals import Added, CentralSites, ResidualSites
from pyrogaps.refine.slopes import Slopes
from pyrogaps.streams import Chunk, seeded

NUM_MOMENTS = 256


@dataclass(frozen=True)
class _Change:
    """What is added to one parameter: positions of the residual and of the slopes among the leaves."""

    labels: Tensor
    residual: int
    slopes: Slopes | None
    slopes_at: int

    @property
    def tied(self) -> bool:
        """Whether some elements are tied or fixed."""
        return len(self.labels) != int(self.labels.max()) + 1

    @property
    def spanned(self) -> bool:
        """Whether residual and slopes are combinations of a few directions."""
        return self.slopes is not None and self.slopes.basis is not None


class StructuredGuide:
    """Residuals on the parameters of a guide's sites, for every datapoint of a chunk; see `Refinable`."""

    def __init__(self, density: GuideDensity, joint: JointDensity, indices: Tensor, freedom: Freedom) -> None:
        self.density, self.joint = density.restrict(joint, indices), joint
        self._first, self.count = int(indices[0]), len(indices)
        draws = []
        for block in Chunk(self._first, self._first + self.count).blocks():
            with seeded(0, "structured", block.start), torch.no_grad():
                draws.append(self.density.at(block.indices - self._first).sample(NUM_MOMENTS)[0])
        self.centre, spread = self._middles(), torch.cat(draws, 1).std(0)
        self._spread = torch.where(spread > 0, spread, torch.ones_like(spread))
        self.parameters: list[Tensor] = []
        self.units: list[Tensor | float] = []
        self.changes: dict[Key, _Change] = {}
        for key, unit in self._natural_units().items():
            self._free(key, unit, freedom)
        self._active = joint.active(torch.arange(self.count))
        self._recorded: dict[Any, RecordedDraws] = {}
        self.axes, self.rows = [0] * len(self.parameters), [slice(None)] * len(self.parameters)

    def _middles(self) -> Tensor:
        """The guide's sites without noise, `(B, dim)`: the same wherever a datapoint is refined."""
        handler = CentralSites(self.density.terms, self.joint.zeros(self.count), self.joint.plate is not None)
        with evaluating(self.density.guide), torch.no_grad():
            self.density.messages(torch.arange(self.count), 1, handler)
        return handler.drawn()

    def _natural_units(self) -> dict[Key, Tensor]:
        """A natural step in each element of each parameter, `(B, K)`, with the centres in the guide's sites."""
        in_plate, units = self.joint.plate is not None, {}
        with evaluating(self.density.guide), torch.no_grad():
            messages = self.density.messages(
                torch.arange(self.count), 1, PlaceValues(self.density.terms, self.centre, in_plate)
            )
        for term in self.density.terms:
            fn = messages[term.name]["fn"]
            inner = free_leaf(fn)
            for name in names_of(inner):
                value = value_of(inner, name)
                unit = torch.as_tensor(unit_of(inner, name, value), dtype=value.dtype, device=value.device)
                axis = axis_of(term, fn, inner, name) if in_plate else None
                units[term.name, name] = to_rows(unit.expand_as(value), axis)
        return units

    def _free(self, key: Key, unit: Tensor, freedom: Freedom) -> None:
        labels = freedom.labels[key].to(unit.device)
        number = int(labels.max()) + 1
        if not number:
            return
        slopes = freedom.slopes.get(key)
        if slopes is not None and slopes.basis is not None:
            position = self._leaf(self._spanned_units(slopes, slopes.basis.to(unit), unit))
            self.changes[key] = _Change(labels, position, slopes, position)
            return
        # The unit of tied elements is their mean.
        member = torch.nn.functional.one_hot(labels.clamp(min=0), number).to(unit.dtype) * (labels >= 0)[:, None]
        residual = self._leaf(unit @ member / member.sum(0))
        slopes_at = -1
        if slopes is not None:
            spread = slopes.padded(self._spread, 1.0)
            slopes_at = self._leaf(unit[:, slopes.elements] / spread[:, slopes.coordinates])
        self.changes[key] = _Change(labels, residual, slopes, slopes_at)

    def _spanned_units(self, slopes: Slopes, basis: Tensor, unit: Tensor) -> Tensor:
        """Natural steps `(B, rank)`: by each, the location moves by at most about its own unit."""
        number = unit.shape[1]
        reach = slopes.padded(self.centre.abs() + self._spread, 1.0)[:, slopes.coordinates]
        terms = basis[:, number:].abs() * reach[:, None]
        effect = basis[:, :number].abs().expand(len(unit), -1, -1).index_add(2, slopes.elements, terms)
        return 1 / (effect / unit[:, None]).amax(-1)

    def _leaf(self, unit: Tensor) -> int:
        self.parameters.append(torch.zeros_like(unit).requires_grad_())
        self.units.append(unit.clone())
        return len(self.parameters) - 1

    def at(self, indices: Tensor) -> LocalGuide:
        """The guide at datapoints `indices` of the chunk, differentiable in `parameters`."""
        positions = indices - self._first
        return StructuredLocal(self, positions, self.active_at(positions))

    def active_at(self, positions: Tensor) -> Tensor | None:
        """Which coordinates are not masked out at `positions` in the chunk; None if the model masks none."""
        return None if self._active is None else self._active[positions]

    def forget(self) -> None:
        """Let go of what was recorded for the refinement, which is large."""
        self._recorded.clear()

    def recorded(self, key: Any, function: Callable[..., Values]) -> Values:
        """What `function` gives of `parameters`, and of random numbers, recorded where it has been called often."""
        if key not in self._recorded:
            self._recorded[key] = RecordedDraws(function, self.joint.device)
        return self._recorded[key](self.parameters)

    def start_at(self, start: Start) -> bool:
        """Start near a factorised Gaussian; whether it can, which it does where all its sites are free Normals.

        Locations and scales are the Gaussian's where earlier draws are at its means; the network's slopes stay.
        """
        everyone, in_plate = torch.arange(self.count), self.joint.plate is not None
        with evaluating(self.density.guide), torch.no_grad():
            messages = self.density.messages(everyone, 1, self.sites_with(everyone, 1, start.loc))
            residuals = {}
            for term in self.density.terms:
                fn, wanted = messages[term.name]["fn"], {"loc": start.loc, "scale": start.scale.clamp(min=1e-6)}
                inner = free_leaf(fn)
                if type(inner).__name__ != "Normal":
                    return False
                for name, values in wanted.items():
                    change = self.changes.get((term.name, name))
                    if change is None or change.tied or change.spanned:
                        return False
                    axis, transform = axis_of(term, fn, inner, name) if in_plate else None, transform_of(inner, name)
                    now = to_rows(transform.inv(value_of(inner, name)), axis)
                    residuals[change.residual] = transform.inv(values[:, term.site.columns]) - now
            for position, residual in residuals.items():
                self.parameters[position].add_(residual)
        return True

    def sites_with(
        self,
        positions: Tensor,
        num_particles: int,
        z: Tensor | None,
        parameters: list[Tensor] | None = None,
        *,
        mirrored: bool = False,
    ) -> ResidualSites:
        """The handler that adds the residuals of datapoints at `positions`, all of them `num_particles` times.

        They are those in `parameters`, its own by default.
        """
        everyone = torch.equal(positions, torch.arange(self.count))

        def repeated(values: Tensor) -> Tensor:
            return (values if everyone else values[positions]).repeat(num_particles, 1)

        added = {
            key: Added(
                change.labels if change.tied else None, rows[change.residual], change.slopes, rows[change.slopes_at]
            )
            for rows in [[repeated(parameter) for parameter in parameters or self.parameters]]
            for key, change in self.changes.items()
        }
        centre = repeated(self.centre)
        return ResidualSites(self.density.terms, z, added, centre, self.joint.plate is not None, mirrored)


def can_be_structured(density: GuideDensity) -> bool:
    """Whether every site of a guide, in the model's coordinates, has parameters that can be freed."""
    return not (density.factorised or density.structure.mapped) and not without_parameters(density)


def without_parameters(density: GuideDensity) -> dict[str, str]:
    """The sites of a guide whose parameters cannot be freed, with the names of their distributions."""
    with seeded(0, "structured"), evaluating(density.guide), torch.no_grad():
        messages = density.messages(torch.zeros(1, dtype=torch.long))
    sites = {term.name: messages[term.name]["fn"] for term in density.terms}
    return {name: type(leaf(fn)).__name__ for name, fn in sites.items() if free_leaf(fn) is None}


class StructuredLocal(SequentialGuide):
    """A `LocalGuide` that runs the guide with residuals at its sites."""

    def __init__(self, guide: StructuredGuide, positions: Tensor, active: Tensor | None) -> None:
        super().__init__(guide.density, positions, active)
        self.guide = guide

    def sample(self, num_particles: int, antithetic: bool = False) -> Draws:
        # Of guides that are being refined, many draws are compared.
        if torch.is_grad_enabled() or not self.guide.parameters[0].requires_grad:
            return super().sample(num_particles, antithetic)
        return self.sample_path(num_particles, antithetic)

    def sample_path(self, num_particles: int, antithetic: bool = False) -> Draws:
        """As `sample`, with log q as a function of the draws alone: gradients reach the residuals through these."""
        if self.joint.plate is None:
            pairs = [self._recorded_path(1, False) for _ in range(num_particles)]
            return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
        return self._recorded_path(num_particles, antithetic)

    def _recorded_path(self, num_particles: int, antithetic: bool) -> Draws:
        key = (*self.indices.tolist(), num_particles, antithetic)
        z, log_q = self.guide.recorded(key, lambda *given: self._path([*given], num_particles, antithetic))
        return z, log_q

    def _path(self, parameters: list[Tensor], num_particles: int, antithetic: bool) -> Draws:
        """As `sample_path`, through the guide's program, with residuals in `parameters`."""
        mirrored = antithetic and num_particles % 2 == 0
        handler = self.guide.sites_with(self.indices, num_particles, None, parameters, mirrored=mirrored)
        with evaluating(self.density.guide):
            messages = self.density.messages(self.indices, num_particles, handler)
        sites = {name: (fn, messages[name]["value"]) for name, fn in handler.frozen.items()}
        return self.scored(num_particles, sites)

    def handler(self, num_particles: int, z: Tensor | None, antithetic: bool) -> ResidualSites:
        mirrored = antithetic and num_particles % 2 == 0
        return self.guide.sites_with(self.indices, num_particles, z, mirrored=mirrored)
