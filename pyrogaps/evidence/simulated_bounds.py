"""`SimulatedBounds`: log p(x) bounded from both sides, on data simulated from the model."""

import math
from dataclasses import dataclass

from torch import Tensor

from pyrogaps.errors import counted
from pyrogaps.settings import Probability, checked


@dataclass(frozen=True, repr=False)
class SimulatedBounds:
    """Stochastic lower and upper bounds of log p(x) on data simulated from the model, nats, `(N,)` each.

    `width` is the mean of `upper - lower` over datapoints and `width_mcse` its standard error across them.
    """

    lower: Tensor
    upper: Tensor

    def __repr__(self) -> str:
        lower, upper = float(self.lower.mean()), float(self.upper.mean())
        error = f" ± {self.width_mcse:.3f}" if len(self.lower) > 1 else ""
        return (
            f"{type(self).__name__}({counted(len(self.lower), 'datapoint')} simulated: mean log p(x) from {lower:.3f} "
            f"to {upper:.3f} nats, width {self.width:.3f}{error})"
        )

    @property
    def width(self) -> float:
        return float((self.upper - self.lower).mean())

    @property
    def width_mcse(self) -> float:
        gaps = self.upper - self.lower
        return float(gaps.std() / len(gaps) ** 0.5) if len(gaps) > 1 else float("nan")

    @checked()
    def interval(self, probability: Probability = 0.95) -> tuple[Tensor, Tensor]:
        r"""Ends `(N,)` between which log p(x_n) lies with at least this probability, whatever the settings of AIS.

        $\mathbb E[e^{\text{lower} - \log p(x)}] = \mathbb E[e^{\log p(x) - \text{upper}}] = 1$, so by Markov's
        inequality either side is beyond the truth by $\log \frac{2}{1 - P}$ with probability at most $(1 - P) / 2$.
        """
        slack = _slack(probability)
        return self.lower - slack, self.upper + slack

    @checked()
    def mean_interval(self, probability: Probability = 0.95) -> tuple[float, float]:
        r"""As `interval`, of the mean of log p(x_n) over the N simulated datapoints: their runs are independent, so
        that the product of those ratios has mean 1 too, and the mean needs only $\frac1N \log \frac{2}{1 - P}$.
        """
        slack = _slack(probability) / len(self.lower)
        return float(self.lower.mean()) - slack, float(self.upper.mean()) + slack


def _slack(probability: float) -> float:
    return math.log(2 / (1 - probability))
