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
            handler = _ScoreSites(row[None], joint.structure)
            joint.scored_by(handler, joint.fetch(indices), indices)
            names |= handler.impossible | handler.impossible_factors()
    return names


class _ScoreSites(ScoreModel):
    """Also holds the names of the sites whose terms are not finite."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.impossible: set[str] = set()

    def impossible_factors(self) -> set[str]:
        """Names of the sites that no value of the discrete latents makes possible."""
        if self.factors is None:
            return set()
        held = self.factors.factors
        return {factor.message["name"] for factor in held if not bool(torch.isfinite(self.factors.best(factor)).all())}

    def _per_row(self, term: Tensor, message: Any) -> Tensor:
        total = super()._per_row(term, message)
        if not bool(torch.isfinite(total).all()):
            self.impossible.add(message["name"])
        return total
