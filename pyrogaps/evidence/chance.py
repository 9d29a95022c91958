"""Datapoints that may be reliable by chance alone."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# Of datapoints whose weights mislead, a few pass every check: up to one in two hundred in tests/test_reliable.py.
MIN_SHARE = 0.05

Flags = TypeVar("Flags", Tensor, NDArray[np.bool_])


def by_chance(reliable: Flags) -> Flags:
    """Where a datapoint is `reliable`, `(N,)`, but fewer than 1 in 20 of all are.

    Where nearly all fail, the few that pass are those whose draws happened to look even.
    """
    few = bool(reliable.sum() < MIN_SHARE * len(reliable))
    return reliable if few else reliable & False
