"""`Shared`: what is spent on latents that datapoints share."""

from dataclasses import dataclass

from pyrogaps.settings import Count, Positive, Several, checked


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
    """

    num_draws: Several = 8
    tolerance: Positive = 0.1
    max_draws: Several = 4096
    max_evaluations: Count = 20_000_000
