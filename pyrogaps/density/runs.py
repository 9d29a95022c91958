"""Run a caller's Pyro program and restore global state afterwards."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import nn

from pyrogaps.errors import InputError

Program = Callable[..., Any]
# The calls of modules that run `forward`; messengers among the autoguides have a call of their own.
MODULE_CALLS = (nn.Module.__call__, PyroModule.__call__)


class MisreadData(InputError):
    """What a program may do that reads its data in another form than they have."""


class RandomProgram(InputError):
    """A program that is random beyond its sample sites."""


def modules_of(program: Program) -> list[nn.Module]:
    """The torch modules that a program is, is a method of, or closes over; also behind Pyro's handlers and partials."""
    candidates: list[Any] = []
    while not isinstance(program, nn.Module):
        if isinstance(program, functools.partial):  # what a handler makes of a program is one too
            candidates += [*program.args, *program.keywords.values()]
        if hasattr(program, "__wrapped__"):
            program = program.__wrapped__
        elif isinstance(program, functools.partial):
            program = program.func
        else:
            break
    candidates += [program, getattr(program, "__self__", None)]
    function = getattr(program, "__func__", program)
    if inspect.isfunction(function):
        variables = inspect.getclosurevars(function)
        candidates += [*variables.nonlocals.values(), *variables.globals.values()]
    return [candidate for candidate in candidates if isinstance(candidate, nn.Module)]


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
            del store[name]
