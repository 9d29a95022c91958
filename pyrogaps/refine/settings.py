"""Settings of the refinement."""

from dataclasses import dataclass

from pyrogaps.settings import Count, NonNegative, Positive, checked

# A natural-gradient step does the work of so many of Adam's; there are so many at least.
STEPS_OF_ADAM, MIN_NATURAL_STEPS = 45, 8


@checked("refinement")
@dataclass(frozen=True)
class Refinement:
    """Settings of the per-datapoint refinement.

    Natural gradients refine guides that are Gaussian in unconstrained space. Adam refines all others, and the
    datapoints for which natural gradients do not converge.

    Attributes:
        num_steps: Adam steps. Natural gradients take only `num_natural_steps`, of 16 draws each.
        num_particles: draws per step of Adam and datapoint, in mirrored pairs where the family is symmetric.
        learning_rate: of Adam's first step, in units of the posterior's own scale where the family knows it; it decays
            by a cosine to a thousandth.
        num_starts: number of starts: the first at the guide's output, each further one at the best of 256
            draws from the prior. The best optimum is kept. For posteriors with several modes.
        num_selection: draws on which the refined and the starting guide are compared; where refinement ended below its
            start, the start is kept.
        tolerance: a datapoint counts as converged when further steps, begun at the full rate, do not raise its ELBO by
            more than this, in nats (and two standard errors of that comparison). The check takes a tenth of the Adam
            steps (at least 50), or a third of the natural-gradient steps.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> options = {"refinement": pg.Refinement(num_steps=200), "num_particles": 50, "progress": False}
        >>> pg.decompose(model, guide, x, **options).per_datapoint["converged"].shape
        (6, 1)
    """

    num_steps: Count = 1000
    num_particles: Count = 8
    learning_rate: Positive = 0.05
    num_starts: Count = 1
    num_selection: Count = 256
    tolerance: NonNegative = 0.02

    @property
    def num_natural_steps(self) -> int:
        """Natural-gradient steps of the first round: `num_steps` / 45, and 8 at least."""
        return max(MIN_NATURAL_STEPS, self.num_steps // STEPS_OF_ADAM)
