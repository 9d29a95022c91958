"""Where log p(x) can be trusted: the column that every evidence has, and how many datapoints a verdict needs."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pyrogaps.errors import counted

if TYPE_CHECKING:
    import xarray as xr  # takes longer to load than all of the rest

RELIABLE, DOUBTED = "log_evidence_reliable", "log_evidence_doubted"
# An attribute of the column, which is False everywhere, where the evidence does not say when its error can be trusted.
STATUS, NOT_EXAMINED = "status", "not examined"
UNEXAMINED = (
    "the reliability of log p(x) was not examined, because this evidence does not say where its error can be trusted. "
    "Use evidence=Ladder() to examine it"
)
# The share of the datapoints that need not be trusted for a verdict on their mean.
MAX_SHARE_UNRELIABLE = 0.1
# Of datapoints whose weights mislead, a few pass every check: up to one in two hundred in tests/test_reliable.py.
MIN_SHARE_RELIABLE = 0.05

Flags = TypeVar("Flags", Tensor, NDArray[np.bool_])


def enough_trusted(trusted: int, number: int) -> bool:
    """Whether so many trusted datapoints, of `number`, are enough for a verdict on their mean: nine in ten."""
    return trusted > 0 and number - trusted <= MAX_SHARE_UNRELIABLE * number


def is_exact(direction: str) -> bool:
    """Whether an estimator of this direction has no error but rounding."""
    return direction.startswith("exact")


def reliability_of(columns: Mapping[str, Any], direction: str) -> Any:
    """Where an evidence with these columns is reliable, `(B,)`; None where that is not examined.

    It says so itself, or it is exact, and then reliable where it is finite.
    """
    if RELIABLE in columns or not is_exact(direction):
        return columns.get(RELIABLE)
    return abs(columns["log_evidence"]) + columns["log_evidence_mcse"] < math.inf


def is_examined(dataset: "xr.Dataset") -> bool:
    """Whether the columns of a ledger say where log p(x) can be trusted."""
    return RELIABLE in dataset and dataset[RELIABLE].attrs.get(STATUS) != NOT_EXAMINED


def reliability_notes(dataset: "xr.Dataset", direction: str, of: str = "") -> list[str]:
    """A line on how many datapoints have a reliable log p(x); none where it is exact at all of them."""
    if not is_examined(dataset):
        return [UNEXAMINED]
    number, reliable = dataset[RELIABLE].size, int(dataset[RELIABLE].values.sum())
    if is_exact(direction) and reliable == number:
        return []
    return [f"log p(x) is reliable for {reliable:,} of {of}{counted(number, 'datapoint')}"]


def by_chance(reliable: Flags) -> Flags:
    """Where a datapoint is `reliable` by its own weights, `(N,)`, but fewer than 1 in 20 of all are.

    Where nearly all fail, the few that pass are those whose draws happened to look even.
    """
    few = bool(reliable.sum() < MIN_SHARE_RELIABLE * len(reliable))
    return reliable if few else reliable & False


def number_unreliable(columns: Mapping[str, NDArray[Any]]) -> int:
    """How many datapoints are not reliable by their own weights. Those that other starts doubt have a caution of their
    own.
    """
    unreliable = ~columns[RELIABLE].astype(bool)
    doubted = columns.get(DOUBTED)
    return int((unreliable if doubted is None else unreliable & ~doubted.astype(bool)).sum())
