"""Check that rows of a batch are independent."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyrogaps.errors import InputError
from pyrogaps.guard import ProgramError

PAD_REMEDY = "Pad ragged data to one length for the whole data set and mask the padding"
CHECK_ROWS = 256
NUM_ALONE = 3


def probe_rows(num_datapoints: int) -> Tensor:
    """Evenly spaced datapoints in random order.

    Their number is never that of all datapoints, so that a plate of the data set's full size shows.
    """
    number = max(4, min(num_datapoints, CHECK_ROWS))
    spread = torch.linspace(0, num_datapoints - 1, number + (number == num_datapoints)).round().long()
    return spread[torch.randperm(len(spread))]


def rows_are_independent(log_density: Callable[[Tensor], Tensor], together: Tensor) -> bool:
    """Whether `log_density(positions)` is the same for reordered rows and for a row paired with itself.

    `together` is its value at all positions, in order. Raises `InputError` where a program fails on some rows.
    """
    number = len(together)
    groups = [torch.randperm(number), *torch.randperm(number)[:NUM_ALONE, None].expand(-1, 2)]
    try:
        return all(same_density(together[group], log_density(group)) for group in groups)
    except ProgramError as error:
        raise InputError(
            f"{error}. It failed on some of the rows that it had run on together: do not trim a batch to its longest "
            f"sequence, but {PAD_REMEDY}"
        ) from error


def same_density(left: Tensor, right: Tensor) -> bool:
    """Whether two computations of the same log-densities agree up to rounding."""
    tolerance = 1e-8 if left.dtype == torch.float64 else 2e-3
    return torch.allclose(left, right, rtol=tolerance, atol=tolerance, equal_nan=True)
