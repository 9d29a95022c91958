"""Programs with some of their sites set to given values."""

import functools
import inspect
from collections.abc import Collection, Mapping
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrogaps.density.runs import Program


class SetSites(Messenger):
    """Sets sites to `values` and hides them from every handler outside: they are constants, and have no density.

    Those in `scored` are observed at their values instead, so that their density counts.
    """

    def __init__(self, values: Mapping[str, Tensor], scored: Collection[str] = ()) -> None:
        super().__init__()
        self.values, self.scored = values, scored

    def _pyro_sample(self, message: Any) -> None:
        name = message["name"]
        if name not in self.values:
            return
        message["value"], message["done"] = self.values[name], True
        if name in self.scored:
            message["is_observed"] = True
        else:
            message["stop"] = True


class ReplaySites(Messenger):
    """Sets sites to `values`, as if they had been drawn: their density counts as it does for draws."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] in self.values:
            message["value"], message["done"] = self.values[message["name"]], True


class HideSites(Messenger):
    """Hides sites from every handler outside; they are drawn."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, message: Any) -> None:
        message["stop"] = message["stop"] or message["name"] in self.names


def given(program: Program, values: Mapping[str, Tensor]) -> Program:
    """`program` with its sites in `values` set to these: its density given them, without theirs."""
    return under(SetSites(dict(values)), program)


def under(handler: Messenger, program: Program) -> Program:
    """`program` run inside a handler."""

    @functools.wraps(program, assigned=(), updated=())
    def handled(*args: Any, **kwargs: Any) -> Any:
        with handler:
            return program(*args, **kwargs)

    return handled


def original(program: Program) -> Program:
    """The program that was wrapped here, or in another such way; itself for any other."""
    return inspect.unwrap(program) if inspect.isfunction(program) else program
