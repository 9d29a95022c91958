"""Amortized Gaussian guides: an MLP maps each datapoint to mean and scale of q(z|x)."""

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
    """Base class with an encoder from `(N, *event)` to `(N, num_outputs)`.

    The encoder is an MLP on a datapoint's elements or on the output of `features`, any module from `(N, *event)` to
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
            raise InputError(
                f"{type(self).__name__}: features {kind} has no integer attribute num_features. Set it to the length "
                "of its output."
            )
        return number

    def seen(self, x: Tensor) -> Tensor:
        """The part of `x` that the encoder reads, of the same shape: all of it, unless a subclass hides some."""
        return x

    def encode(self, x: Tensor) -> Tensor:
        if x[0].numel() != self.data_dim:
            name = type(self).__name__
            raise InputError(
                f"{name}: data_dim is {self.data_dim}, but a datapoint has {x[0].numel()} elements. Make them equal."
            )
        x = self.seen(x)
        inputs = x.reshape(len(x), -1) if self.features is None else self.features(x)
        outputs: Tensor = self.encoder(inputs.to(next(self.encoder.parameters()).dtype))
        return outputs

    def positive(self, raw: Tensor) -> Tensor:
        """softplus plus `min_scale`: a scale that underflows would make log q infinite."""
        return softplus(raw) + self.min_scale


class AmortizedNormal(Amortized):
    """q(z|x) = N(mean(x), diag(scale(x)^2)); one MLP computes mean and softplus^-1(scale - min_scale).

    A Pyro guide: `guide(x)` with `x` `(N, *event)`, `data_dim` elements per event; site "z" `(N, latent_dim)` in the
    plate "data". `hidden` are the widths of the hidden layers, `activation` is the name of a `torch.nn` activation.
    With `features`, a module from `(N, *event)` to `(N, features.num_features)` such as
    `pyrogaps.models.convolutional.ConvolutionalFeatures`, the MLP reads its output; `hidden` may then be empty.

    Raises `InputError` for `x` of another size than `data_dim`, and for `features` without `num_features`.
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
    """q(z|x) = N(mean(x), T(x) T(x)') with T lower triangular; one MLP computes mean and T.

    Arguments, sites and errors are those of `AmortizedNormal`; the diagonal of T is at least `min_scale`.
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
