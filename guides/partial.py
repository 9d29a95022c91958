"""An amortized Gaussian guide that sees only part of every datapoint."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyrogaps.errors import InputError
from pyrogaps.guides.amortized import AmortizedNormal


class PartialNormal(AmortizedNormal):
    """q(z|C) = N(mean(C), diag(scale(C)^2)), where C is the part of x that the guide sees.

    `shown` selects the elements in C: a number of leading elements (392 of 784 pixels are the upper half), or a boolean
    mask with one element per element of a datapoint, True for those in C. The encoder reads zeros for the other
    elements. Other arguments, sites and errors are those of `AmortizedNormal`.
    """

    shown: Tensor

    def __init__(
        self,
        data_dim: int = 64,
        latent_dim: int = 8,
        hidden: Sequence[int] = (100, 100),
        activation: str = "ELU",
        min_scale: float = 1e-4,
        features: nn.Module | None = None,
        shown: int | Sequence[Any] | Tensor = 32,
    ) -> None:
        super().__init__(data_dim, latent_dim, hidden, activation, min_scale, features)
        self.register_buffer("shown", _mask(shown, data_dim))

    def conditions(self, x: Tensor) -> Tensor:
        """Boolean mask of the elements that the guide sees, in the shape of a datapoint."""
        return self.shown.reshape(x.shape[1:])

    def seen(self, x: Tensor) -> Tensor:
        return torch.where(self.conditions(x), x, torch.zeros_like(x))


def _mask(shown: int | Sequence[Any] | Tensor, data_dim: int) -> Tensor:
    if isinstance(shown, int):
        if not 0 <= shown <= data_dim:
            raise InputError(f"PartialNormal: shown must be from 0 to data_dim = {data_dim}, got {shown}")
        return torch.arange(data_dim) < shown
    mask = torch.as_tensor(shown)
    if mask.dtype != torch.bool or mask.numel() != data_dim:
        raise InputError(
            f"PartialNormal: shown must be a boolean mask with data_dim = {data_dim} elements, got {mask.dtype} with "
            f"{mask.numel()}"
        )
    return mask.flatten()
