"""Families: `family(model) -> guide`, instantiated for the datapoints of a chunk."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrogaps.density import JointDensity
from pyrogaps.density.data import HeldData, selected
from pyrogaps.density.plates import whole_plates
from pyrogaps.density.runs import evaluating
from pyrogaps.errors import InputError
from pyrogaps.guard import failures_named
from pyrogaps.run import Run

Family = Callable[..., Any]
_serial = count()


def instantiate(family: Family, joint: JointDensity, indices: Tensor) -> nn.Module:
    """`family(model)`, set up on the datapoints `indices`, with parameters of its own.

    A family with a parameter `plate` gets the data plate's name. Latents that are summed out are hidden from it.

    Raises `InputError` where it returns something other than a module.
    """
    takes_plate = joint.plate is not None and "plate" in _parameters(family)
    model = joint.model
    if joint.enumerated:  # these are summed out, and an autoguide refuses discrete sites
        model = poutine.block(model, hide=[*joint.enumerated])
    with failures_named(f"family {_name(family)}"):
        guide = family(model, plate=joint.plate) if takes_plate else family(model)
    if not isinstance(guide, nn.Module):
        raise InputError(
            f"family {_name(family)}: family(model) must return a guide that is an nn.Module (as autoguides are), "
            f"got {type(guide).__name__}"
        )
    if isinstance(guide, PyroModule):
        # Pyro's param store would hand this guide the parameters of any other of the same name.
        guide._pyro_set_supermodule(f"{type(guide).__name__}_{next(_serial)}", guide._pyro_context)
    args = joint.fetch(indices)
    held = joint.data.rows[indices] if isinstance(joint.data, HeldData) else None
    plates = whole_plates(joint.plate, indices, num_datapoints=len(indices), held=held)
    with plates, failures_named(f"guide of family {_name(family)}"):
        guide(*args)
    return guide


def is_family(candidate: Any) -> bool:
    """Whether `candidate` is a family rather than a guide: a class, a partial of one, or a callable of `model`."""
    if isinstance(candidate, functools.partial):
        return is_family(candidate.func)
    takes_model = inspect.isroutine(candidate) and _parameters(candidate)[:1] == ["model"]
    return inspect.isclass(candidate) or takes_model


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


def data_axes(family: Family, joint: JointDensity, run: Run) -> dict[str, int]:
    """The axis of datapoints in each of a family's parameters, found by setting it up on two and on three datapoints.

    Raises `InputError` for a parameter without one: datapoints would share it, so the family is not local.
    """
    if joint.plate is None:
        return {name: 0 for name, _ in instantiate_few(family, joint, 1, run).named_parameters()}
    two, three = (dict(instantiate_few(family, joint, n, run).named_parameters()) for n in (2, 3))
    axes = {}
    for name, value in two.items():
        other = three[name]
        differing = [axis for axis in range(value.dim()) if value.shape[axis] != other.shape[axis]]
        if value.dim() != other.dim() or len(differing) != 1:
            raise InputError(
                f"family {_name(family)}: parameter '{name}' is shared by datapoints, so the family is not local under "
                f"the data plate '{joint.plate}'. Use AutoNormal or AutoLocalMultivariateNormal"
            )
        axes[name] = differing[0]
    return axes


def instantiate_few(family: Family, joint: JointDensity, number: int, run: Run) -> nn.Module:
    """`family` set up on `number` datapoints, repeated where there are fewer."""
    with run.stream("family axes").seeded(), evaluating(joint.model):
        return instantiate(family, joint, torch.arange(number) % joint.num_datapoints)


def restrict(joint: JointDensity, indices: Tensor) -> JointDensity:
    """The density of the datapoints `indices` alone, counted from 0; no checks are run again."""
    if joint.plate is None:
        return joint
    return joint.over(selected(joint.data, indices))


def _name(family: Any) -> str:
    return getattr(family, "__name__", type(family).__name__)
