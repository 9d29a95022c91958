"""Messengers of the objective: weighting latent sites and counting datapoints."""

from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor


class WeightLatents(Messenger):
    """Multiplies the log-probability of every latent site by `weight`, in a model or in a guide.

    Unlike `poutine.scale` it supports weight 0: the sites are masked out and contribute exactly 0, even if a
    log-probability is infinite. The removed part, (1 - weight) times the log-probability, is summed over sites and runs
    in `withheld` (nats, no gradient), so that the plain ELBO can be reported from the same run. A tensor `factor`
    replaces a weight between 0 and 1 when the weight is an input of a record.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = 1.0
        self.factor: Tensor | None = None
        self.withheld: Tensor | float = 0.0
        self._unweighted: dict[str, tuple[Any, Any]] = {}

    def set_weight(self, weight: float) -> None:
        """Multiply by `weight` from now on."""
        self.weight = weight

    def take_factor(self, factor: Tensor | None) -> None:
        """Replace a weight between 0 and 1 by a tensor; None: use the weight itself."""
        self.factor = factor

    def reset(self) -> None:
        """Begin a new sum of what is withheld."""
        self.withheld = 0.0

    def _pyro_sample(self, message: Any) -> None:
        if self.weight == 1 or message["is_observed"] or site_is_subsample(message):
            return
        self._unweighted[message["name"]] = message["scale"], message["mask"]
        if self.weight == 0:
            message["mask"] = False
        else:
            message["scale"] = message["scale"] * self._multiplier

    def _pyro_post_sample(self, message: Any) -> None:
        if message["name"] not in self._unweighted:
            return
        scale, mask = self._unweighted.pop(message["name"])
        with torch.no_grad():
            log_prob = scale_and_mask(message["fn"].log_prob(message["value"]), scale, mask)
            self.withheld = self.withheld + (1 - self._multiplier) * log_prob.sum()

    @property
    def _multiplier(self) -> Tensor | float:
        return self.weight if self.factor is None else self.factor

    @property
    def is_partial(self) -> bool:
        """Whether the weight is neither 0 nor 1, so that it can vary without changing the operations."""
        return self.weight not in (0, 1)


class CountDatapoints(Messenger):
    """Counts the datapoints that the log-joint of a run stands for.

    This is the number of rows, unless an observed site is in a plate that subsamples exactly these rows: Pyro then
    scales the sum up to the plate's full size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows = 1
        self.num_datapoints = 1

    def reset(self, rows: int) -> None:
        self.rows = self.num_datapoints = rows

    def _pyro_post_sample(self, message: Any) -> None:
        if message["is_observed"]:
            for frame in message["cond_indep_stack"]:
                if frame.full_size is not None and frame.size == self.rows:
                    self.num_datapoints = max(self.num_datapoints, int(frame.full_size))
