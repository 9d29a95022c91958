"""Programs with some of their sites set to given values."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrogaps.density.runs import Program


class SetSites(Messenger):
    """Sets sites to `values` and hides them from every handler outside: they are constants, and have no density."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] in self.values:
            message["value"] = self.values[message["name"]]
            message["done"] = message["stop"] = True


def given(program: Program, values: Mapping[str, Tensor]) -> Program:
    """`program` with its sites in `values` set to these: its density given them, without theirs."""
    values = dict(values)

    @functools.wraps(program, assigned=(), updated=())
    def conditioned(*args: Any, **kwargs: Any) -> Any:
        with SetSites(values):
            return program(*args, **kwargs)

    return conditioned


def original(program: Program) -> Program:
    """The program that was wrapped here, or in another such way; itself for any other."""
    return inspect.unwrap(program) if inspect.isfunction(program) else program
