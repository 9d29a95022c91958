"""`Part`: any callable, such as an encoder or a guide, as a module that holds the modules which it reaches."""

import copy
import functools
import inspect
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyrogaps.density.runs import globals_of, modules_of
from pyrogaps.errors import InputError
from pyrogaps.guard import failures_named


class Part(nn.Module):
    """A callable of a user's, called `name` in messages.

    The modules that it is or reaches, as a method, in a closure or among the globals of a function, are registered, so
    that their parameters are those of the model or the guide, and evaluation mode reaches them. A deep copy has its own
    copies of them, of which the copied callable is made.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        super().__init__()
        if inspect.isclass(function) and issubclass(function, nn.Module):
            raise InputError(
                f"{name}: {function.__name__} is a class. Pass an instance of it, {function.__name__}(...)"
            )
        if isinstance(function, nn.Module) and type(function).forward is nn.Module.forward:
            raise InputError(
                f"{name}: {type(function).__name__} has no forward. Pass a method of it that is called, or a function"
            )
        self.name = name
        self.net = function if isinstance(function, nn.Module) else None
        self.reached = nn.ModuleList([] if self.net is not None else modules_of(function))
        self.function = None if self.net is not None else function

    def forward(self, *args: Any) -> Any:
        with failures_named(self.name):
            return self.net(*args) if self.function is None else self.function(*args)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Part":
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        state = {name: value for name, value in vars(self).items() if name != "function"}
        vars(other).update(copy.deepcopy(state, memo))
        vars(other)["function"] = _copied(self.function, memo)
        return other


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy of what a callable holds; functions that reach modules are made anew, of copies of these."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, functools.partial):
        return _copied_partial(value, memo)
    if inspect.isfunction(value):
        return _copied_function(value, memo) if modules_of(value) else value
    if type(value) in (list, tuple, dict):
        return _copied_container(value, memo) if modules_of(value) else value
    holds = isinstance(value, nn.Module) or isinstance(getattr(value, "__self__", None), nn.Module)
    return copy.deepcopy(value, memo) if holds or (callable(value) and modules_of(value)) else value


def _copied_container(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item, memo) for key, item in value.items()}
    return type(value)(_copied(item, memo) for item in value)


def _copied_partial(value: functools.partial[Any], memo: dict[int, Any]) -> functools.partial[Any]:
    """A partial of copies. What a handler of Pyro makes of a program is one of a class of its own, around another."""
    if type(value) is not functools.partial:
        return type(value)(_copied(value.func, memo))
    args = [_copied(item, memo) for item in value.args]
    keywords = {name: _copied(item, memo) for name, item in value.keywords.items()}
    return functools.partial(_copied(value.func, memo), *args, **keywords)


def _copied_function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    variables = dict(function.__globals__)
    cells = tuple(CellType() for _ in function.__closure__ or ())
    made = FunctionType(function.__code__, variables, function.__name__, None, cells)
    memo[id(function)] = made  # before what it reaches, which may reach it
    made.__defaults__ = _copied(function.__defaults__, memo)
    made.__kwdefaults__ = _copied(function.__kwdefaults__, memo)
    variables.update({name: _copied(value, memo) for name, value in globals_of(function).items()})
    for cell, before in zip(cells, function.__closure__ or (), strict=True):
        cell.cell_contents = _copied(before.cell_contents, memo)
    return made


def recording() -> bool:
    """Whether operations are being recorded, so that values cannot be looked at."""
    return get_proxy_mode() is not None or torch.compiler.is_compiling()
