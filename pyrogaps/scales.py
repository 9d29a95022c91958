"""`Scale`: a factor L of covariances L L^T in any of its forms, and products with it."""

from typing import Protocol

import torch
from torch import Tensor


class Factor(Protocol):
    """A factor L of the covariance of B datapoints that is not held as a matrix, such as one of low rank."""

    @property
    def diagonal(self) -> Tensor:
        """`(B, dim)`, in the precision and on the device of the factor."""
        ...

    def apply(self, vector: Tensor) -> Tensor:
        """`L v` for v `(S, B, dim)`."""
        ...

    def apply_transpose(self, vector: Tensor) -> Tensor:
        """`L^T v`, as `apply`."""
        ...


# Standard deviations `(B, dim)`, lower-triangular factors `(B, dim, dim)`, or a `Factor`.
Scale = Tensor | Factor


def apply_scale(scale: Scale, vector: Tensor) -> Tensor:
    """`L v` for a `Scale` and v `(S, B, dim)`."""
    if not isinstance(scale, Tensor):
        return scale.apply(vector)
    if scale.dim() == 2:
        return scale * vector
    return torch.einsum("bij,sbj->sbi", scale, vector)


def apply_transpose(scale: Scale, vector: Tensor) -> Tensor:
    """`L^T v`, as `apply_scale`."""
    if not isinstance(scale, Tensor):
        return scale.apply_transpose(vector)
    if scale.dim() == 2:
        return scale * vector
    return torch.einsum("bij,sbi->sbj", scale, vector)
