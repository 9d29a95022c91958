"""log p(x) where every latent is discrete and summed out: it is the density itself."""

import math

import torch

from pyrogaps.evidence.climb import COLUMNS, SAMPLING, Climbed
from pyrogaps.log_weights import rounding_error
from pyrogaps.problem import Problem
from pyrogaps.streams import PARTICLE_BLOCK, Chunk


def exactly(problem: Problem, block: Chunk) -> Climbed:
    """log p(x_n) of a block of datapoints without continuous latents, in the form of a climb.

    The one point of their space has weight p(x): all draws are the same, and the error is that of rounding.
    """
    nowhere = problem.joint.zeros(len(block))[None]
    with torch.no_grad():
        value = problem.joint(nowhere, block.indices)[0].double()
    weights = value.expand(PARTICLE_BLOCK, -1)
    columns = {name: torch.zeros(len(block), dtype=torch.float64) for name in COLUMNS}
    columns["method"] = torch.full((len(block),), SAMPLING)
    columns["evaluations"] = torch.ones(len(block), dtype=torch.long)
    columns["temperatures"] = torch.zeros(len(block), dtype=torch.long)
    columns["acceptance"] = torch.full((len(block),), math.nan, dtype=torch.float64)
    columns["upper"], columns["vouched"] = value.cpu(), torch.ones(len(block), dtype=torch.bool)
    columns["rounding"] = rounding_error(weights.to(problem.joint.dtype)).cpu()
    return Climbed(list(weights.T), columns)
