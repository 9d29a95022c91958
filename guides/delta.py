"""A deterministic encoder: an MLP maps each datapoint to one latent."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pyrogaps.guides.amortized import Amortized


class AmortizedDelta(Amortized):
    """z = h(x) by an MLP: the encoder that `pyrogaps.MAPA_ELBO` trains with a model.

    A Pyro guide: `guide(x)` with `x` `(N, *event)`; site "z" `(N, latent_dim)`, a Delta, in the plate "data". It has no
    density, so it gives no bound on log p(x). Arguments and errors are those of `AmortizedNormal`.
    """

    def __init__(
        self,
        data_dim: int = 64,
        latent_dim: int = 8,
        hidden: Sequence[int] = (100, 100),
        activation: str = "ELU",
        features: nn.Module | None = None,
    ) -> None:
        super().__init__(data_dim, latent_dim, hidden, activation, 1.0, latent_dim, features)

    def forward(self, x: Tensor) -> Tensor:
        """Run the encoder on `x` `(N, *event)`; returns z, shape `(N, latent_dim)`."""
        with pyro.plate("data", len(x)):
            z: Tensor = pyro.sample("z", dist.Delta(self.encode(x), event_dim=1))
        return z
