"""Convolutions from images to vectors and back, and a convolutional variational autoencoder."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrogaps.errors import InputError
from pyrogaps.likelihoods.discretised_logistic import DiscretisedLogistic
from pyrogaps.models.mlp import activation_kind
from pyrogaps.models.vae import Decoded

Size = tuple[int, int]


class ConvolutionalFeatures(nn.Module):
    """Strided convolutions with batch normalisation and activations, from an image to a vector.

    Maps `(N, *event)`, one image of `image_shape` (channels, height, width) per event, to `(N, num_features)`.
    `channels` are the numbers of output channels; `activation` is the name of a `torch.nn` activation. A layer maps
    height h to (h + 2 padding - kernel_size) // stride + 1: with the defaults 32, 15, 6, 2, so `num_features` is
    256 x 2 x 2.

    Batch normalisation uses the batch's statistics in training mode and running statistics in evaluation mode, where
    images do not affect each other. The defaults are the CIFAR-10 encoder of Cremer, Li and Duvenaud, arXiv:1801.03558.

    Raises `InputError` for settings that leave no pixels, and for input of another size than `image_shape`.
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (3, 32, 32),
        channels: Sequence[int] = (64, 128, 256),
        kernel_size: int = 4,
        stride: int = 2,
        padding: int = 0,
        activation: str = "ELU",
    ) -> None:
        super().__init__()
        kind = activation_kind(activation)
        sizes = _sizes(type(self).__name__, image_shape, channels, kernel_size, stride, padding)
        self.image_shape = tuple(image_shape)
        self.num_features = channels[-1] * math.prod(sizes[-1])
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise([image_shape[0], *channels]):
            layers += [nn.Conv2d(inputs, outputs, kernel_size, stride, padding), nn.BatchNorm2d(outputs), kind()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if x[0].numel() != math.prod(self.image_shape):
            shape, size = list(self.image_shape), math.prod(self.image_shape)
            raise InputError(
                f"{type(self).__name__}: image_shape is {shape} ({size} elements), but a datapoint has "
                f"{x[0].numel()} elements. Set image_shape to the data's shape."
            )
        images = x.reshape(-1, *self.image_shape).to(next(self.layers.parameters()).dtype)
        features: Tensor = self.layers(_channels_last(images)).flatten(1)
        return features


class ConvolutionalDecoder(nn.Module):
    """The mirror image of `ConvolutionalFeatures`: a linear map, an activation, and transposed convolutions.

    Maps `(..., latent_dim)` to `(..., *image_shape)`, with batch normalisation and an activation between consecutive
    transposed convolutions. The settings are those of the mirrored convolutions; each layer restores exactly the input
    size of its counterpart. Raises `InputError` for settings that leave no pixels.
    """

    def __init__(
        self,
        latent_dim: int = 50,
        image_shape: Sequence[int] = (3, 32, 32),
        channels: Sequence[int] = (64, 128, 256),
        kernel_size: int = 4,
        stride: int = 2,
        padding: int = 0,
        activation: str = "ELU",
    ) -> None:
        super().__init__()
        kind = activation_kind(activation)
        sizes = _sizes(type(self).__name__, image_shape, channels, kernel_size, stride, padding)
        self.image_shape, self.start_shape = tuple(image_shape), (channels[-1], *sizes[-1])
        self.linear, self.activation = nn.Linear(latent_dim, math.prod(self.start_shape)), kind()
        layers: list[nn.Module] = []
        mirrored = zip(pairwise(reversed([image_shape[0], *channels])), reversed(sizes[:-1]), strict=True)
        for (inputs, outputs), (height, width) in mirrored:
            remainder = ((height + 2 * padding - kernel_size) % stride, (width + 2 * padding - kernel_size) % stride)
            layers.append(nn.ConvTranspose2d(inputs, outputs, kernel_size, stride, padding, remainder))
            layers += [nn.BatchNorm2d(outputs), kind()]
        self.layers = nn.Sequential(*layers[:-2])

    def forward(self, z: Tensor) -> Tensor:
        start = self.activation(self.linear(z)).reshape(-1, *self.start_shape)
        images: Tensor = self.layers(_channels_last(start))
        return images.reshape(*z.shape[:-1], *self.image_shape)


class ConvolutionalVAE(Decoded):
    r"""z ~ N(0, I), x | z by transposed convolutions f: Bernoulli(logits = f(z)), or a discretised logistic.

    $$x_{cij} \sim \mathrm{DiscretisedLogistic}(1/2 + f_{cij}(z), s_c)$$

    A Pyro model: `vae(x)` with `x` of shape `(N, *event)`, one image of `image_shape` per event; sites "z"
    `(N, latent_dim)` and "x" in the plate "data". "bernoulli" is for zeros and ones (one bit per channel, like the
    CIFAR-10 of Cremer, Li and Duvenaud, arXiv:1801.03558). "discretised_logistic" is for grey values k/255; its scales
    s_c, one per channel, are learned starting at `noise_scale`. f is a `ConvolutionalDecoder`, which documents the
    other settings. In evaluation mode the density of an image does not depend on the other images.

    Raises `InputError` for invalid settings, and for `x` of another size than `image_shape`.
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (3, 32, 32),
        latent_dim: int = 50,
        channels: Sequence[int] = (64, 128, 256),
        kernel_size: int = 4,
        stride: int = 2,
        padding: int = 0,
        activation: str = "ELU",
        likelihood: Literal["bernoulli", "discretised_logistic"] = "bernoulli",
        noise_scale: float = 0.1,
    ) -> None:
        decoder = ConvolutionalDecoder(latent_dim, image_shape, channels, kernel_size, stride, padding, activation)
        super().__init__(math.prod(image_shape), latent_dim, decoder)
        self.check_choice("likelihood", likelihood, ("bernoulli", "discretised_logistic"))
        self.check_positive("noise_scale", noise_scale)
        self.likelihood = likelihood
        if likelihood == "discretised_logistic":
            self.log_noise_scale = nn.Parameter(torch.full((image_shape[0], 1, 1), math.log(noise_scale)))

    def decode(self, z: Tensor, event_shape: torch.Size) -> dist.TorchDistribution:
        """p(x|z) for `z` `(..., latent_dim)`, over events of shape `event_shape`."""
        output = self.decoder(z)
        shape = z.shape[:-1] + event_shape
        if self.likelihood == "bernoulli":
            pixels: dist.TorchDistribution = dist.Bernoulli(logits=output.reshape(shape))
        else:
            scale = self.log_noise_scale.exp().expand_as(output)
            pixels = DiscretisedLogistic((0.5 + output).reshape(shape), scale.reshape(shape))
        likelihood: dist.TorchDistribution = pixels.to_event(len(event_shape))
        return likelihood


def _sizes(
    name: str, image_shape: Sequence[int], channels: Sequence[int], kernel_size: int, stride: int, padding: int
) -> list[Size]:
    """Height and width of the image and of every layer's output; `InputError` if one is below 1."""
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise InputError(
            f"{name}: image_shape must be (channels, height, width), each at least 1, got {list(image_shape)}"
        )
    if not channels or min(channels) < 1:
        raise InputError(f"{name}: channels must be a non-empty list of positive integers, got {list(channels)}")
    if min(kernel_size, stride) < 1 or padding < 0:
        raise InputError(
            f"{name}: kernel_size and stride must be at least 1 and padding at least 0, "
            f"got {kernel_size}, {stride} and {padding}"
        )
    sizes = [(image_shape[1], image_shape[2])]
    for number in range(len(channels)):
        height, width = ((size + 2 * padding - kernel_size) // stride + 1 for size in sizes[-1])
        if min(height, width) < 1:
            raise InputError(
                f"{name}: {len(channels)} layers are too many for {image_shape[1]} x {image_shape[2]} pixels; the "
                f"input of layer {number + 1} is only {sizes[-1][0]} x {sizes[-1][1]}, but kernel_size is "
                f"{kernel_size}. Use fewer layers."
            )
        sizes.append((height, width))
    return sizes


def _channels_last(images: Tensor) -> Tensor:
    """`images` `(N, channels, height, width)` in the memory layout that is fastest for CPU convolutions."""
    return images.contiguous(memory_format=torch.channels_last)
