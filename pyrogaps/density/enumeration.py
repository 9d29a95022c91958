r"""Discrete latents, summed out exactly: $\log p(x_n, z) = \log \sum_y p(x_n, y, z)$.

Pyro's `EnumMessenger` gives every discrete latent all its values, along a tensor dimension of its own to the left of
all plates, so that one run of the model scores all of them. The factors that depend on any of them are contracted by
`pyro.ops.contract`, which follows plates and `pyro.markov` chains; the datapoints are a plate that is kept.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from pyrogaps.density.discrete import Discrete, is_categorical
from pyrogaps.density.layout import distribution_mask
from pyrogaps.density.samplers import with_method


class Enumerate(EnumMessenger):
    """Pyro's parallel enumeration of the sites in `discrete`, whatever their own `infer` asks for.

    `first_dim` (negative) is the first tensor dimension left of all plates. Enter it after (inside) the handler that
    scores sites.
    """

    def __init__(self, discrete: Mapping[str, Discrete], first_dim: int) -> None:
        super().__init__(first_available_dim=first_dim)
        self.discrete = discrete

    def __enter__(self) -> Any:
        entered = super().__enter__()
        # Sites that were set to constants are in the scope of a chain without having been seen here.
        self._markov_depths = defaultdict(lambda: -1)
        return entered

    def _pyro_sample(self, msg: Any) -> None:
        site = self.discrete.get(msg["name"])
        if site is not None and not msg["is_observed"] and not msg["done"]:
            infer = {name: value for name, value in msg["infer"].items() if name not in ("num_samples", "tmc")}
            msg["infer"] = {**infer, "enumerate": "parallel", "expand": False}
            if not is_categorical(msg["fn"]):
                batch = (1,) * len(msg["fn"].batch_shape)
                values = site.values.reshape(site.cardinality, *batch, *site.event_shape)
                msg["fn"] = with_method(msg["fn"], "enumerate_support", lambda expand=False: values)
        elif msg["infer"].get("enumerate"):  # a site that a guide draws
            msg["infer"] = {name: value for name, value in msg["infer"].items() if name != "enumerate"}
        super()._pyro_sample(msg)


def one_value(term: Tensor, message: Any) -> Tensor:
    """The factor of an enumerated site where it is masked: its first value alone counts, once.

    A masked site has log-probability 0 at each of its K values, so that a plain sum would add log K. Masked elements
    of an event keep their first value too.
    """
    fn, value = message["fn"], message["value"]
    keep = distribution_mask(fn, message["mask"])
    if keep is None:
        return term
    axis = message["infer"]["_enumerate_dim"] - fn.event_dim
    allowed = keep.to(value.device) | (value == value.narrow(axis, 0, 1))
    if fn.event_dim:
        allowed = allowed.flatten(-fn.event_dim).all(-1)
    return torch.where(allowed, term, torch.full_like(term, -math.inf))
