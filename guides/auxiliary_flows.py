"""Flow guides over the latent vector and an auxiliary variable, with a reverse model for that variable."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
from pyro.infer.autoguide.initialization import init_to_feasible
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyrogaps.density.auxiliary import AuxiliaryPosterior
from pyrogaps.errors import InputError
from pyrogaps.guides.amortized import Amortized
from pyrogaps.guides.couplings import (
    AutoLocalNetworks,
    CouplingNetwork,
    coupling_flow,
    first_weights,
    local_weights,
    normal_of,
)
from pyrogaps.guides.flows import read_at


class AmortizedAuxiliaryFlow(Amortized):
    r"""q(z, v|x) with an auxiliary variable v and a reverse model r(v|z, x) (Cremer et al., arXiv:1801.03558).

    $$\log p(x) \ge \mathbb E_{q(z, v|x)} [\log p(x, z) + \log r(v|z, x) - \log q(z, v|x)]$$

    z starts as N(m(x), s(x)^2) and v as standard Normal noise. An affine coupling that reads z transforms v, then one
    that reads v transforms z; there are `num_steps` such pairs. The networks have one hidden tanh layer of
    `flow_hidden` units. r(v|z, x) is a Normal given by a network of the same form. The first network and r also read x.

    A Pyro guide with sites "z" `(N, latent_dim)` and "v" `(N, auxiliary_dim)` in the plate "data"; `auxiliary_dim`
    defaults to `latent_dim`. Train it with the model that `augment(model)` returns, which adds r at "v";
    `pyrogaps.train` and all estimators do so automatically. Other arguments and errors are those of `AmortizedFlow`.
    """

    def __init__(
        self,
        data_dim: int = 64,
        latent_dim: int = 8,
        hidden: Sequence[int] = (100, 100),
        activation: str = "ELU",
        min_scale: float = 1e-4,
        num_steps: int = 2,
        flow_hidden: int = 200,
        auxiliary_dim: int | None = None,
        features: nn.Module | None = None,
    ) -> None:
        num_outputs = 2 * latent_dim + 2 * flow_hidden
        super().__init__(data_dim, latent_dim, hidden, activation, min_scale, num_outputs, features)
        self.auxiliary_dim = auxiliary_dim or latent_dim
        _check(self, num_steps, flow_hidden, self.auxiliary_dim)
        self.num_steps, self.flow_hidden = num_steps, flow_hidden
        sizes = _sizes(latent_dim, self.auxiliary_dim, num_steps)
        self.networks = nn.ModuleList(CouplingNetwork(read, moved, flow_hidden) for read, moved in sizes)
        self.reverse = CouplingNetwork(latent_dim, self.auxiliary_dim, flow_hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Run the guide on `x` `(N, *event)`; returns z, shape `(N, latent_dim)`."""
        with pyro.plate("data", len(x)):
            both = pyro.sample("_z_and_v", self.posterior(x), infer={"is_auxiliary": True})
            z: Tensor = pyro.sample("z", dist.Delta(both[..., : self.latent_dim], event_dim=1))
            pyro.sample("v", dist.Delta(both[..., self.latent_dim :], event_dim=1))
        return z

    def augment(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """`model` with an additional site v ~ r(v|z, x) after "z"; the evidence is unchanged."""

        def augmented(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            with _After("z", lambda z: pyro.sample("v", self.reverse_posterior(z, x))):
                return model(x, *args, **kwargs)

        return augmented

    def posterior(self, x: Tensor) -> dist.TransformedDistribution:
        """q(z, v|x) for `x` `(N, *event)`: batch shape `(N,)`, the elements of z before those of v."""
        loc, scale, context, _ = self._outputs(x)
        first = partial(read_at, self.networks[0], loc, scale, context=context)
        networks = [first] + [self._later(k, loc, scale) for k in range(1, len(self.networks))]
        return coupling_flow(networks, *_padded(loc, scale, self.auxiliary_dim), self.latent_dim)

    def _later(self, k: int, loc: Tensor, scale: Tensor) -> Callable[..., Any]:
        network: CouplingNetwork = self.networks[k]  # type: ignore[assignment]
        return network if k % 2 else partial(read_at, network, loc, scale)

    def reverse_posterior(self, z: Tensor, x: Tensor) -> dist.TorchDistribution:
        """r(v|z, x) for `z` `(N, latent_dim)`, batch shape `(N,)`."""
        return normal_of(self.reverse(z, self._outputs(x)[3]))

    def _outputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sizes = [self.latent_dim, self.latent_dim, self.flow_hidden, self.flow_hidden]
        loc, raw, context, reverse_context = self.encode(x).split(sizes, -1)
        return loc, self.positive(raw), context, reverse_context

    def local_family(self, model: Any, plate: str | None = None) -> "AutoLocalAuxiliaryFlow":
        """The family of this guide with separate m, s and weights, including those of r, for each datapoint."""
        sizes = {"num_steps": self.num_steps, "hidden": self.flow_hidden, "auxiliary_dim": self.auxiliary_dim}
        return AutoLocalAuxiliaryFlow(model, plate=plate, **sizes)

    def start_local(self, guide: "AutoLocalAuxiliaryFlow", x: Tensor) -> None:
        """Initialise `guide`, a `local_family` set up on `x`, to this guide's q(z, v|x) and r(v|z, x)."""
        loc, scale, context, reverse_context = self._outputs(x)
        zeros, ones = loc.new_zeros(len(x), self.auxiliary_dim), loc.new_ones(len(x), self.auxiliary_dim)
        guide.start_at(loc, scale)
        for k, network in enumerate(self.networks):
            input_loc, input_scale = (zeros, ones) if k % 2 else (loc, scale)
            context_k = context if k == 0 else 0.0
            weights = local_weights(network, input_scale, input_loc, context_k)  # type: ignore[arg-type]
            guide.start_network(f"{k}", weights)
        guide.start_network("reverse", local_weights(self.reverse, scale, loc, reverse_context))


class AutoLocalAuxiliaryFlow(AutoLocalNetworks):
    r"""A separate flow with an auxiliary variable for each datapoint, over all its latents in unconstrained space.

    This is the family of `AmortizedAuxiliaryFlow` with separate weights and biases, including those of the reverse
    model, for each datapoint. Initially the coordinates are independent Normals. Its ELBO is a lower bound on the ELBO
    of its marginal q(z_n), because the site "_local_latent" is scored by log q(z, v) - log r(v|z); no `augment` is
    needed. With d latent and d auxiliary dimensions and `hidden` = h, there are about (6 num_steps + 3) d h weights per
    datapoint.

    `auxiliary_dim` defaults to the dimension of the latents. Other arguments and errors are those of `AutoLocal`.
    """

    def __init__(
        self,
        model: Any,
        *,
        num_steps: int = 2,
        hidden: int = 50,
        auxiliary_dim: int | None = None,
        plate: str | None = None,
        init_loc_fn: Any = init_to_feasible,
        init_scale: float = 0.1,
        create_plates: Any = None,
    ) -> None:
        options = {"plate": plate, "init_loc_fn": init_loc_fn, "init_scale": init_scale, "create_plates": create_plates}
        super().__init__(model, num_steps=num_steps, hidden=hidden, **options)
        _check(self, num_steps, hidden, 1 if auxiliary_dim is None else auxiliary_dim)
        self._auxiliary_dim = auxiliary_dim

    def local_family(self, model: Any, plate: str | None = None) -> "AutoLocalAuxiliaryFlow":
        """The same family, with the same sizes, for other datapoints."""
        sizes: dict[str, Any] = {"num_steps": self._num_steps, "hidden": self._hidden}
        return AutoLocalAuxiliaryFlow(model, **sizes, auxiliary_dim=self._auxiliary_dim, plate=plate)

    def setup_posterior(self, loc: Tensor) -> None:
        dim = loc.shape[-1]
        self._auxiliary_dim = self._auxiliary_dim or dim
        sizes = enumerate(_sizes(dim, self._auxiliary_dim, self._num_steps))
        networks = {f"{k}": first_weights(read, moved, self._hidden, loc) for k, (read, moved) in sizes}
        self.setup_networks({**networks, "reverse": first_weights(dim, self._auxiliary_dim, self._hidden, loc)})

    def units(self) -> dict[str, Tensor | float]:
        """As in `AutoLocalNetworks`, but smaller in outer layers.

        Adam moves many weights in the same direction, so the output of h units changes by more than sqrt(h) steps. With
        steps of 1 / sqrt(h), 200 units reached a lower ELBO than 20 units.
        """
        units = super().units()
        weights = units["weights_unconstrained"]
        assert isinstance(weights, Tensor)
        for _, _, outer, _ in self._split(weights).values():
            outer.fill_(outer.shape[-2] ** -0.75)
        return units

    def get_posterior(self) -> AuxiliaryPosterior:
        loc, scale, networks = self.loc, self.scale, self.networks()
        network = networks.pop("reverse")
        assert self._auxiliary_dim is not None
        flow = coupling_flow(list(networks.values()), *_padded(loc, scale, self._auxiliary_dim), loc.shape[-1])

        def reverse(z: Tensor) -> dist.TorchDistribution:
            return normal_of(network((z - loc) / scale))

        return AuxiliaryPosterior(flow, reverse, loc.shape[-1])


class _After(Messenger):
    """Runs `statement(value)` directly after the site `name`, within its plates."""

    def __init__(self, name: str, statement: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.name, self.statement = name, statement

    def _pyro_post_sample(self, message: Any) -> None:
        if message["name"] == self.name:
            self.statement(message["value"])


def _check(guide: Any, num_steps: int, hidden: int, auxiliary_dim: int) -> None:
    if min(num_steps, hidden, auxiliary_dim) < 1:
        raise InputError(
            f"{type(guide).__name__}: steps, hidden units and auxiliary dimensions must be at least 1, "
            f"got {num_steps}, {hidden} and {auxiliary_dim}"
        )


def _sizes(dim: int, auxiliary_dim: int, num_steps: int) -> list[tuple[int, int]]:
    """Numbers of inputs and outputs of the coupling networks, two networks per step."""
    return [(dim, auxiliary_dim), (auxiliary_dim, dim)] * num_steps


def _padded(loc: Tensor, scale: Tensor, auxiliary_dim: int) -> tuple[Tensor, Tensor]:
    """Location and scale of (z, v); those of v are 0 and 1, because the first coupling transforms it."""
    pad = nn.functional.pad
    return pad(loc, (0, auxiliary_dim)), pad(scale, (0, auxiliary_dim), value=1.0)
