"""Copies of guides to train, with parameters of their own."""

import copy
import functools
from typing import Any, cast

import pyro
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import nn

from pyrogaps.density.autoguides import autoguides_within
from pyrogaps.density.parts import Part
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError


def as_module(guide: Program) -> nn.Module | None:
    """The guide as a module of which copies can be trained; None for a callable that reaches no such parameters."""
    if isinstance(guide, nn.Module):
        return guide
    part = Part("guide", guide)
    return part if any(value.requires_grad for value in part.parameters()) else None


def copied(guide: nn.Module) -> nn.Module:
    """A deep copy that never reads or changes Pyro's parameter store, where the names are those of the original.

    The store would give a `PyroModule` the original's parameters in place of its own, and `pyro.module` would enter
    those of the copy. The models of autoguides, which Pyro takes from the original when it is copied, are kept in both.
    """
    before = [(part._model, part.master) for part in autoguides_within(guide)]
    try:
        other = copy.deepcopy(guide)
    except RuntimeError as error:  # torch's own for tensors that are computed, such as those of the old weight_norm
        raise InputError(
            f"guide: no copy of it can be made to train ({str(error).splitlines()[0]}). Hold only parameters and "
            "modules in it; normalise weights by torch.nn.utils.parametrizations, not by torch.nn.utils.weight_norm"
        ) from error
    finally:
        for part, (model, master) in zip(autoguides_within(guide), before, strict=True):
            vars(part).update(_model=model, master=master)
    for part, (model, _) in zip(autoguides_within(other), before, strict=True):
        vars(part).update(_model=model)
    for part in other.modules():
        if isinstance(part, PyroModule):  # Pyro makes this only where parameters were local already
            vars(part._pyro_context).setdefault("param_state", {"params": {}, "constraints": {}})
    if not isinstance(other, _Copy):
        # A subclass, so that the copy is still all that the library asks of a guide.
        kind: Any = type(guide)
        other.__class__ = _copies_of(kind)
    return other


def check_own(guide: Program, total: Any) -> None:
    """Refuse a copy of which `total`, a sum of its draws and log densities, depends on parameters it does not hold."""
    if not isinstance(guide, _Copy):
        return
    own = {id(value) for value in cast(nn.Module, guide).parameters()}
    left, seen = [getattr(total, "grad_fn", None)], set()
    for node in left:
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in own:
            raise InputError(
                f"guide: a parameter of shape {tuple(leaf.shape)} belongs to a module that was not found in it, so a "
                "copy cannot train it. Write the guide as an nn.Module that has all its networks as attributes, or "
                "freeze the parameter by requires_grad_(False)"
            )
        left += [following for following, _ in node.next_functions]


class _Copy:
    """What the class of a copy has beside that of the original."""


@functools.cache
def _copies_of(kind: Any) -> Any:
    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with pyro.settings.context(module_local_params=True), _OwnParameters(self):
            return kind.forward(self, *args, **kwargs)

    members = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind)(kind.__name__, (kind, _Copy), members)


class _OwnParameters(Messenger):
    """Parameters of a module as they are in it, whatever Pyro's store holds under their names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module
        self._own = {id(value) for value in module.parameters()}

    def _pyro_param(self, message: Any) -> None:
        given = message["args"][1] if len(message["args"]) > 1 else None
        if id(given) in self._own:
            message.update(value=given, done=True, stop=True)
        elif not self._is_of_a_pyro_module(message["name"]):
            raise InputError(
                f"guide: '{message['name']}' is a pyro.param, which copies of the guide would share. Make it a "
                "parameter of a module that the guide uses"
            )

    def _is_of_a_pyro_module(self, name: str) -> bool:
        """Whether a module gives this parameter itself, as `module_local_params` has it."""
        parts = (part for part in self._module.modules() if isinstance(part, PyroModule) and part._pyro_context.used)
        return any(
            name == part._pyro_get_fullname(own) for part in parts for own in (*part._pyro_params, *part._parameters)
        )
