"""Learning-rate schedules: functions from the epoch, counted from 0, to a multiplier of the base learning rate."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

from pyrogaps.settings import Count, Several, checked, within


class Schedule(ABC):
    """`schedule(epoch)` multiplies the base learning rate in that epoch, counted from 0.

    Any function with this signature works too; the classes exist so that a recipe can name one.
    """

    @abstractmethod
    def __call__(self, epoch: int) -> float:
        """The multiplier for `epoch`, non-negative."""


@dataclass(frozen=True)
class Constant(Schedule):
    """The base learning rate throughout."""

    def __call__(self, epoch: int) -> float:
        return 1.0


@checked("schedule")
@dataclass(frozen=True)
class Exponential(Schedule):
    """`decay ** epoch`. Raises `InputError` unless 0 < decay <= 1."""

    decay: Annotated[float, within("above 0 and at most 1")]

    def __call__(self, epoch: int) -> float:
        return self.decay**epoch


@checked("schedule")
@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from 1 in the first epoch to `final` in the last of `num_epochs`; `final` afterwards."""

    num_epochs: Count
    final: Annotated[float, within("of at least 0 and at most 1")] = 0.0

    def __call__(self, epoch: int) -> float:
        progress = min(1.0, epoch / max(1, self.num_epochs - 1))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


@checked("schedule")
@dataclass(frozen=True)
class Staircase(Schedule):
    """Stages of growing length: 10^(-i/(S-1)) for 3^i epochs, i = 0 .. S-1, with S = `num_stages`.

    With 8 stages, 1 + 3 + ... + 3^7 = 3,280 epochs (Burda, Grosse and Salakhutdinov, arXiv:1509.00519). A different
    `num_epochs` scales all stages equally. After the last stage its multiplier, 1/10, is kept.
    """

    num_epochs: Count = 3280
    num_stages: Several = 8

    def __call__(self, epoch: int) -> float:
        # Stage i begins after a share (3^i - 1) / (3^S - 1) of the epochs. Integers keep rounding from moving a stage.
        last = self.num_stages - 1
        share = epoch * (3**self.num_stages - 1)
        stage = sum(share >= self.num_epochs * (3**i - 1) for i in range(1, last + 1))
        return float(10.0 ** (-stage / last))
