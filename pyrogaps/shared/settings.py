"""`Shared`: what is spent on latents that datapoints share."""

from dataclasses import dataclass
from typing import Annotated

from pyrogaps.settings import Count, Positive, checked, within


@checked("shared")
@dataclass(frozen=True)
class Shared:
    """What is spent on latents outside the data plate, theta, which all datapoints share.

    Args:
        num_draws: M, draws of theta from the guide; the local gaps are measured given each of them.
        tolerance: how far the two bounds of the global gap may lie apart, nats for the data set. Draws of theta for
            them are doubled until they do not.
        max_draws: draws of theta for these bounds, at most.
        max_evaluations: evaluations of log p(x_n, z | theta), or of its gradient, for them, at most.

    Raises `InputError` for a setting out of range.

    Example:
        >>> import pyrogaps as pg
        >>> pg.Shared(num_draws=16, tolerance=0.05).max_draws
        4096
    """

    num_draws: Annotated[int, within("of at least 2 and at most 10000")] = 8
    tolerance: Positive = 0.1
    max_draws: Annotated[int, within("of at least 2 and at most 1000000")] = 4096
    max_evaluations: Count = 20_000_000
