"""Families: `family(model) -> guide`, instantiated for the datapoints of a chunk."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import transform_to

from pyrogaps.density import GuideDensity, IndexedData, JointDensity
from pyrogaps.density.local import LocalGuide
from pyrogaps.density.plates import whole_plates
from pyrogaps.density.runs import evaluating
from pyrogaps.errors import InputError
from pyrogaps.streams import seeded

Family = Callable[..., Any]
_serial = count()


def instantiate(family: Family, joint: JointDensity, indices: Tensor) -> nn.Module:
    """`family(model)`, set up on the datapoints `indices`, with parameters of its own.

    A family that takes `plate` is told the data plate's name.

    Raises `InputError` where it returns something other than a module.
    """
    takes_plate = joint.plate is not None and "plate" in _parameters(family)
    guide = family(joint.model, plate=joint.plate) if takes_plate else family(joint.model)
    if not isinstance(guide, nn.Module):
        raise InputError(
            f"family {_name(family)}: family(model) must return a guide that is an nn.Module (as autoguides are), "
            f"got {type(guide).__name__}"
        )
    if isinstance(guide, PyroModule):
        # Pyro's param store would hand this guide the parameters of any other of the same name.
        guide._pyro_set_supermodule(f"{type(guide).__name__}_{next(_serial)}", guide._pyro_context)
    args = joint.fetch(indices)
    with whole_plates(joint.plate, indices, num_datapoints=len(indices)):
        guide(*args)
    return guide


def is_family(candidate: Any) -> bool:
    """Whether `candidate` is a family rather than a guide: a class, a partial of one, or a function of `model`."""
    if isinstance(candidate, functools.partial):
        return is_family(candidate.func)
    return inspect.isclass(candidate) or (inspect.isfunction(candidate) and _parameters(candidate)[:1] == ["model"])


def _parameters(family: Any) -> list[str]:
    try:
        return list(inspect.signature(family).parameters)
    except (TypeError, ValueError):
        return []


@dataclass(frozen=True)
class Start:
    """A factorised Gaussian that a further family starts at: means and standard deviations `(B, dim)`.

    `fitted` says whether it is the best of its kind; some families, such as flows, need that.
    """

    loc: Tensor
    scale: Tensor
    fitted: bool


class FamilyGuide:
    """A guide of some family for the datapoints of a chunk; see `Refinable`."""

    def __init__(self, family: Family, joint: JointDensity, seed: int) -> None:
        self.joint = joint
        everything = torch.arange(joint.num_datapoints)
        with seeded(seed, "family"), evaluating(joint.model):
            self.guide = instantiate(family, joint, everything)
        self.density = GuideDensity(self.guide, None, joint)
        named = [(name, value) for name, value in self.guide.named_parameters() if value.requires_grad]
        axes = data_axes(family, joint, seed)
        self.parameters: list[Tensor] = [value for _, value in named]
        self.axes = [axes[name] for name, _ in named]
        self.units: list[Tensor | float] = [1.0] * len(named)

    def at(self, indices: Tensor) -> LocalGuide:
        return self.density.at(indices)

    def start_at(self, start: Start) -> None:
        """Start at a factorised Gaussian, or near it, where the guide can.

        `AutoNormal` can; another guide does if it has a method `start_at(loc, scale)`. A method `units()` that names
        parameters and natural steps for them is heeded.
        """
        if isinstance(self.guide, AutoNormal):
            _start_auto_normal(self.guide, self.joint, start.loc, start.scale)
        elif hasattr(self.guide, "start_at"):
            cast(Any, self.guide).start_at(start.loc, start.scale)
        self._take_units()

    def start_by(self, start_local: Callable[..., None]) -> None:
        """Start where `start_local(guide, *args)` puts the guide, given the model's arguments for its datapoints."""
        with evaluating(self.joint.model), torch.no_grad():
            start_local(self.guide, *self.joint.fetch(torch.arange(self.joint.num_datapoints)))
        self._take_units()

    def _take_units(self) -> None:
        units = _auto_normal_units(self.guide) if isinstance(self.guide, AutoNormal) else {}
        if hasattr(self.guide, "units"):
            units = cast(Any, self.guide).units()
        names = [name for name, value in self.guide.named_parameters() if value.requires_grad]
        self.units = [units.get(name, 1.0) for name in names]


def data_axes(family: Family, joint: JointDensity, seed: int) -> dict[str, int]:
    """The axis of datapoints in each of a family's parameters, found by setting it up on two and on three datapoints.

    Raises `InputError` for a parameter without one: datapoints would share it, so the family is not local.
    """
    if joint.plate is None:
        return {name: 0 for name, _ in instantiate_few(family, joint, 1, seed).named_parameters()}
    two, three = (dict(instantiate_few(family, joint, n, seed).named_parameters()) for n in (2, 3))
    axes = {}
    for name, value in two.items():
        other = three[name]
        differing = [axis for axis in range(value.dim()) if value.shape[axis] != other.shape[axis]]
        if value.dim() != other.dim() or len(differing) != 1:
            raise InputError(
                f"family {_name(family)}: parameter '{name}' is shared by datapoints, so the family is not local under "
                f"the data plate '{joint.plate}'; use AutoNormal or AutoLocalMultivariateNormal"
            )
        axes[name] = differing[0]
    return axes


def instantiate_few(family: Family, joint: JointDensity, number: int, seed: int) -> nn.Module:
    """`family` set up on `number` datapoints, repeated where there are fewer."""
    with seeded(seed, "family axes"), evaluating(joint.model):
        return instantiate(family, joint, torch.arange(number) % joint.num_datapoints)


def restrict(joint: JointDensity, indices: Tensor) -> JointDensity:
    """The density of the datapoints `indices` alone, counted from 0; no checks are run again."""
    if joint.plate is None:
        return joint
    return joint.over(IndexedData(len(indices), lambda some: joint.data.fetch(indices[some])))


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


def _name(family: Any) -> str:
    return getattr(family, "__name__", type(family).__name__)
