"""log p(x_n, y, z) of a model at chosen states y of its discrete latents."""

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyrogaps.density.data import IndexedData
from pyrogaps.density.discrete import Discrete
from pyrogaps.density.joint import JointDensity
from pyrogaps.density.state_numbers import joint_states
from pyrogaps.density.states import SetStates


class DensityAtStates(JointDensity):
    """The density of pairs of a datapoint and a state y, which take the place of datapoints; nothing is summed out.

    Args:
        joint: the density with discrete latents summed out.
        owners: `(M,)`, the datapoint of each pair.
        states: the number of each site's value, `(M, *shape)`, by site.
    """

    def __init__(self, joint: JointDensity, owners: Tensor, states: Mapping[str, Tensor]) -> None:
        sites, structure = joint.enumerated, replace(joint.structure, enumerated={})
        drop_rows = joint.plate is None and not structure.vectorized

        def at_states(*args: Any) -> Any:
            *own, numbers = args
            with SetStates(sites, dict(zip(sites, numbers, strict=True)), drop_rows=drop_rows):
                return joint.model(*own)

        def fetch(pairs: Tensor) -> tuple[Any, ...]:
            numbers = tuple(states[name][pairs.to(states[name].device)] for name in sites)
            return (*joint.data.fetch(owners[pairs]), numbers)

        functools.update_wrapper(at_states, joint.model, assigned=(), updated=())  # where parameters are looked for
        super().__init__(at_states, joint.data, structure=structure)
        self._whole, self._owners = joint, owners
        self.data = IndexedData(len(owners), fetch)

    def plates(self, indices: Tensor) -> AbstractContextManager[None]:
        return self._whole.plates(self._owners[indices])


def num_states(sites: Mapping[str, Discrete]) -> float:
    """The number of joint states of the discrete latents of one datapoint; infinite where it is beyond counting."""
    total = sum(site.log_states for site in sites.values())
    return float(torch.tensor(total, dtype=torch.float64).exp().round())


def all_states(sites: Mapping[str, Discrete]) -> dict[str, Tensor]:
    """All J joint states of one datapoint: numbers of each site's values, `(J, *shape)`."""
    table = joint_states([site.cardinality for site in sites.values() for _ in range(_elements(site))])
    states, start = {}, 0
    for name, site in sites.items():
        stop = start + _elements(site)
        states[name] = table[:, start:stop].reshape(-1, *site.shape).to(site.values.device)
        start = stop
    return states


def _elements(site: Discrete) -> int:
    return int(torch.Size(site.shape).numel())
