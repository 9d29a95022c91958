"""Flow guides over the latent vector and an auxiliary variable beside it, with a reverse model for that variable."""

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

    v starts as standard Normal noise and is moved by an affine coupling that reads z (this is q(v|z, x)), then z by one
    that reads v, and so on: `num_steps` such pairs, networks with one hidden tanh layer of `flow_hidden` units; z
    starts at N(m(x), s(x)^2). r(v|z, x) is a Normal by a network of the same form. The first network and r see x.

    A Pyro guide with sites "z" `(N, latent_dim)` and "v" `(N, auxiliary_dim)` in the plate "data"; `auxiliary_dim` is
    `latent_dim` if it is not given. Train it with the model that `augment(model)` returns, which has r at "v";
    `pyrogaps.train` and every estimator do so by themselves. Further arguments and errors as in `AmortizedFlow`.
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
        """`model` with v ~ r(v|z, x) beside its site "z": its evidence is the model's own."""

        def augmented(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            with _Beside("z", lambda z: pyro.sample("v", self.reverse_posterior(z, x))):
                return model(x, *args, **kwargs)

        return augmented

    def posterior(self, x: Tensor) -> dist.TransformedDistribution:
        """q(z, v|x) of `x` `(N, *event)`: batch shape `(N,)`, the elements of z before those of v."""
        loc, scale, context, _ = self._outputs(x)
        first = partial(read_at, self.networks[0], loc, scale, context=context)
        networks = [first] + [self._later(k, loc, scale) for k in range(1, len(self.networks))]
        return coupling_flow(networks, *_padded(loc, scale, self.auxiliary_dim), self.latent_dim)

    def _later(self, k: int, loc: Tensor, scale: Tensor) -> Callable[..., Any]:
        network: CouplingNetwork = self.networks[k]  # type: ignore[assignment]
        return network if k % 2 else partial(read_at, network, loc, scale)

    def reverse_posterior(self, z: Tensor, x: Tensor) -> dist.TorchDistribution:
        """r(v|z, x) of `z` `(N, latent_dim)`, batch shape `(N,)`."""
        return normal_of(self.reverse(z, self._outputs(x)[3]))

    def _outputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sizes = [self.latent_dim, self.latent_dim, self.flow_hidden, self.flow_hidden]
        loc, raw, context, reverse_context = self.encode(x).split(sizes, -1)
        return loc, self.positive(raw), context, reverse_context

    def local_family(self, model: Any, plate: str | None = None) -> "AutoLocalAuxiliaryFlow":
        """The family of this guide, for every datapoint its own m, s and weights, those of r among them."""
        sizes = {"num_steps": self.num_steps, "hidden": self.flow_hidden, "auxiliary_dim": self.auxiliary_dim}
        return AutoLocalAuxiliaryFlow(model, plate=plate, **sizes)

    def start_local(self, guide: "AutoLocalAuxiliaryFlow", x: Tensor) -> None:
        """Start `guide`, one of the local family set up on `x`, at this guide's q(z, v|x) and r(v|z, x)."""
        loc, scale, context, reverse_context = self._outputs(x)
        zero, one = loc.new_zeros(len(x), self.auxiliary_dim), loc.new_ones(len(x), self.auxiliary_dim)
        guide.start_at(loc, scale)
        for k, network in enumerate(self.networks):
            at, spread = (zero, one) if k % 2 else (loc, scale)
            weights = local_weights(network, spread, at, context if k == 0 else 0.0)  # type: ignore[arg-type]
            guide.start_network(f"{k}", weights)
        guide.start_network("reverse", local_weights(self.reverse, scale, loc, reverse_context))


class AutoLocalAuxiliaryFlow(AutoLocalNetworks):
    r"""A flow with an auxiliary variable for every datapoint, over all its latent sites in unconstrained space.

    The family of `AmortizedAuxiliaryFlow`, all weights and biases, of the reverse model too, the datapoint's own. It
    starts as a Normal with independent coordinates. It bounds the ELBO of its own marginal q(z_n) from below, because
    the site "_local_latent" is scored with log q(z, v) - log r(v|z); no `augment` is needed. With d latent and a
    auxiliary dimensions and `hidden` = h there are about (6 num_steps + 3) d h weights a datapoint where a = d.

    `auxiliary_dim` is the latents' own dimension if it is not given. Further arguments and errors as for `AutoLocal`.
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
        """The same family, of the same size, for other datapoints."""
        sizes: dict[str, Any] = {"num_steps": self._num_steps, "hidden": self._hidden}
        return AutoLocalAuxiliaryFlow(model, **sizes, auxiliary_dim=self._auxiliary_dim, plate=plate)

    def setup_posterior(self, loc: Tensor) -> None:
        dim = loc.shape[-1]
        self._auxiliary_dim = self._auxiliary_dim or dim
        sizes = enumerate(_sizes(dim, self._auxiliary_dim, self._num_steps))
        networks = {f"{k}": first_weights(read, moved, self._hidden, loc) for k, (read, moved) in sizes}
        self.setup_networks({**networks, "reverse": first_weights(dim, self._auxiliary_dim, self._hidden, loc)})

    def units(self) -> dict[str, Tensor | float]:
        """As of `AutoLocalNetworks`, smaller in outer layers.

        Adam moves many weights the same way, so the output of h units changes by more than sqrt(h) steps. With steps of
        1 / sqrt(h), 200 units ended below 20 of them.
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


class _Beside(Messenger):
    """Runs `statement(value)` right after the site `name`, within its plates."""

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
    """Inputs and outputs of the coupling networks, two to a step."""
    return [(dim, auxiliary_dim), (auxiliary_dim, dim)] * num_steps


def _padded(loc: Tensor, scale: Tensor, auxiliary_dim: int) -> tuple[Tensor, Tensor]:
    """Location and scale of z and v together: v needs none of its own, the first coupling gives it."""
    pad = nn.functional.pad
    return pad(loc, (0, auxiliary_dim)), pad(scale, (0, auxiliary_dim), value=1.0)
