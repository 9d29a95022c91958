"""`reference_guide`: a reference for the conditioning gap of a lookahead, trained on simulated data."""

from dataclasses import replace
from typing import Any

from torch import nn

from pyrogaps.conditioning.simulated import SimulatedData
from pyrogaps.density import Data
from pyrogaps.density.copies import as_module, copied
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.guard import guarded
from pyrogaps.settings import Count, File, Plate, checked, checked_arguments
from pyrogaps.training import Training, rehearse_training, section_named, train


@guarded
@checked()
def reference_guide(
    model: Program,
    guide: Program,
    data: Data,
    *,
    num_datapoints: Count | None = None,
    plate: Plate = None,
    checkpoint: File | None = None,
    **settings: Any,
) -> Program:
    r"""Train a copy of a guide on unlimited data from the frozen model: the `reference` of `decompose`.

    Data that never repeat cannot be overfitted, so with enough capacity and steps the copy approaches the best guide
    with its conditions (each factor of the guide has its own C_t), on average over the model's data:

    $$q^*_C = \arg\max_{q \in Q} \mathbb E_{p(x)}[\mathcal L[q](x)]$$

    from below: what it falls short of that is counted as conditioning gap. Model and guide are not changed.

    Args:
        model, guide, data, plate: as for `decompose`; data are drawn in the shape of `data`, and sequences have its
            lengths. The guide is a module, or a method or function that uses modules; the copy starts from its weights.
        num_datapoints: number of datapoints drawn per epoch; by default the number in `data`.
        checkpoint, settings: as for `train`, except `freeze_model`.

    Raises:
        InputError: for a guide without parameters of modules, a model that cannot be simulated, and settings that
            `train` refuses.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.models.state_space import LinearGaussianStateSpace
        >>> from pyrogaps.guides.sequential import StructuredNormal
        >>> model, guide = LinearGaussianStateSpace(1, 1, 1, 1, 1), StructuredNormal(1, 1, 4, lookahead=0)
        >>> pg.reference_guide(model, guide, torch.randn(8, 3, 1), num_epochs=1, progress=False).lookahead
        0
    """
    module = as_module(guide)
    if module is None:
        raise InputError(
            "guide: no module with trainable parameters was found in it, so the reference cannot be a copy of it. "
            "Instead, train a second guide on SimulatedData(model, data) with freeze_model=True"
        )
    settings = checked_arguments(train, settings)
    reference = copied(module)
    drawn = SimulatedData(model, data, num_datapoints, plate)
    train(model, reference, drawn, freeze_model=True, checkpoint=checkpoint, **settings)
    return reference


def rehearse_reference(model: Program, guide: nn.Module, drawn: SimulatedData, settings: Training, seed: int) -> None:
    """Raise what `reference_guide` would raise at its first loss, on data that are `drawn` from the model."""
    with section_named("reference"):
        rehearse_training(model, copied(guide), drawn, None, replace(settings, freeze_model=True), seed)
