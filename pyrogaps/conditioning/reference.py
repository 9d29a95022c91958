"""`reference_guide`: a guide as good as training can make it for a frozen model, to measure a lookahead's gap by."""

import copy
from pathlib import Path
from typing import Any

from torch import nn

from pyrogaps.conditioning.simulated import SimulatedData
from pyrogaps.density import Data
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.problem import Plate
from pyrogaps.training import train


def reference_guide(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_datapoints: int | None = None,
    plate: Plate = None,
    checkpoint: str | Path | None = None,
    **settings: Any,
) -> Program:
    r"""Train a copy of a guide on data drawn from the frozen model without end: the `reference` of `decompose`.

    Data that never come twice leave nothing to overfit, so that with enough capacity and steps it approaches the best
    guide of its conditions, for every factor of the guide its own C_t, on average over the model's data:

    $$q^*_C = \arg\max_{q \in Q} \mathbb E_{p(x)}[\mathcal L[q](x)]$$

    from below: what it falls short by is counted to the conditioning gap. Neither model nor guide are changed.

    Args:
        model, guide, data, plate: as for `decompose`; data are drawn in the shape of `data`, and sequences have its
            lengths. The guide is a module, of which the copy starts at the weights.
        num_datapoints: how many drawn datapoints make an epoch; by default as many as there are in `data`.
        checkpoint, settings: of `train`, all but `freeze_model`.

    Raises:
        InputError: for a guide that is not a module, a model that cannot be simulated, and settings that `train`
            refuses.
    """
    if not isinstance(guide, nn.Module):
        raise InputError(
            "guide: only a module can be copied, and this one is not; train another guide like it on "
            "SimulatedData(model, data), with freeze_model=True"
        )
    reference = copy.deepcopy(guide)
    drawn = SimulatedData(model, data, num_datapoints, plate)
    train(model, reference, drawn, freeze_model=True, checkpoint=checkpoint, **settings)
    return reference
