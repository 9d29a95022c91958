"""Probing that a row's density is its own: not that of its neighbours, of its position, or of the batch."""

from collections.abc import Callable

import torch
from torch import Tensor

CHECK_ROWS = 256
NUM_ALONE = 3


def probe_rows(num_datapoints: int) -> Tensor:
    """Some datapoints, out of order."""
    spread = torch.linspace(0, num_datapoints - 1, max(4, min(num_datapoints, CHECK_ROWS))).round().long()
    return spread[torch.randperm(len(spread))]


def rows_are_independent(log_density: Callable[[Tensor], Tensor], together: Tensor) -> bool:
    """Whether `log_density(positions)` stays the same for rows in another order, and for one beside itself.

    `together` is what it gives of all positions in order.
    """
    number = len(together)
    groups = [torch.randperm(number), *torch.randperm(number)[:NUM_ALONE, None].expand(-1, 2)]
    return all(same_density(together[group], log_density(group)) for group in groups)


def same_density(left: Tensor, right: Tensor) -> bool:
    """Whether two computations of the same log-densities agree but for rounding."""
    tolerance = 1e-8 if left.dtype == torch.float64 else 2e-3
    return torch.allclose(left, right, rtol=tolerance, atol=tolerance, equal_nan=True)
