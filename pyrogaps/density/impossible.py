"""Which sites of a model have no finite log-density at given points."""

from typing import Any

import torch
from torch import Tensor

from pyrogaps.density.joint import JointDensity
from pyrogaps.density.runs import evaluating
from pyrogaps.density.score import ScoreModel


def impossible_sites(joint: JointDensity, z: Tensor, index: int) -> set[str]:
    """Names of the sites whose log-density is NaN or infinite at a point of `z` `(S, dim)`, for one datapoint."""
    names: set[str] = set()
    with evaluating(joint.model), torch.no_grad():
        for row in z:  # one at a time, as a model without a plate takes them
            indices = torch.tensor([index])
            handler = _ScoreSites(joint.sites, joint.plate, row[None], vectorized=joint.structure.vectorized)
            with joint.plates(indices), handler:
                joint.model(*joint.fetch(indices))
            names |= handler.impossible
    return names


class _ScoreSites(ScoreModel):
    """Also holds the names of the sites whose terms are not finite."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.impossible: set[str] = set()

    def _per_row(self, term: Tensor, message: Any) -> Tensor:
        total = super()._per_row(term, message)
        if not bool(torch.isfinite(total).all()):
            self.impossible.add(message["name"])
        return total
