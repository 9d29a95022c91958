"""Unlimited data from a frozen model, to train the best guide for it."""

from typing import Any

from torch import Tensor

from pyrogaps.bounds import Plate
from pyrogaps.density import Data, IndexedData, JointDensity
from pyrogaps.density.data import as_tuple, rows_of
from pyrogaps.density.runs import Program
from pyrogaps.density.simulate import ToData, one_run_suffices, simulate
from pyrogaps.errors import InputError
from pyrogaps.streams import seeded


class SimulatedData(IndexedData):
    """Datapoints drawn from the model anew every time they are fetched, in the shape of `data`.

    `train(model, guide, SimulatedData(model, data), freeze_model=True)` fits a guide to the model's own data without
    end: with enough capacity it approaches the best guide of its conditions, q*_C, from below. What is not drawn, such
    as the lengths of sequences, is that of `data`.

    Args:
        model, data, plate: as for `JointDensity`.
        num_datapoints: how many make an epoch; by default as many as there are in `data`.
        to_data: as for `JointDensity.simulate`.

    Raises:
        InputError: where the model cannot be simulated.
    """

    def __init__(
        self,
        model: Program,
        data: Data,
        num_datapoints: int | None = None,
        plate: Plate = None,
        to_data: ToData | None = None,
    ) -> None:
        joint = JointDensity(model, data, plate)
        if joint.plate is None:
            raise InputError("SimulatedData: the model has no data plate; simulate the one datapoint with JointDensity")
        number = joint.num_datapoints
        with seeded(0, "one run", device=joint.device):
            one_run = one_run_suffices(joint, to_data)
        fetched = 0

        def fetch(indices: Tensor) -> tuple[Any, ...]:
            nonlocal fetched
            fetched += 1
            # Re-scoring takes as long as drawing: after the first few times it is done ever more rarely.
            due = fetched & (fetched - 1) == 0
            rows = rows_of(as_tuple(joint.data.fetch(indices % number)), len(indices))
            return as_tuple(simulate(joint.over(rows), to_data, checked=one_run and not due)[0])

        super().__init__(number if num_datapoints is None else num_datapoints, fetch)
