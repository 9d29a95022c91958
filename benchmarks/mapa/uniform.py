"""The posterior over datapoints that uses nothing: the baseline that MAPA must beat."""

import math

import torch

import pyrogaps as pg
from pyrogaps.density import Data, as_indexed


def uniform_posterior(data: Data, *, generator: torch.Generator | None = None) -> pg.MapaPosterior:
    """MAPA-naive: every datapoint explains every other equally well, q(i|x_n) = 1/N.

    Each row holds all N datapoints: the datapoint itself first, the others in a random order.
    """
    indexed = as_indexed(data)
    number = len(indexed)
    keys = torch.rand(number, number, generator=generator).fill_diagonal_(2.0)
    indices = keys.topk(number, dim=1).indices.int()
    return pg.MapaPosterior(indexed, indices, torch.full(indices.shape, -math.log(number), dtype=torch.float64))
