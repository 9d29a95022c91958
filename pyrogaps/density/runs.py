"""Run a caller's Pyro program and restore global state afterwards."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import nn

Program = Callable[..., Any]


def modules_of(program: Program) -> list[nn.Module]:
    """The torch modules that a program is, is a method of, or closes over."""
    program = inspect.unwrap(program) if inspect.isfunction(program) else program
    candidates: list[Any] = [program, getattr(program, "__self__", None)]
    function = getattr(program, "__func__", program)
    if inspect.isfunction(function):
        variables = inspect.getclosurevars(function)
        candidates += [*variables.nonlocals.values(), *variables.globals.values()]
    return [candidate for candidate in candidates if isinstance(candidate, nn.Module)]


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
