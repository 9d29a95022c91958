"""Probing that a row's density is its own: not that of its neighbours, of its position, or of the batch."""

import torch
from torch import Tensor

CHECK_ROWS = 256


def probe_rows(num_datapoints: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Datapoints out of order, a random order of these rows, and that order cut into a few rows and the rest."""
    spread = torch.linspace(0, num_datapoints - 1, max(4, min(num_datapoints, CHECK_ROWS))).round().long()
    indices = spread[torch.randperm(len(spread))]
    order = torch.randperm(len(indices))
    return indices, order, [order[:3], order[3:]]


def same_density(left: Tensor, right: Tensor) -> bool:
    """Whether two computations of the same log-densities agree but for rounding."""
    tolerance = 1e-8 if left.dtype == torch.float64 else 2e-3
    return torch.allclose(left, right, rtol=tolerance, atol=tolerance, equal_nan=True)
