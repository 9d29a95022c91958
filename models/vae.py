"""The generative model of a variational autoencoder: standard Normal latent, MLP decoder, independent pixels."""

import math
from collections.abc import Sequence
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrogaps.errors import InputError
from pyrogaps.models.mlp import mlp


class Decoded(nn.Module):
    """z ~ N(0, I), x | z ~ `decode(z)`: base class of the variational autoencoders.

    A subclass implements `decode`. All computations use the dtype of the weights of `decoder`.
    """

    def __init__(self, data_dim: int, latent_dim: int, decoder: nn.Module) -> None:
        super().__init__()
        self.data_dim, self.latent_dim, self.decoder = data_dim, latent_dim, decoder

    def forward(self, x: Tensor) -> Tensor:
        """Run the model on `x` `(N, *event)`; returns z, shape `(N, latent_dim)`."""
        if x[0].numel() != self.data_dim:
            name = type(self).__name__
            raise InputError(
                f"{name}: data_dim is {self.data_dim}, but a datapoint has {x[0].numel()} elements. Make them equal."
            )
        weight = next(self.decoder.parameters())
        with pyro.plate("data", len(x)):
            z: Tensor = pyro.sample("z", dist.Normal(weight.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", self.decode(z, x.shape[1:]), obs=x.to(weight.dtype))
        return z

    def decode(self, z: Tensor, event_shape: torch.Size) -> dist.TorchDistribution:
        """p(x|z) for `z` `(..., latent_dim)`, over events of shape `event_shape`."""
        raise NotImplementedError

    def check_choice(self, name: str, value: str, choices: tuple[str, ...]) -> None:
        """Raise `InputError` for a setting that is not one of its choices."""
        if value not in choices:
            raise InputError(f"{type(self).__name__}: {name} must be one of {', '.join(choices)}, got '{value}'")

    def check_positive(self, name: str, value: float) -> None:
        """Raise `InputError` for a setting that is not positive."""
        if not value > 0:
            raise InputError(f"{type(self).__name__}: {name} must be positive, got {value}")


class VAE(Decoded):
    """z ~ N(0, I), x | z ~ Bernoulli(logits = f(z)) or N(f(z), noise_scale^2) (Kingma and Welling, arXiv:1312.6114).

    A Pyro model: `vae(x)` with `x` of shape `(N, *event)`, `data_dim` elements per event; sites "z" `(N, latent_dim)`
    and "x" in the plate "data". `hidden` are the widths of the decoder's hidden layers (empty: a linear decoder),
    `activation` is the name of a `torch.nn` activation. The noise scale of a Gaussian likelihood is "fixed" at
    `noise_scale`, or learned starting there: one for all pixels ("learned"), or one for each ("per_pixel").

    Raises `InputError` for invalid settings, and for `x` of another size than `data_dim`.
    """

    def __init__(
        self,
        data_dim: int = 64,
        latent_dim: int = 8,
        hidden: Sequence[int] = (100, 100),
        activation: str = "ELU",
        likelihood: Literal["bernoulli", "gaussian"] = "bernoulli",
        noise: Literal["fixed", "learned", "per_pixel"] = "fixed",
        noise_scale: float = 0.1,
    ) -> None:
        super().__init__(data_dim, latent_dim, mlp([latent_dim, *hidden, data_dim], activation))
        self.check_choice("likelihood", likelihood, ("bernoulli", "gaussian"))
        self.check_choice("noise", noise, ("fixed", "learned", "per_pixel"))
        self.check_positive("noise_scale", noise_scale)
        self.likelihood = likelihood
        if likelihood == "gaussian":
            log_scale = torch.full((data_dim if noise == "per_pixel" else 1,), math.log(noise_scale))
            self.log_noise_scale = nn.Parameter(log_scale, requires_grad=noise != "fixed")

    def decode(self, z: Tensor, event_shape: torch.Size) -> dist.TorchDistribution:
        """p(x|z) for `z` `(..., latent_dim)`, over events of shape `event_shape`."""
        output = self.decoder(z)
        shape = output.shape[:-1] + event_shape
        if self.likelihood == "bernoulli":
            pixels: dist.TorchDistribution = dist.Bernoulli(logits=output.reshape(shape))
        else:
            scale = self.log_noise_scale.exp().expand(self.data_dim).reshape(event_shape)
            pixels = dist.Normal(output.reshape(shape), scale)
        likelihood: dist.TorchDistribution = pixels.to_event(len(event_shape))
        return likelihood
