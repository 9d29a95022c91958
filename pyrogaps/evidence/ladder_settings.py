"""The settings of the ladder, apart from it, for the parts that carry it out."""

from dataclasses import dataclass
from itertools import pairwise

from pyrogaps.errors import InputError, at_least, between_0_and_1, positive


@dataclass(frozen=True)
class LadderSettings:
    """See `Ladder`, which documents them."""

    tolerance: float = 0.1
    max_evaluations: int = 20_000
    num_pilot_draws: int = 512
    max_khat: float = 0.2
    min_ess: float = 0.04
    temperatures: tuple[int, ...] = (16, 64, 256, 1024)
    num_leapfrog: int = 1
    max_log_variance: float = 1.0
    max_curvature_dim: int = 256
    widen: float = 1.1
    target_acceptance: float = 0.8
    num_simulated: int = 32

    def __post_init__(self) -> None:
        # A recipe gives a list.
        object.__setattr__(self, "temperatures", tuple(self.temperatures))
        positive("evidence", self, ["tolerance", "max_log_variance", "min_ess"])
        least = {"max_evaluations": 1, "num_pilot_draws": 100, "num_leapfrog": 1, "num_simulated": 0, "widen": 1}
        at_least("evidence", self, least)
        rising = all(low < high for low, high in pairwise((0, *self.temperatures)))
        if not self.temperatures or not rising:
            raise InputError(f"evidence.temperatures: must be positive and increasing, got {self.temperatures}")
        between_0_and_1("evidence.target_acceptance", self.target_acceptance)

    @property
    def num_rungs(self) -> int:
        """Two of importance sampling, and those of AIS."""
        return 2 + len(self.temperatures)
