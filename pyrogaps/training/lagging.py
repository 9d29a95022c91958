"""Extra steps of the guide before each step of the model, while the mutual information of data and latents rises."""

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

# The guide has stopped improving when the mean loss over this many steps is no lower than over the previous ones.
WINDOW = 10
# Datapoints of the estimate of mutual information, which cannot exceed log(NUM_DATAPOINTS), and rows per chunk.
NUM_DATAPOINTS, CHUNK_SIZE = 256, 32

MUTUAL_INFORMATION = "mutual_information"


class GuideAhead:
    """Up to `limit` steps of the guide alone before each step of the model (He et al., arXiv:1901.05534).

    If the guide lags behind the model's posteriors, the model learns to ignore its latents. Therefore, while the mutual
    information of data and latents rises from epoch to epoch, the guide is trained first, until the bound no longer
    improves. Then the model takes one step. `names` are the guide's parameters.

    Raises `InputError` for a guide that `GuideDensity` rejects and for a model without a data plate.
    """

    def __init__(self, model: Program, guide: Program, data: IndexedData, names: set[str], limit: int) -> None:
        self.names, self.limit = names, limit
        self._density = GuideDensity(guide, data, model)
        if self._density.joint.plate is None:
            raise InputError("training: guide_steps needs a model with a data plate. Add one, or set guide_steps to 0.")
        self._indices = evenly_spaced(len(data), NUM_DATAPOINTS)

    def is_active(self, history: dict[str, list[float]]) -> bool:
        """Whether mutual information has never fallen from one epoch to the next."""
        return all(later >= earlier for earlier, later in pairwise(history.get(MUTUAL_INFORMATION, [])))

    def run(
        self, step: Callable[[Tensor], float], optimizer: JointOptimizer, first: Tensor, batches: list[Tensor]
    ) -> None:
        """Train the guide alone, first on `first`, then on random `batches`; `step` returns the loss.

        Afterwards `optimizer` moves only the model's parameters.
        """
        optimizer.move_only(self.names.__contains__)
        self._descend(step, first, batches)
        optimizer.move_only(lambda name: name not in self.names)

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
        r"""Estimate of the mutual information of datapoint and latents under the guide, in nats.

        The mean of q(z|x_n) over the N datapoints stands in for q(z), so the estimate is at most log N:

        $$I_q = \frac1N \sum_n [\log q(z_n|x_n) - \log \frac1N \sum_m q(z_n|x_m)], \quad z_n \sim q(z|x_n)$$
        """
        number = len(self._indices)
        with torch.no_grad():
            z, _ = self._density.sample(1, self._indices)
            parts = [
                self._density.log_prob(rows[:, None].expand(-1, number, -1), self._indices)
                for rows in z[0].split(CHUNK_SIZE)
            ]
        table = torch.cat(parts).double()  # log q(z_n|x_m), (n, m)
        return float((table.diagonal() - table.logsumexp(1)).mean()) + math.log(number)
