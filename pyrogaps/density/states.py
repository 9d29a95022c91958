"""Discrete latents at given values, and the check that their enumeration agrees with the model run at these."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrogaps.density.discrete import Discrete
from pyrogaps.density.samplers import exact


class SetStates(Messenger):
    """Sets every discrete latent to the values number `states[name]` `(R, *shape)`, as if they were observed.

    Enter it inside a `ScoreModel`, in the place of `Enumerate`. `positions` holds the numbers as the model has them.
    """

    def __init__(self, discrete: Mapping[str, Discrete], states: Mapping[str, Tensor], *, drop_rows: bool) -> None:
        super().__init__()
        self.discrete, self.states, self.drop_rows = discrete, states, drop_rows
        self.positions: dict[str, Tensor] = {}

    def _pyro_sample(self, message: Any) -> None:
        name = message["name"]
        site = self.discrete.get(name)
        if site is None or message["is_observed"]:
            return
        value = site.values[site.placed(self.states[name], drop_rows=self.drop_rows)]
        message["value"], message["done"], message["is_observed"] = value, True, True
        self.positions[name] = site.number_of(value)


class DrawStates(Messenger):
    """Draws every discrete latent, whether it is masked or not."""

    def __init__(self, discrete: Mapping[str, Discrete]) -> None:
        super().__init__()
        self.discrete = discrete

    def _pyro_sample(self, message: Any) -> None:
        site = self.discrete.get(message["name"])
        if site is not None and not message["is_observed"] and not message["done"]:
            message["value"] = exact(message["fn"]).sample()
            message["done"] = True


def random_states(discrete: Mapping[str, Discrete], rows: int) -> dict[str, Tensor]:
    """Numbers of values, uniform, `(rows, *shape)` for every site."""
    return {
        name: torch.randint(site.cardinality, (rows, *site.shape), device=site.values.device)
        for name, site in discrete.items()
    }
