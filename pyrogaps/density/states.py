"""Discrete latents at given values, and the check that their enumeration agrees with the model run at these."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrogaps.density.discrete import Discrete
from pyrogaps.density.layout import distribution_mask


class SetStates(Messenger):
    """Sets every discrete latent to the values number `states[name]` `(R, *shape)`; masked elements to the first.

    Enter it inside a `ScoreModel`, in the place of `Enumerate`. `positions` holds the numbers as the model has them.
    """

    def __init__(self, discrete: Mapping[str, Discrete], states: Mapping[str, Tensor], *, drop_rows: bool) -> None:
        super().__init__()
        self.discrete, self.states, self.drop_rows = discrete, states, drop_rows
        self.positions: dict[str, Tensor] = {}

    def _pyro_sample(self, message: Any) -> None:
        name, fn = message["name"], message["fn"]
        site = self.discrete.get(name)
        if site is None or message["is_observed"]:
            return
        states = site.placed(self.states[name], drop_rows=self.drop_rows)
        value = site.values[states]
        keep = distribution_mask(fn, message["mask"])
        if keep is not None:
            value = torch.where(keep, value, site.values[0])
            states = site.number_of(value)
        message["value"], message["done"] = value, True
        self.positions[name] = states


def random_states(discrete: Mapping[str, Discrete], rows: int) -> dict[str, Tensor]:
    """Numbers of values, uniform, `(rows, *shape)` for every site."""
    return {
        name: torch.randint(site.cardinality, (rows, *site.shape), device=site.values.device)
        for name, site in discrete.items()
    }
