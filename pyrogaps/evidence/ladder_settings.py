"""The settings of the ladder, apart from it, for the parts that carry it out."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

from pyrogaps.errors import InputError
from pyrogaps.settings import Count, NonNegative, Positive, Probability, within


@dataclass(frozen=True)
class LadderSettings:
    """See `Ladder`, which documents them."""

    tolerance: Positive = 0.1
    max_evaluations: Count = 40_000
    num_pilot_draws: Annotated[int, within("of at least 100")] = 512
    max_khat: NonNegative = 0.3
    min_ess: Positive = 0.2
    num_chains: Annotated[int, within("of at least 16")] = 64
    temperatures: tuple[Count, ...] = (8, 64, 512)
    num_leapfrog: Count = 1
    target_acceptance: Probability = 0.8

    def __post_init__(self) -> None:
        if not self.temperatures or any(low >= high for low, high in pairwise(self.temperatures)):
            raise InputError(f"evidence.temperatures: must be increasing, and at least one, got {self.temperatures}")
