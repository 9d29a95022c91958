"""Coupling flows on halves of the latent vector: amortized, and with separate weights for each datapoint."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pyrogaps.errors import InputError
from pyrogaps.guides.amortized import Amortized
from pyrogaps.guides.couplings import (
    AutoLocalNetworks,
    CouplingNetwork,
    ShiftAndLogScale,
    coupling_flow,
    first_weights,
    local_weights,
)


class AmortizedFlow(Amortized):
    r"""q(z|x): a Normal transformed by affine couplings of its two halves in turn.

    $$z = m(x) + s(x) \odot T_x(\epsilon), \quad \epsilon \sim \mathcal N(0, I)$$

    The networks of $T_x$ share their weights across all x. They read a half at its location, $m + s \odot \epsilon$, so
    that the transformation depends on where the Normal lies. This is the flow without auxiliary variable of Cremer, Li
    and Duvenaud (arXiv:1801.03558): `num_steps` steps of two couplings, networks with one hidden tanh layer of
    `flow_hidden` units. Instead of their gate, scales are bounded above and below.

    A Pyro guide: `guide(x)`; other arguments, sites and errors are those of `AmortizedNormal`. Initially it is Normal.
    """

    def __init__(
        self,
        data_dim: int = 64,
        latent_dim: int = 8,
        hidden: Sequence[int] = (100, 100),
        activation: str = "ELU",
        min_scale: float = 1e-4,
        num_steps: int = 2,
        flow_hidden: int = 50,
        features: nn.Module | None = None,
    ) -> None:
        super().__init__(data_dim, latent_dim, hidden, activation, min_scale, 2 * latent_dim, features)
        check_sizes(self, latent_dim, num_steps, flow_hidden)
        self.num_steps, self.flow_hidden = num_steps, flow_hidden
        sizes = _sizes(latent_dim, num_steps)
        self.networks = nn.ModuleList(CouplingNetwork(read, moved, flow_hidden) for read, moved in sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Run the guide on `x` `(N, *event)`; returns z, shape `(N, latent_dim)`."""
        with pyro.plate("data", len(x)):
            z: Tensor = pyro.sample("z", self.posterior(x))
        return z

    def posterior(self, x: Tensor) -> dist.TransformedDistribution:
        """q(z|x) for `x` `(N, *event)`, batch shape `(N,)`."""
        loc, scale = self.parameters_of(x)
        halves = _halves(loc, scale)
        networks = [partial(read_at, network, *halves[k % 2]) for k, network in enumerate(self.networks)]
        return coupling_flow(networks, loc, scale, self.latent_dim // 2)

    def parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """m(x) and s(x), each `(N, latent_dim)`."""
        loc, raw = self.encode(x).chunk(2, -1)
        return loc, self.positive(raw)

    def local_family(self, model: Any, plate: str | None = None) -> "AutoLocalFlow":
        """The family of this guide with separate m, s and weights for each datapoint."""
        return AutoLocalFlow(model, plate=plate, num_steps=self.num_steps, hidden=self.flow_hidden)

    def start_local(self, guide: "AutoLocalFlow", x: Tensor) -> None:
        """Initialise `guide`, a `local_family` set up on `x`, to this guide's q(z|x)."""
        loc, scale = self.parameters_of(x)
        halves = _halves(loc, scale)
        guide.start_at(loc, scale)
        for k, network in enumerate(self.networks):
            half_loc, half_scale = halves[k % 2]
            guide.start_network(f"{k}", local_weights(network, half_scale, half_loc))  # type: ignore[arg-type]


class AutoLocalFlow(AutoLocalNetworks):
    r"""A separate coupling flow for each datapoint, over all its latent sites in unconstrained space.

    $$z_n = m_n + s_n \odot T_n(\epsilon), \quad \epsilon \sim \mathcal N(0, I)$$

    $T_n$ has `num_steps` steps of two affine couplings of halves (Dinh et al., arXiv:1605.08803). Its networks have one
    hidden tanh layer of `hidden` units, with separate weights and biases for each datapoint. Initially the coordinates
    are independent Normals. Other arguments and errors are those of `AutoLocal`. A single latent dimension has no
    halves and raises `InputError`.
    """

    def setup_posterior(self, loc: Tensor) -> None:
        dim = loc.shape[-1]
        check_sizes(self, dim, self._num_steps, self._hidden)
        sizes = enumerate(_sizes(dim, self._num_steps))
        self.setup_networks({f"{k}": first_weights(read, moved, self._hidden, loc) for k, (read, moved) in sizes})

    def get_posterior(self) -> dist.TransformedDistribution:
        return coupling_flow(list(self.networks().values()), self.loc, self.scale, self.loc.shape[-1] // 2)


def check_sizes(guide: Any, dim: int, num_steps: int, hidden: int) -> None:
    """Raise `InputError` for a flow without couplings, hidden units or halves."""
    name = type(guide).__name__
    if num_steps < 1 or hidden < 1:
        raise InputError(f"{name}: a flow needs at least one step and one hidden unit, got {num_steps} and {hidden}")
    if dim < 2:
        raise InputError(
            f"{name}: a coupling flow needs at least two latent dimensions, but there is only one. Use the flow with "
            "an auxiliary variable."
        )


def _sizes(dim: int, num_steps: int) -> list[tuple[int, int]]:
    """Numbers of inputs and outputs of the coupling networks, two networks per step."""
    half = dim // 2
    return [(half, dim - half), (dim - half, half)] * num_steps


def _halves(*vectors: Tensor) -> list[tuple[Tensor, ...]]:
    """The first halves of `vectors` `(*batch, dim)`, and the second halves."""
    half = vectors[0].shape[-1] // 2
    return [tuple(v[..., :half] for v in vectors), tuple(v[..., half:] for v in vectors)]


def read_at(
    network: nn.Module, loc: Tensor, scale: Tensor, inputs: Tensor, context: Tensor | float = 0.0
) -> ShiftAndLogScale:
    """The output of a `CouplingNetwork` that reads `loc + scale * inputs`."""
    outputs: ShiftAndLogScale = network(loc + scale * inputs, context)
    return outputs
