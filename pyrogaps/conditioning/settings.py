"""Settings of the measurement of a conditioning gap."""

from dataclasses import dataclass
from typing import Annotated

from pyrogaps.errors import InputError
from pyrogaps.settings import Count, Positive, checked, within


@checked("conditioning")
@dataclass(frozen=True)
class Conditioning:
    """Settings of the shared posterior of a guide that is not shown all of x.

    Attributes:
        num_completions: K, the number of draws of the withheld part per datapoint, even. Two shared posteriors are
            refined, each on one half of the completions, and evaluated on both halves.
        max_completions: the largest K; K is doubled, per block of datapoints, while overfitting exceeds `tolerance`.
        tolerance: the largest overfitting, nats: how much higher the ELBO of a shared posterior may be on its own half
            of the completions than that of the other half's posterior, on average over a block. A gap g is
            overestimated by half of that, about 2 g / K.

    Example:
        >>> import pyrogaps as pg
        >>> pg.Conditioning(num_completions=64).max_completions
        512
    """

    num_completions: Annotated[int, within("of at least 4")] = 128
    max_completions: Count = 512
    tolerance: Positive = 0.05

    def __post_init__(self) -> None:
        if self.num_completions % 2:
            raise InputError(f"conditioning.num_completions: must be even, got {self.num_completions}")
        if self.max_completions < self.num_completions:
            raise InputError(
                f"conditioning.max_completions: must be at least num_completions ({self.num_completions}), got "
                f"{self.max_completions}"
            )
