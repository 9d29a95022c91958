"""`Escalation`: how log p(x) is measured where every datapoint gets what it needs."""

from dataclasses import dataclass
from itertools import pairwise

from pyrogaps.capture import Mode
from pyrogaps.errors import InputError, at_least, between_0_and_1


@dataclass(frozen=True)
class Escalation:
    r"""Settings of log p(x) by escalation: the ladder, how far it is climbed, and what that may cost.

    The rungs: importance sampling from the refined guide; from a Gaussian with the curvature of log p(x, z) there;
    AIS from that Gaussian over few temperatures; over more. A datapoint leaves the ladder at the first rung whose pilot
    can be trusted, and takes as many fresh draws there as bring its standard error to the tolerance; the pilot's are
    thrown away, so that the result does not depend on what was decided by them (Stein, 1945, doi:10.1214/aoms/
    1177731088, of two-stage samples).

    Args:
        tolerance: the standard error of log p(x) to reach for every datapoint, nats.
        max_evaluations: evaluations of log p(x, z), or of its gradient, that a datapoint may cost on average over a
            block of 64; where they run short all datapoints of the block are measured to a wider tolerance.
        num_pilot_draws: of each importance sampling pilot.
        max_khat: importance sampling is trusted up to this Pareto k-hat of its pilot, which is known to about 0.1.
            Below a third weights have a third moment, on which the interval of their mean rests.
        min_ess: and from this effective share of its draws on.
        temperatures: of the AIS pilots, increasing; the run that counts is four times as long.
        num_leapfrog: leapfrog steps of each transition.
        max_log_variance: an AIS rung is left for a longer one where the variance of its pilot's log-weights is above.
        max_curvature_dim: latent dimension above which no curvature is measured (it takes 2 dim gradients).
        widen: factor on the scales of the Gaussian.
        target_acceptance: what the pilots aim at.
        num_simulated: datapoints drawn from the model, on which the ladder is checked: as long as log p(x) is there
            below an upper bound by more than the tolerance, its lowest rung is taken away. 0 checks nothing.
        mode: how gradients are evaluated, see `GradientEvaluator`.

    Raises `InputError` for a setting out of range.
    """

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
    mode: Mode = "captured"

    def __post_init__(self) -> None:
        # A recipe gives a list.
        object.__setattr__(self, "temperatures", tuple(self.temperatures))
        for name in ("tolerance", "max_log_variance", "min_ess"):
            if not getattr(self, name) > 0:
                raise InputError(f"escalation.{name}: must be positive, got {getattr(self, name)}")
        least = {"max_evaluations": 1, "num_pilot_draws": 100, "num_leapfrog": 1, "num_simulated": 0, "widen": 1}
        at_least("escalation", self, least)
        rising = all(low < high for low, high in pairwise((0, *self.temperatures)))
        if not self.temperatures or not rising:
            raise InputError(f"escalation.temperatures: must be positive and increasing, got {self.temperatures}")
        between_0_and_1("escalation.target_acceptance", self.target_acceptance)

    @property
    def num_rungs(self) -> int:
        """Two of importance sampling, and those of AIS."""
        return 2 + len(self.temperatures)
