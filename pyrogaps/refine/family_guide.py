"""Guides of a further family for the datapoints of a chunk, ready to be refined."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import transform_to

from pyrogaps.density import GuideDensity, JointDensity
from pyrogaps.density.local import Draws, LocalGuide
from pyrogaps.density.runs import evaluating
from pyrogaps.family import LocalFamily
from pyrogaps.gaussians import Gaussian
from pyrogaps.guard import failures_named
from pyrogaps.refine.families import Family, Start, data_axes, instantiate, restrict
from pyrogaps.run import Run
from pyrogaps.streams import BLOCK, Chunk


class FamilyGuide:
    """Guides of some family for the datapoints of a chunk, a Pyro guide for each block of them; see `Refinable`.

    A guide that starts at random draws from the block's own stream, so that a datapoint's guide does not depend on how
    many are refined at once. A guide of a block also holds no more parameters than one run of it needs: picking rows
    from many, block by block, would cost the square of their number in gradients.
    """

    def __init__(self, family: Family, joint: JointDensity, chunk: Chunk, run: Run) -> None:
        self.joint, self._first = restrict(joint, chunk.indices), chunk.start
        axes = data_axes(family, self.joint, run)
        self._parts = [_Part(family, joint, block, block.start - chunk.start, run) for block in chunk.blocks()]
        self.parameters: list[Tensor] = [value for part in self._parts for value in part.named.values()]
        self.axes = [axes[name] for part in self._parts for name in part.named]
        self.rows = [part.rows for part in self._parts for _ in part.named]
        # Until it starts somewhere its scales say nothing about the posterior's.
        self.units: list[Tensor | float] = [1.0] * len(self.parameters)

    @property
    def guide(self) -> nn.Module:
        """One of the guides; they differ in their datapoints alone."""
        return self._parts[0].guide

    def at(self, indices: Tensor) -> LocalGuide:
        positions = indices - self._first
        block = positions // BLOCK
        places = [(self._parts[k], (block == k).nonzero()[:, 0]) for k in block.unique().tolist()]
        guides = [(part.density.at(positions[place] - part.rows.start), place) for part, place in places]
        return guides[0][0] if len(guides) == 1 else JoinedGuide(self.joint, positions, guides)

    def start_at(self, start: Start) -> None:
        """Start at a factorised Gaussian, or near it, where the guide can.

        `AutoNormal` can; another guide does if it has a method `start_at(loc, scale)`. A method `units()` that names
        parameters and natural steps for them is heeded.
        """
        for part in self._parts:
            part.start_at(start.loc[part.rows], start.scale[part.rows])
        self._take_units()

    def start_by(self, start_local: Callable[..., None]) -> None:
        """Start where `start_local(guide, *args)` puts a guide, given the model's arguments for its datapoints."""
        with evaluating(self.joint.model), torch.no_grad():
            for part in self._parts:
                args = part.joint.fetch(torch.arange(part.joint.num_datapoints))
                with failures_named("guide.start_local"):
                    start_local(part.guide, *args[: len(args) - part.joint.num_given])
        self._take_units()

    def move_to(self, gaussian: Gaussian) -> bool:
        """Set all guides to Gaussians; False where the family has no way to."""
        moved = [part.move_to(gaussian.loc[part.rows], gaussian.matrix[part.rows]) for part in self._parts]
        return all(moved)

    def free_columns(self, dim: int) -> tuple[Tensor, Tensor]:
        """All means and all scales are free."""
        free = torch.ones(dim, dtype=torch.bool, device=self.joint.device)
        return free, free

    def _take_units(self) -> None:
        self.units = [unit for part in self._parts for unit in part.units()]


class _Part:
    """The guide of one block, the rows from `first` on of a chunk."""

    def __init__(self, family: Family, joint: JointDensity, block: Chunk, first: int, run: Run) -> None:
        self.rows = slice(first, first + len(block))
        self.joint = restrict(joint, block.indices)
        with run.stream("family").seeded(block.start // BLOCK), evaluating(joint.model):
            self.guide = instantiate(family, self.joint, torch.arange(len(block)))
        self.density = GuideDensity(self.guide, None, self.joint)
        self.named = {name: value for name, value in self.guide.named_parameters() if value.requires_grad}

    def start_at(self, loc: Tensor, scale: Tensor) -> None:
        if isinstance(self.guide, AutoNormal):
            _start_auto_normal(self.guide, self.joint, loc, scale)
        elif (start_at := LocalFamily.of(self.guide).start_at) is not None:
            with failures_named(f"{type(self.guide).__name__}.start_at"):
                start_at(loc, scale)

    def move_to(self, loc: Tensor, scale: Tensor) -> bool:
        """Set the guide to Gaussians with these scales, `(B, dim)` or factors `(B, dim, dim)`, where it can."""
        family = LocalFamily.of(self.guide)
        if isinstance(self.guide, AutoNormal) or (scale.dim() == 2 and family.start_at is not None):
            self.start_at(loc, scale)
        elif scale.dim() == 3 and family.location_scale is not None:
            with failures_named(f"{type(self.guide).__name__}.location_scale"):
                family.location_scale(loc, scale)
        else:
            return False
        return True

    def units(self) -> list[Tensor | float]:
        units: dict[str, Any] = _auto_normal_units(self.guide) if isinstance(self.guide, AutoNormal) else {}
        if (own_units := LocalFamily.of(self.guide).units) is not None:
            with failures_named(f"{type(self.guide).__name__}.units"):
                units = own_units()
        return [units.get(name, 1.0) for name in self.named]


class JoinedGuide:
    """A `LocalGuide` whose rows are those of several, `place (R,)` where each one's rows stand."""

    mean_field = False

    def __init__(self, joint: JointDensity, indices: Tensor, guides: list[tuple[LocalGuide, Tensor]]) -> None:
        self.joint, self.indices, self._guides = joint, indices, guides
        self._order = torch.cat([place for _, place in guides]).argsort()

    def sample(self, num_particles: int, antithetic: bool = False) -> Draws:
        draws = [guide.sample(num_particles, antithetic) for guide, _ in self._guides]
        return self._join([z for z, _ in draws]), self._join([log_q for _, log_q in draws])

    def log_prob(self, z: Tensor) -> Tensor:
        return self._join([guide.log_prob(z[:, place]) for guide, place in self._guides])

    def _join(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, 1)[:, self._order]


def _start_auto_normal(guide: AutoNormal, joint: JointDensity, loc: Tensor, scale: Tensor) -> None:
    inverse = transform_to(guide.scale_constraint).inv
    parameters = dict(guide.named_parameters())
    with torch.no_grad():
        for name, site in joint.sites.items():
            for target, flat in (("locs", loc), ("scales", inverse(scale.clamp(min=1e-6)))):
                parameter = parameters[f"{target}.{name}_unconstrained"]
                parameter.copy_(site.unflatten(flat).reshape(parameter.shape))


def _auto_normal_units(guide: AutoNormal) -> dict[str, Tensor]:
    """A natural step in a location is the standard deviation there."""
    parameters, positive = dict(guide.named_parameters()), transform_to(guide.scale_constraint)
    return {
        name: positive(parameters["scales" + name[len("locs") :]]).detach().clone()
        for name in parameters
        if name.startswith("locs.")
    }
