"""Data drawn from the model, in the shape of the data at hand."""

import torch
from torch import Tensor

from pyrogaps.density import IndexedData, JointDensity
from pyrogaps.density.data import evenly_spaced, rows_of, selected
from pyrogaps.density.simulate import ToData, simulated_arguments
from pyrogaps.streams import Stream


def simulated_data(
    joint: JointDensity, number: int, stream: Stream, to_data: ToData | None
) -> tuple[IndexedData, Tensor]:
    """`number` datapoints from the model, and the latents `(number, dim)` behind them: an exact posterior draw each.

    Quantities that are not drawn, such as the lengths of sequences, are those of evenly spaced datapoints of `joint`,
    or of all datapoints in turn where `number` is larger.

    Raises `InputError` where the model cannot be simulated.
    """
    available = joint.num_datapoints
    chosen = evenly_spaced(available, number) if number <= available else torch.arange(number) % available
    shape = joint.over(selected(joint.data, chosen))
    with stream.seeded(device=joint.device):
        drawn, z = simulated_arguments(shape, to_data)
    return rows_of(drawn, number, joint.data), z
