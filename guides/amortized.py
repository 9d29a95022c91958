"""Amortized Gaussian guides: an MLP maps each datapoint to the mean and scale of its q(z|x)."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyrogaps.errors import InputError
from pyrogaps.family import AmortizedGuide
from pyrogaps.models.mlp import mlp


class Amortized(AmortizedGuide, nn.Module):
    """The encoder, `(N, *event)` to `(N, num_outputs)`, and what its subclasses do alike.

    An MLP reads a datapoint's elements, or what `features` makes of them: any module from `(N, *event)` to
    `(N, features.num_features)`. Raises `InputError` for `features` without `num_features`.
    """

    def __init__(
        self,
        data_dim: int,
        latent_dim: int,
        hidden: Sequence[int],
        activation: str,
        min_scale: float,
        num_outputs: int,
        features: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not min_scale > 0:
            raise InputError(f"{type(self).__name__}: min_scale must be positive, got {min_scale}")
        self.data_dim, self.latent_dim, self.min_scale = data_dim, latent_dim, min_scale
        self.features = features
        num_inputs = data_dim if features is None else self._num_features(features)
        self.encoder = mlp([num_inputs, *hidden, num_outputs], activation)

    def _num_features(self, features: nn.Module) -> int:
        number = getattr(features, "num_features", None)
        if not isinstance(number, int):
            kind = type(features).__name__
            raise InputError(f"{type(self).__name__}: features must say how many there are: {kind} has no num_features")
        return number

    def seen(self, x: Tensor) -> Tensor:
        """What the encoder reads of `x`, of its shape: all of it, unless a subclass is shown less."""
        return x

    def encode(self, x: Tensor) -> Tensor:
        if x[0].numel() != self.data_dim:
            name = type(self).__name__
            raise InputError(f"{name}: data_dim is {self.data_dim}, but a datapoint has {x[0].numel()} elements")
        x = self.seen(x)
        inputs = x.reshape(len(x), -1) if self.features is None else self.features(x)
        outputs: Tensor = self.encoder(inputs.to(next(self.encoder.parameters()).dtype))
        return outputs

    def positive(self, raw: Tensor) -> Tensor:
        """softplus, bounded away from 0: a scale that underflows would make log q infinite."""
        return softplus(raw) + self.min_scale


class AmortizedNormal(Amortized):
    """q(z|x) = N(mean(x), diag(scale(x)^2)), mean and softplus^-1(scale - min_scale) by one MLP.

    A Pyro guide: `guide(x)` with `x` `(N, *event)`, `data_dim` elements per event; site "z" `(N, latent_dim)` in the
    plate "data". `hidden` are the widths of the hidden layers, `activation` names a `torch.nn` activation. With
    `features`, a module from `(N, *event)` to `(N, features.num_features)` such as
    `pyrogaps.models.convolutional.ConvolutionalFeatures`, the MLP reads these; `hidden` may then well be empty.

    Raises `InputError` for `x` of another size than `data_dim`, and for `features` that do not say how many they are.
    """

    def __init__(
        self,
        data_dim: int = 64,
        latent_dim: int = 8,
        hidden: Sequence[int] = (100, 100),
        activation: str = "ELU",
        min_scale: float = 1e-4,
        features: nn.Module | None = None,
    ) -> None:
        super().__init__(data_dim, latent_dim, hidden, activation, min_scale, 2 * latent_dim, features)

    def forward(self, x: Tensor) -> Tensor:
        """Run the guide on `x` `(N, *event)`; returns z, shape `(N, latent_dim)`."""
        mean, scale = self.parameters_of(x)
        with pyro.plate("data", len(x)):
            z: Tensor = pyro.sample("z", dist.Normal(mean, scale).to_event(1))
        return z

    def parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of q(z|x), each `(N, latent_dim)`."""
        mean, raw = self.encode(x).chunk(2, -1)
        return mean, self.positive(raw)


class AmortizedMultivariateNormal(Amortized):
    """q(z|x) = N(mean(x), T(x) T(x)'), T lower triangular with a positive diagonal, all by one MLP.

    Arguments, sites and errors as in `AmortizedNormal`; `min_scale` bounds the diagonal of T.
    """

    def __init__(
        self,
        data_dim: int = 64,
        latent_dim: int = 8,
        hidden: Sequence[int] = (100, 100),
        activation: str = "ELU",
        min_scale: float = 1e-4,
        features: nn.Module | None = None,
    ) -> None:
        num_outputs = 2 * latent_dim + latent_dim * (latent_dim - 1) // 2
        super().__init__(data_dim, latent_dim, hidden, activation, min_scale, num_outputs, features)

    def forward(self, x: Tensor) -> Tensor:
        """Run the guide on `x` `(N, *event)`; returns z, shape `(N, latent_dim)`."""
        mean, scale_tril = self.parameters_of(x)
        with pyro.plate("data", len(x)):
            z: Tensor = pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=scale_tril))
        return z

    def parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `(N, latent_dim)` and T `(N, latent_dim, latent_dim)` of q(z|x)."""
        d = self.latent_dim
        mean, raw, below = self.encode(x).split([d, d, d * (d - 1) // 2], -1)
        rows, columns = torch.tril_indices(d, d, offset=-1, device=x.device)
        scale_tril = torch.diag_embed(self.positive(raw))
        return mean, scale_tril.index_put((torch.arange(len(x), device=x.device)[:, None], rows, columns), below)
