"""Unlimited data from a frozen model, to train the best guide for it."""

from typing import Any

from torch import Tensor

from pyrogaps.density import Data, IndexedData, JointDensity
from pyrogaps.density.data import rows_of
from pyrogaps.density.runs import Program
from pyrogaps.density.shared import datapoints_needed
from pyrogaps.density.simulate import ToData, simulated_arguments
from pyrogaps.errors import InputError
from pyrogaps.guard import guarded
from pyrogaps.settings import Count, Plate, checked

WHOLE_REMEDY = "Draw whole data sets with Problem.of(model, None, data, False).simulated(seed).data"


@checked("SimulatedData")
class SimulatedData(IndexedData):
    """Datapoints drawn from the model anew at every fetch, in the shape of `data`.

    `train(model, guide, SimulatedData(model, data), freeze_model=True)` fits a guide to unlimited data from the
    model: with enough capacity it approaches the best guide with its conditions, q*_C, from below. Quantities that the
    model does not draw, such as the lengths of sequences, are those of `data`.

    Args:
        model, data, plate: as for `JointDensity`.
        num_datapoints: number of datapoints per epoch; by default the number in `data`.
        to_data: from the sites' values, by name, to the model's arguments; see `density.simulate.simulate`.

    Raises:
        InputError: where the model cannot be simulated.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> drawn = pg.SimulatedData(model, x, num_datapoints=1000)
        >>> drawn.fetch(torch.arange(5))[0].shape
        torch.Size([5, 4])
    """

    @guarded
    def __init__(
        self,
        model: Program,
        data: Data,
        num_datapoints: Count | None = None,
        plate: Plate = None,
        to_data: ToData | None = None,
    ) -> None:
        with datapoints_needed(f"SimulatedData draws datapoints. {WHOLE_REMEDY}"):
            joint = JointDensity(model, data, plate)
        if joint.plate is None:
            raise InputError(f"SimulatedData: the model has no data plate. {WHOLE_REMEDY}")
        number = joint.num_datapoints

        def fetch(indices: Tensor) -> tuple[Any, ...]:
            rows = rows_of(joint.data.fetch(indices % number), len(indices), joint.data)
            return simulated_arguments(joint.over(rows), to_data)[0]

        super().__init__(number if num_datapoints is None else num_datapoints, fetch)
