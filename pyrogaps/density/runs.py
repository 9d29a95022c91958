"""Run a caller's Pyro program and restore global state afterwards."""

import functools
import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from types import CodeType, FunctionType
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from pyro.params.param_store import ParamStoreDict
from torch import nn

from pyrogaps.errors import InputError

Program = Callable[..., Any]
# The calls of modules that run `forward`; messengers among the autoguides have a call of their own.
MODULE_CALLS = (nn.Module.__call__, PyroModule.__call__)
# Functions of these packages hold no modules of a caller. Of a list or dictionary that a program reads, and of those in
# it, so many values are looked at: every run of a program does this, and data may be nested lists of numbers.
LIBRARIES, MAX_VALUES = ("torch", "pyro", "numpy", "pyrogaps"), 256


class MisreadData(InputError):
    """What a program may do that reads its data in another form than they have."""


class RandomProgram(InputError):
    """A program that is random beyond its sample sites."""


def modules_of(program: Program) -> list[nn.Module]:
    """The torch modules that a program is, or that it reaches: as a method, in a closure, behind Pyro's handlers,
    partials and further functions of the caller's own.
    """
    found: dict[int, Any] = {}
    left: deque[Any] = deque([program])
    while left:
        candidate = left.popleft()
        if id(candidate) not in found:
            found[id(candidate)] = candidate
            left += _reached(candidate)
    return [candidate for candidate in found.values() if isinstance(candidate, nn.Module)]


def _reached(candidate: Any) -> list[Any]:
    """What a program, or a value that it reads, holds one step further; nothing of a module or of a library."""
    if isinstance(candidate, nn.Module | type) or _is_of_library(candidate):
        return []
    if isinstance(candidate, list | tuple | dict):
        return _callables(candidate)
    reached = [getattr(candidate, "__wrapped__", None)]
    if isinstance(candidate, functools.partial):  # what a handler makes of a program is one too
        reached += [candidate.func, *candidate.args, *candidate.keywords.values()]
    if inspect.ismethod(candidate):
        owner = candidate.__self__
        reached += [owner, candidate.__func__, *getattr(owner, "__dict__", {}).values()]
    elif inspect.isfunction(candidate):
        nonlocals = inspect.getclosurevars(candidate).nonlocals.values()
        reached += [*nonlocals, *globals_of(candidate).values(), *defaults_of(candidate)]
    elif callable(candidate):
        reached += getattr(candidate, "__dict__", {}).values()
    return reached


def globals_of(function: FunctionType) -> dict[str, Any]:
    """The globals that a function, or one that is defined within it, may read."""
    left, names = [function.__code__], set()
    for code in left:
        names |= set(code.co_names)
        left += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}


def defaults_of(function: FunctionType) -> list[Any]:
    """The default values of a function's arguments."""
    return [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _callables(container: list[Any] | tuple[Any, ...] | dict[Any, Any]) -> list[Any]:
    """What can be called among the first values of a container and of the containers in it, breadth first."""
    values: list[Any] = [container]
    for value in values:
        if isinstance(value, list | tuple | dict):
            held = value.values() if isinstance(value, dict) else value
            values += islice(held, MAX_VALUES - len(values))
    return [value for value in values if callable(value)]


def _is_of_library(candidate: Any) -> bool:
    """Whether a function is one of torch, Pyro or Python, which holds nothing of a caller's unless it wraps it."""
    package = str(getattr(candidate, "__module__", None)).partition(".")[0]
    plain = inspect.isfunction(candidate) and not candidate.__closure__
    return plain and (package in LIBRARIES or package in sys.stdlib_module_names)


def check_callable(program: Any, what: str, pair: str = "Pass its methods .model and .guide") -> None:
    """Refuse what Pyro cannot run, which `what` names; `pair` is the remedy for a pair of model and guide in one."""
    if inspect.isclass(program):
        raise InputError(f"{what}: {program.__name__} is a class. Pass an instance of it, {program.__name__}(...)")
    kind = type(program)
    empty = isinstance(program, nn.Module) and kind.forward is nn.Module.forward and kind.__call__ in MODULE_CALLS
    if empty or not callable(program):
        is_pair = callable(getattr(program, "model", None)) and callable(getattr(program, "guide", None))
        raise InputError(
            f"{what}: an object of {kind.__name__} cannot be called. {pair if is_pair else 'Pass a Pyro program'}"
        )


def _forget(store: ParamStoreDict, name: str) -> None:
    """Remove an entry of Pyro's store. `del` fails at the second of two entries that share a parameter."""
    parameter = store._params.pop(name)
    store._constraints.pop(name)
    if store._param_to_name.get(parameter) == name:
        del store._param_to_name[parameter]


@contextmanager
def evaluating(*programs: Program) -> Iterator[None]:
    """Evaluation mode for `programs`; restores train/eval modes, default dtype and validation setting.

    Parameters are read from the caller's own param store; entries that a program adds meanwhile are removed.
    """
    store = pyro.get_param_store()
    names = set(store.keys())
    modes = {module: module.training for program in programs for m in modules_of(program) for module in m.modules()}
    dtype = torch.get_default_dtype()
    try:
        with pyro.validation_enabled(False):
            for module in modes:
                module.training = False
            yield
    finally:
        torch.set_default_dtype(dtype)
        for module, mode in modes.items():
            module.training = mode
        for name in set(store.keys()) - names:
            _forget(store, name)
