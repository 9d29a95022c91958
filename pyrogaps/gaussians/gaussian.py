"""`Gaussian`: one for each datapoint, with its density, draws and factor."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pyrogaps.hmc import apply_scale


@dataclass(frozen=True)
class Gaussian:
    """N(loc, L L^T) for each of B datapoints, with `loc (B, dim)`.

    `scale` is a diagonal `(B, dim)` or factors L `(B, dim, dim)`.

    Coordinates that are not `active` `(B, dim)`, such as those past the end of a sequence, are in no density: they are
    0 in draws and count for nothing in the density, and L does not mix them with others.
    """

    loc: Tensor
    scale: Tensor
    active: Tensor | None = None

    def draw(self, noise: Tensor) -> Tensor:
        """Points `(S, B, dim)` from standard noise of that shape."""
        return self.kept(self.loc + apply_scale(self.scale, noise))

    def log_density(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The log density `(S, B)` and its gradient `(S, B, dim)`."""
        return self.peak - 0.5 * self.whiten(z).square().sum(-1), self.gradient(z)

    def whiten(self, z: Tensor) -> Tensor:
        """L^-1 (z - loc), `(S, B, dim)`."""
        centred = self.kept(z - self.loc)
        if self.scale.dim() == 2:
            return centred / self.scale
        # Not by the precision: its rounding errors grow with the square of the correlations.
        return torch.einsum("bij,sbj->sbi", self._inverse, centred)

    def gradient(self, z: Tensor) -> Tensor:
        """The gradient of the log density, `(S, B, dim)`."""
        centred = self.kept(self.loc - z)
        if self.scale.dim() == 2:
            return centred * self._precision
        return torch.einsum("bij,sbj->sbi", self._precision, centred)

    def at(self, positions: Tensor) -> "Gaussian":
        """The Gaussians of the datapoints at `positions`, which may repeat."""
        return Gaussian(
            self.loc[positions], self.scale[positions], None if self.active is None else self.active[positions]
        )

    def widened(self, factor: float) -> "Gaussian":
        """The same Gaussians with all scales times `factor`."""
        return replace(self, scale=factor * self.scale)

    def with_replaced(self, positions: Tensor, other: "Gaussian") -> "Gaussian":
        """The same Gaussians, with `other` `(M, ...)` for the datapoints at `positions` `(M,)`, as factors."""
        loc, scale = self.loc.clone(), self.factor()
        loc[positions], scale[positions] = other.loc, other.scale
        return replace(self, loc=loc, scale=scale)

    def factor(self) -> Tensor:
        """L of every datapoint, `(B, dim, dim)`, a copy."""
        return torch.diag_embed(self.scale) if self.scale.dim() == 2 else self.scale.clone()

    @cached_property
    def moves(self) -> Tensor:
        """`scale` as the preconditioner of moves: those that are not active stay where they are."""
        if self.active is None:
            return self.scale
        active = self.active if self.scale.dim() == 2 else self.active[..., None]
        return torch.where(active, self.scale, torch.zeros_like(self.scale))

    def kept(self, z: Tensor) -> Tensor:
        """`z` `(*, B, dim)` with 0 in what is not active."""
        return z if self.active is None else torch.where(self.active, z, torch.zeros_like(z))

    @cached_property
    def _inverse(self) -> Tensor:
        identity = torch.eye(self.scale.shape[-1], dtype=self.scale.dtype, device=self.scale.device)
        inverse: Tensor = torch.linalg.solve_triangular(self.scale, identity.expand_as(self.scale), upper=False)
        return inverse

    @cached_property
    def _precision(self) -> Tensor:
        if self.scale.dim() == 2:
            return self.scale.square().reciprocal()
        return torch.cholesky_inverse(self.scale)

    @cached_property
    def peak(self) -> Tensor:
        """The log density at the mean, `(B,)`."""
        diagonal = self.scale if self.scale.dim() == 2 else self.scale.diagonal(dim1=-2, dim2=-1)
        return -self.kept(diagonal.log() + 0.5 * math.log(2 * math.pi)).sum(-1)
