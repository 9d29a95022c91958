"""Settings of the refinement."""

from dataclasses import dataclass

from pyrogaps.settings import Count, NonNegative, Positive, checked


@checked("refinement")
@dataclass(frozen=True)
class Refinement:
    """Settings of the per-datapoint refinement.

    Attributes:
        num_steps: Adam steps.
        num_particles: draws per step and datapoint, in mirrored pairs where the family is symmetric.
        learning_rate: the first step's, in units of the posterior's own scale where the family knows it; it decays by a
            cosine to a thousandth.
        num_starts: how often refinement is begun: at the guide's own output first, then each time at the best of 256
            draws from the prior; of the optima found the best is kept. For posteriors with several modes.
        num_selection: draws on which the refined and the starting guide are compared; where refinement ended below its
            start, the start is kept.
        tolerance: a datapoint counts as converged when another tenth of the steps (50 at least), begun at the full
            rate, does not raise its ELBO by more than this, in nats (and two standard errors of that comparison).
    """

    num_steps: Count = 1000
    num_particles: Count = 8
    learning_rate: Positive = 0.05
    num_starts: Count = 1
    num_selection: Count = 256
    tolerance: NonNegative = 0.02
