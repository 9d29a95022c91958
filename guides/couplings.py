"""Affine coupling flows (Dinh et al., arXiv:1605.08803), with shared weights or separate ones for each datapoint."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import AffineCoupling, Permute
from pyro.infer.autoguide.initialization import init_to_feasible
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions import AffineTransform, constraints

from pyrogaps.guides.local import AutoLocal

# A coupling scales by between e^-2 and e^2, so that points unlike the training data are not moved far away.
MAX_LOG_SCALE = 2.0

ShiftAndLogScale = tuple[Tensor, Tensor]


def bounded(outputs: Tensor) -> ShiftAndLogScale:
    """Shift and log scale from a network's outputs; the log scale lies in (-MAX_LOG_SCALE, MAX_LOG_SCALE)."""
    shift, raw = outputs.chunk(2, -1)
    return shift, MAX_LOG_SCALE * torch.tanh(raw / MAX_LOG_SCALE)


def normal_of(outputs: ShiftAndLogScale) -> dist.TorchDistribution:
    """The Normal with a network's shift and scale, its elements independent."""
    shift, log_scale = outputs
    normal: dist.TorchDistribution = dist.Normal(shift, log_scale.exp()).to_event(1)
    return normal


class CouplingNetwork(nn.Module):
    """One hidden tanh layer from `(..., num_inputs)` to shift and log scale `(..., num_outputs)`, initially 0.

    `context`, `(..., hidden)`, is added in the hidden layer and makes the network depend on the datapoint.
    """

    def __init__(self, num_inputs: int, num_outputs: int, hidden: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(num_inputs, hidden), nn.Linear(hidden, 2 * num_outputs)
        self._start()

    def reset_parameters(self) -> None:
        """Draw fresh weights, as for a new network."""
        self.inner.reset_parameters()
        self._start()

    def _start(self) -> None:
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, inputs: Tensor, context: Tensor | float = 0.0) -> ShiftAndLogScale:
        return bounded(self.outer(torch.tanh(self.inner(inputs) + context)))


Weights = tuple[Tensor, Tensor, Tensor, Tensor]


def local_network(weights: Weights, inputs: Tensor) -> ShiftAndLogScale:
    """A `CouplingNetwork` with separate weights for each datapoint.

    Inner weights are `(*batch, num_inputs, hidden)` and their bias `(*batch, hidden)`, outer weights
    `(*batch, hidden, 2 num_outputs)`, `inputs` `(*particles, *batch, num_inputs)`.
    """
    inner, inner_bias, outer, outer_bias = weights
    return bounded(_rowwise(torch.tanh(_rowwise(inputs, inner, inner_bias)), outer, outer_bias))


