r"""Discrete latents, summed out exactly: $\log p(x_n, z) = \log \sum_y p(x_n, y, z)$.

Pyro's `EnumMessenger` gives every discrete latent all its values, along a tensor dimension of its own to the left of
all plates, so that one run of the model scores all of them. The factors that depend on any of them are contracted by
`pyro.ops.contract`, which follows plates and `pyro.markov` chains; the datapoints are a plate that is kept.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from pyrogaps.density.discrete import Discrete, is_categorical
from pyrogaps.density.layout import distribution_mask, unmasked
from pyrogaps.density.samplers import with_method
from pyrogaps.guard import failures_named


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

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if isinstance(
            value, Tensor
        ):  # its shape alone counts, which Pyro takes from `data`; vmap gives no access to it
            value = SimpleNamespace(data=SimpleNamespace(shape=value.shape), dim=value.dim)
        super()._pyro_post_sample(cast(Any, {**msg, "value": value}))


def own_log_prob(message: Any) -> Tensor:
    """The factor of a discrete latent that is summed out: its log-probability, whether it is masked or not.

    Under a mask it would be 0 at each of its K values, so that a sum over them adds log K. Its own probabilities sum
    to 1 where nothing else depends on it; where later sites do, they say how likely its values are. Masked elements
    whose probabilities are NaN, as in padding, count with their first value alone.
    """
    fn, value, axis = message["fn"], message["value"], message["infer"].get("_enumerate_dim")
    with failures_named(f"site '{message['name']}': its log_prob"):
        term: Tensor = unmasked(fn).log_prob(value)
    keep = distribution_mask(fn, message["mask"])
    if keep is None:
        return term
    kept, first = keep.to(value.device), torch.ones_like(value, dtype=torch.bool)
    if axis is not None:
        first = value == value.narrow(axis - fn.event_dim, 0, 1)
    if fn.event_dim:
        kept, first = kept.flatten(-fn.event_dim).all(-1), first.flatten(-fn.event_dim).all(-1)
    alone = torch.where(first, torch.zeros_like(term), torch.full_like(term, -math.inf))
    return torch.where(~kept & torch.isnan(term), alone, term)
