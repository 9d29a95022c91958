"""The settings of the ladder, apart from it, for the parts that carry it out."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from pyrogaps.errors import InputError
from pyrogaps.settings import Count, NonNegative, Positive, Probability, Whole, within


@dataclass(frozen=True)
class LadderSettings:
    """See `Ladder`, which documents them."""

    tolerance: Positive = 0.1
    max_evaluations: Count = 20_000
    num_pilot_draws: Annotated[int, within("of at least 100")] = 512
    max_khat: NonNegative = 0.2
    min_ess: Positive = 0.04
    temperatures: tuple[Count, ...] = (16, 64, 256, 1024)
    num_leapfrog: Count = 1
    max_log_variance: Positive = 1.0
    max_curvature_dim: Whole = 256
    widen: Annotated[float, within("of at least 1")] = 1.1
    target_acceptance: Probability = 0.8
    num_simulated: Whole = 32

    def __post_init__(self) -> None:
        if not self.temperatures or any(low >= high for low, high in pairwise(self.temperatures)):
            raise InputError(f"evidence.temperatures: must be increasing, and at least one, got {self.temperatures}")

    @property
    def num_rungs(self) -> int:
        """Two of importance sampling, and those of AIS."""
        return 2 + len(self.temperatures)
