"""Point estimates: latents that a guide sets to values, as Deltas without a density do.

Model and guide are conditioned on the values. Those of latents inside the data plate differ between datapoints: they
are computed once, and are arguments of the model from then on, as the data are.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrogaps.density.data import IndexedData
from pyrogaps.density.forms import Given
from pyrogaps.density.given import SetSites
from pyrogaps.density.remarks import quoted
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError, counted


@dataclass(frozen=True)
class PointEstimates:
    """Values of some latents, by site.

    Attributes:
        constants: values that every datapoint shares.
        values: values `(N, ...)` of latents inside the data plate.
        axes: where the axis of datapoints belongs in the values of these latents, from the right (negative).
        scored: latents whose density depends on other latents of the model. They count as observed at their values.
        stated: remarks on log-densities that the Deltas state, which are left out of log q.
    """

    constants: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    axes: Mapping[str, int]
    scored: frozenset[str] = frozenset()
    stated: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """The latents' names."""
        return [*self.constants, *self.values]

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a density given these values is of."""
        remarks = []
        for names, meaning in (
            ([n for n in self.names if n not in self.scored], "without the prior there"),
            ([n for n in self.names if n in self.scored], "with their density, which depends on other latents"),
        ):
            if names:
                s = "its point estimate" if len(names) == 1 else "their point estimates"
                remarks.append(f"given {quoted(names)} at {s}: log p(x) is conditional on the values, {meaning}")
        return *remarks, *self.stated

    def split(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
        """The arguments of the caller's own model, and the values by site, from those of the `conditioned` one."""
        number = len(args) - len(self.values)
        local = {
            name: value.movedim(0, self.axes[name]) for name, value in zip(self.values, args[number:], strict=True)
        }
        return args[:number], {**self.constants, **local}

    def conditioned(self, program: Program) -> Program:
        """`program` given these values; those of the datapoints at hand are its last arguments."""

        @functools.wraps(program, assigned=(), updated=())
        def conditioned(*args: Any, **kwargs: Any) -> Any:
            own, values = self.split(args)
            with SetSites(values, self.scored):
                return program(*own, **kwargs)

        return conditioned

    def beside(self, data: Given) -> Given:
        """`data` with the values of the datapoints as last arguments."""
        if not self.values:
            return data
        values = [*self.values.values()]

        def fetched() -> IndexedData:
            indexed = data.indexed()
            if len(values[0]) != len(indexed):
                raise InputError(
                    f"guide: it has point estimates for {counted(len(values[0]), 'datapoint')}, but the data have "
                    f"{len(indexed)}. Pass the data that it was refined on"
                )

            def fetch(indices: Tensor) -> tuple[Any, ...]:
                return *indexed.fetch(indices), *(value[indices.to(value.device)] for value in values)

            return IndexedData(indexed.num_datapoints, fetch)

        def everything() -> tuple[Any, ...]:
            return *data.everything(), *values

        return replace(data, everything=everything, indexed=fetched, in_memory=None)

    def without(self, data: IndexedData) -> IndexedData:
        """The caller's own data, from those of `beside`."""
        number = len(self.values)
        return IndexedData(len(data), lambda indices: data.fetch(indices)[:-number]) if number else data


def same_values(left: Tensor, right: Tensor) -> bool:
    """Whether two runs gave a site the same values."""
    return left.shape == right.shape and torch.equal(torch.nan_to_num(left), torch.nan_to_num(right))