def _rowwise(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One matrix product per datapoint, for all its particles."""
    rows = bias[..., 0].numel()
    particles_last = inputs.reshape(-1, rows, inputs.shape[-1]).transpose(0, 1)
    flat = weight.reshape(rows, *weight.shape[-2:])
    outputs = torch.baddbmm(bias.reshape(rows, 1, -1), particles_last, flat)
    return outputs.transpose(0, 1).reshape(*inputs.shape[:-1], -1)


def local_weights(network: CouplingNetwork, scale: Tensor, loc: Tensor, context: Tensor | float = 0.0) -> Weights:
    """Weights for which `local_network(weights, e)` equals `network(loc + scale * e, context)`.

    `loc` and `scale` are `(*batch, num_inputs)`, `context` is `(*batch, hidden)`.
    """
    shape, rows = network.inner.weight.T.shape, loc.shape[:-1]
    inner = scale[..., None] * network.inner.weight.T.expand(*rows, *shape)
    inner_bias = network.inner.bias + loc @ network.inner.weight.T + context
    outer = network.outer.weight.T.expand(*rows, *network.outer.weight.T.shape)
    return inner, inner_bias, outer, network.outer.bias.expand(*rows, -1)


def first_weights(num_inputs: int, num_outputs: int, hidden: int, like: Tensor) -> Weights:
    """Weights of new networks with shift and log scale 0, one for each row of `like` `(*batch, dim)`."""
    rows = like.shape[:-1]
    inner = like.new_empty(*rows, num_inputs, hidden).uniform_(-1, 1) / max(1, num_inputs) ** 0.5
    inner_bias = like.new_empty(*rows, hidden).uniform_(-1, 1) / max(1, num_inputs) ** 0.5
    return inner, inner_bias, like.new_zeros(*rows, hidden, 2 * num_outputs), like.new_zeros(*rows, 2 * num_outputs)


def coupling_flow(
    networks: Sequence[Callable[[Tensor], ShiftAndLogScale]], loc: Tensor, scale: Tensor, split: int
) -> dist.TransformedDistribution:
    """The distribution of loc + scale T(e), where e ~ N(0, I) and T applies the couplings of `networks` in order.

    The first network reads the first `split` elements of e and transforms the others, the second does the reverse, and
    so on. `loc` and `scale` are `(*batch, dim)`.
    """
    dim = loc.shape[-1]
    transforms: list[AffineCoupling | Permute | AffineTransform] = []
    read = split
    for network in networks:
        swap = torch.arange(dim, device=loc.device).roll(-read)
        transforms += [
            AffineCoupling(read, network, log_scale_min_clip=-MAX_LOG_SCALE, log_scale_max_clip=MAX_LOG_SCALE)
        ]
        transforms += [Permute(swap)]
        read = dim - read
    if len(networks) % 2:
        transforms.append(Permute(torch.arange(dim, device=loc.device).roll(-read)))
    transforms.append(AffineTransform(loc, scale, event_dim=1, cache_size=1))
    base = dist.Normal(torch.zeros_like(loc), 1.0).to_event(1)
    return dist.TransformedDistribution(base, transforms)


class AutoLocalNetworks(AutoLocal):
    """An `AutoLocal` with coupling networks that have separate weights for each datapoint.

    All weights of a datapoint are stored in one vector, because Pyro runs faster with fewer parameters.
    """

    def __init__(
        self,
        model: Any,
        *,
        num_steps: int = 2,
        hidden: int = 50,
        plate: str | None = None,
        init_loc_fn: Any = init_to_feasible,
        init_scale: float = 0.1,
        create_plates: Any = None,
    ) -> None:
        super().__init__(
            model, plate=plate, init_loc_fn=init_loc_fn, init_scale=init_scale, create_plates=create_plates
        )
        self._num_steps, self._hidden = num_steps, hidden

    weights: Any

    def local_family(self, model: Any, plate: str | None = None) -> "AutoLocalNetworks":
        """The same family, with the same sizes, for other datapoints."""
        return type(self)(model, num_steps=self._num_steps, hidden=self._hidden, plate=plate)

    def setup_networks(self, networks: dict[str, Weights]) -> None:
        """Register the weights of `networks`, by name (see `local_network`), as a parameter of this guide."""
        batch = self.loc.dim() - 1
        self._shapes = {name: [value.shape[batch:] for value in weights] for name, weights in networks.items()}
        vectors = [value.flatten(batch) for weights in networks.values() for value in weights]
        self.weights = PyroParam(torch.cat(vectors, -1), constraints.real, 1)

    def networks(self) -> dict[str, Callable[[Tensor], ShiftAndLogScale]]:
        """The networks by name, at the datapoints of the current plate."""
        return {name: partial(local_network, weights) for name, weights in self._split(self.weights).items()}

    def start_network(self, name: str, weights: Weights) -> None:
        """Set the weights of the network called `name`."""
        with torch.no_grad():
            own = self._split(dict(self.named_parameters())["weights_unconstrained"].detach())[name]
            for target, value in zip(own, weights, strict=True):
                target.copy_(value.reshape(target.shape))

    def units(self) -> dict[str, Tensor | float]:
        """As in `AutoLocal`; the step of a weight changes the outputs of its layer by about one."""
        units = torch.ones_like(dict(self.named_parameters())["weights_unconstrained"])
        for inner, _, outer, _ in self._split(units).values():
            inner.fill_(inner.shape[-2] ** -0.5)
            outer.fill_(outer.shape[-2] ** -0.5)
        return {**super().units(), "weights_unconstrained": units}

    def _split(self, vector: Tensor) -> dict[str, Weights]:
        """Views of the weights `(*batch, num_weights)`, network by network."""
        shapes = [shape for network in self._shapes.values() for shape in network]
        parts = iter(vector.split([shape.numel() for shape in shapes], -1))
        views = {n: [next(parts).unflatten(-1, shape) for shape in shapes] for n, shapes in self._shapes.items()}
        return {name: (inner, a, outer, b) for name, (inner, a, outer, b) in views.items()}
