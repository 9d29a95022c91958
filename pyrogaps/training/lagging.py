"""Training the guide ahead of the model, for as long as that makes latents tell more of the data."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from pyrogaps.density import GuideDensity, IndexedData
from pyrogaps.density.data import evenly_spaced
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.training.parameters import JointOptimizer

# Means of so many steps are compared to see whether the guide still gets better.
WINDOW = 10
# Mutual information is measured over so many datapoints, and cannot be seen to exceed the logarithm of their number.
NUM_DATAPOINTS, NUM_AT_ONCE = 256, 32

MUTUAL_INFORMATION = "mutual_information"


class GuideAhead:
    """Up to `limit` steps of the guide alone before each step of the model (He et al., arXiv:1901.05534).

    A guide that lags behind the posteriors of a model which moves with it teaches the model to do without latents.
    While mutual information between data and latents rises from epoch to epoch, the guide is therefore trained first,
    until the bound no longer improves, and the model then takes a step of its own. `names` are the guide's parameters.

    Raises `InputError` for what `GuideDensity` refuses, and for a model without a data plate.
    """

    def __init__(self, model: Program, guide: Program, data: IndexedData, names: set[str], limit: int) -> None:
        self.names, self.limit = names, limit
        self._density = GuideDensity(guide, data, model)
        if self._density.joint.plate is None:
            raise InputError("training: guide_steps measure information over datapoints; give the model a data plate")
        self._indices = evenly_spaced(len(data), NUM_DATAPOINTS)

    def goes_on(self, history: dict[str, list[float]]) -> bool:
        """Whether mutual information has not fallen from one epoch to the next yet."""
        return all(later >= earlier for earlier, later in pairwise(history.get(MUTUAL_INFORMATION, [])))

    def run(
        self, step: Callable[[Tensor], float], optimizer: JointOptimizer, first: Tensor, batches: list[Tensor]
    ) -> None:
        """Take steps of the guide on `first` and then on random `batches`; `step` returns the loss.

        What is left for `optimizer` to move afterwards is the model.
        """
        optimizer.moves = self.names.__contains__
        self._descend(step, first, batches)
        optimizer.moves = lambda name: name not in self.names

    def _descend(self, step: Callable[[Tensor], float], first: Tensor, batches: list[Tensor]) -> None:
        previous, total, indices = math.inf, 0.0, first
        for number in range(1, self.limit + 1):
            total += step(indices)
            if number % WINDOW == 0:
                if not total < previous:
                    return
                previous, total = total, 0.0
            indices = batches[int(torch.randint(len(batches), (), device="cpu"))]

    def mutual_information(self) -> float:
        r"""Between datapoint and latents under the guide, nats, with the mean of q(z|x_n) for q(z), at most log N:

        $$I_q = \frac1N \sum_n [\log q(z_n|x_n) - \log \frac1N \sum_m q(z_n|x_m)], \quad z_n \sim q(z|x_n)$$
        """
        number = len(self._indices)
        with torch.no_grad():
            z, _ = self._density.sample(1, self._indices)
            parts = [
                self._density.log_prob(rows[:, None].expand(-1, number, -1), self._indices)
                for rows in z[0].split(NUM_AT_ONCE)
            ]
        table = torch.cat(parts).double()  # log q(z_n|x_m), (n, m)
        return float((table.diagonal() - table.logsumexp(1)).mean()) + math.log(number)
