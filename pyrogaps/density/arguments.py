"""The arguments that a program takes, and data given by name."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from pyrogaps.density.runs import MODULE_CALLS, Program
from pyrogaps.errors import InputError

Parameter = inspect.Parameter
_BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Parameters:
    """The parameters of a program.

    Attributes:
        names: those that can be passed by position, in order.
        defaults: their defaults, by name; without those that have none.
        keyword_only: those that must be passed by keyword; without those that have a default.
        any_number: whether it takes `*args`.
        any_name: whether it takes `**kwargs`.
    """

    names: tuple[str, ...]
    defaults: dict[str, Any]
    keyword_only: tuple[str, ...]
    any_number: bool
    any_name: bool

    @property
    def required(self) -> tuple[str, ...]:
        """Those that have no default."""
        return tuple(name for name in self.names if name not in self.defaults)

    def take(self, number: int) -> bool:
        """Whether the program can be called with this number of positional arguments."""
        return len(self.required) <= number and (self.any_number or number <= len(self.names))


def parameters_of(program: Program) -> Parameters | None:
    """The parameters of `program`; None where they are not known."""
    declared = hasattr(program, "__signature__")
    if isinstance(program, nn.Module) and type(program).__call__ in MODULE_CALLS and not declared:
        program = program.forward
    try:
        parameters = inspect.signature(program).parameters.values()
    except (TypeError, ValueError):
        return None
    by_position = [parameter for parameter in parameters if parameter.kind in _BY_POSITION]
    return Parameters(
        names=tuple(parameter.name for parameter in by_position),
        defaults={p.name: p.default for p in by_position if p.default is not Parameter.empty},
        keyword_only=tuple(
            p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY and p.default is Parameter.empty
        ),
        any_number=any(p.kind is Parameter.VAR_POSITIONAL for p in parameters),
        any_name=any(p.kind is Parameter.VAR_KEYWORD for p in parameters),
    )


def names_filled(keys: Mapping[str, Any], taken: Parameters | None) -> tuple[str, ...] | None:
    """The model's parameters that data with these keys fill, by position; None where the model takes one dictionary.

    Raises `InputError` where neither fits.
    """
    if taken is None:
        return None
    unknown = [key for key in keys if key not in taken.names]
    if len(unknown) == len(keys) and not taken.any_name and not taken.keyword_only and taken.take(1):
        return None
    if taken.any_name or taken.keyword_only:
        what = f"'{taken.keyword_only[0]}' by keyword alone" if taken.keyword_only else "**kwargs"
        parameters = ", ".join(keys)
        raise InputError(
            f"data: a dictionary is passed by position, in the order of the model's parameters, but the model takes "
            f"{what}. Write its parameters out, as in def model({parameters})"
        )
    known = f"it takes {', '.join(taken.names)}" if taken.names else "it takes no arguments"
    if unknown:
        raise InputError(f"data: the model has no parameter '{unknown[0]}' ({known}). Leave it out of the dictionary")
    missing = [name for name in taken.required if name not in keys]
    if missing:
        raise InputError(f"data: the dictionary has no '{missing[0]}', which the model takes. Add it")
    last = max(taken.names.index(key) for key in keys)
    return taken.names[: last + 1]


def check_same_order(guide: Program, names: tuple[str, ...] | None) -> None:
    """Refuse a guide whose parameters differ from `names`, those of the model that data by name fill."""
    taken = None if names is None else parameters_of(guide)
    if names is None or taken is None or (taken.any_number and not taken.names):
        return
    if taken.names[: len(names)] != names:
        theirs = f"({', '.join(taken.names)})"
        raise InputError(
            f"guide: its parameters {theirs} are not the model's, ({', '.join(names)}), in whose order the data are "
            f"passed. Define the guide with the model's parameters, as in def guide({', '.join(names)})"
        )
