"""`Gaussian`: one for each datapoint, with its density, draws and factor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pyrogaps.gaussians.low_rank import LowRank
from pyrogaps.scales import apply_scale


@dataclass(frozen=True)
class Gaussian:
    """N(loc, L L^T) for each of B datapoints, with `loc (B, dim)`.

    `scale` is a diagonal `(B, dim)`, lower-triangular factors L `(B, dim, dim)`, or factors of low rank.

    Coordinates that are not `active` `(B, dim)`, such as those past the end of a sequence, are in no density: they are
    0 in draws and count for nothing in the density, and L does not mix them with others.
    """

    loc: Tensor
    scale: Tensor | LowRank
    active: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """`scale`, where it is not of low rank."""
        assert isinstance(self.scale, Tensor)
        return self.scale

    def draw(self, noise: Tensor) -> Tensor:
        """Points `(S, B, dim)` from standard noise of that shape."""
        return self.kept(self.loc + apply_scale(self.scale, noise))

    def log_density(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The log density `(S, B)` and its gradient `(S, B, dim)`."""
        return self.peak - 0.5 * self.whiten(z).square().sum(-1), self.gradient(z)

    def whiten(self, z: Tensor) -> Tensor:
        """L^-1 (z - loc), `(S, B, dim)`."""
        centred = self.kept(z - self.loc)
        if isinstance(self.scale, LowRank):
            return self.scale.solve(centred)
        if self.scale.dim() == 2:
            return centred / self.scale
        # Not by the precision: its rounding errors grow with the square of the correlations.
        return torch.einsum("bij,sbj->sbi", self._inverse, centred)

    def gradient(self, z: Tensor) -> Tensor:
        """The gradient of the log density, `(S, B, dim)`."""
        centred = self.kept(self.loc - z)
        if isinstance(self.scale, LowRank):
            return self.scale.precision(centred)
        if self.scale.dim() == 2:
            return centred * self._precision
        return torch.einsum("bij,sbj->sbi", self._precision, centred)

    def at(self, positions: Tensor) -> "Gaussian":
        """The Gaussians of the datapoints at `positions`, which may repeat."""
        scale = self.scale.at(positions) if isinstance(self.scale, LowRank) else self.scale[positions]
        return Gaussian(self.loc[positions], scale, None if self.active is None else self.active[positions])

    def widened(self, factor: float | Tensor) -> "Gaussian":
        """The same Gaussians with all scales times `factor`, a number or `(B,)`."""
        if isinstance(self.scale, LowRank):
            return replace(self, scale=self.scale.widened(factor))
        if isinstance(factor, Tensor):
            factor = factor.view(-1, *[1] * (self.scale.dim() - 1))
        return replace(self, scale=factor * self.scale)

    def scaled_as(self, other: "Gaussian", where: Tensor) -> "Gaussian":
        """The same, with the scales of `other`, which are diagonal, at the datapoints `where` `(B,)`."""
        diagonal = other.scale
        assert isinstance(diagonal, Tensor)
        if isinstance(own := self.scale, LowRank):
            flat = LowRank(diagonal, own.axes, torch.ones_like(own.factors))
            scale: Tensor | LowRank = flat.where(where, own)
        else:
            scale = torch.where(where[:, None, None], torch.diag_embed(diagonal), self.factor())
        return replace(self, scale=scale)

    def with_replaced(self, positions: Tensor, other: "Gaussian") -> "Gaussian":
        """The same Gaussians, with `other` `(M, ...)` for the datapoints at `positions` `(M,)`.

        Scales stay diagonal where both are; they are factors otherwise.
        """
        diagonal = all(isinstance(scale, Tensor) and scale.dim() == 2 for scale in (self.scale, other.scale))
        scale, replacing = (self.matrix.clone(), other.matrix) if diagonal else (self.factor(), other.factor())
        loc = self.loc.clone()
        loc[positions], scale[positions] = other.loc, replacing
        return replace(self, loc=loc, scale=scale)

    @classmethod
    def joined(cls, parts: "Sequence[Gaussian]") -> "Gaussian":
        """Those of the datapoints of all parts, one after the other, as triangular factors where forms differ."""
        low_rank = [part.scale for part in parts if isinstance(part.scale, LowRank)]
        if len(low_rank) < len(parts):
            low_rank, parts = [], [part.triangular() for part in parts]
        scales = [part.scale for part in parts if isinstance(part.scale, Tensor)]
        active = [part.active for part in parts if part.active is not None]
        scale = LowRank.joined(low_rank) if low_rank else torch.cat(scales)
        return cls(torch.cat([part.loc for part in parts]), scale, torch.cat(active) if active else None)

    def triangular(self) -> "Gaussian":
        """The same Gaussians, with triangular factors in place of those of low rank."""
        if not isinstance(self.scale, LowRank):
            return self
        factor = self.scale.to(torch.float64).dense()
        return replace(self, scale=torch.linalg.cholesky(factor @ factor.mT).to(self.loc.dtype))

    def factor(self) -> Tensor:
        """L of every datapoint, `(B, dim, dim)`, a copy: for few latents, or few datapoints."""
        if isinstance(self.scale, LowRank):
            return self.scale.dense()
        return torch.diag_embed(self.scale) if self.scale.dim() == 2 else self.scale.clone()

    @property
    def precision_diagonal(self) -> Tensor:
        """The diagonal of the precision, `(B, dim)`."""
        if isinstance(self.scale, LowRank):
            return self.scale.precision_diagonal
        return self._precision if self.scale.dim() == 2 else self._precision.diagonal(dim1=-2, dim2=-1)

    @cached_property
    def moves(self) -> Tensor | LowRank:
        """`scale` as the preconditioner of moves: those that are not active stay where they are."""
        if self.active is None:
            return self.scale
        if isinstance(self.scale, LowRank):
            return replace(self.scale, diagonal=self.kept(self.scale.diagonal))
        active = self.active if self.scale.dim() == 2 else self.active[..., None]
        return torch.where(active, self.scale, torch.zeros_like(self.scale))

    def kept(self, z: Tensor) -> Tensor:
        """`z` `(*, B, dim)` with 0 in what is not active."""
        return z if self.active is None else torch.where(self.active, z, torch.zeros_like(z))

    @cached_property
    def _inverse(self) -> Tensor:
        factor = self.factor()
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        inverse: Tensor = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
        return inverse

    @cached_property
    def _precision(self) -> Tensor:
        assert isinstance(self.scale, Tensor)
        if self.scale.dim() == 2:
            return self.scale.square().reciprocal()
        return torch.cholesky_inverse(self.scale)

    @cached_property
    def peak(self) -> Tensor:
        """The log density at the mean, `(B,)`."""
        rest: Tensor | float = 0.0
        if isinstance(self.scale, LowRank):
            diagonal, rest = self.scale.diagonal, self.scale.log_factors
        else:
            diagonal = self.scale if self.scale.dim() == 2 else self.scale.diagonal(dim1=-2, dim2=-1)
        return -self.kept(diagonal.log() + 0.5 * math.log(2 * math.pi)).sum(-1) - rest
