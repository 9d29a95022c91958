r"""Covariances of many latents: a diagonal and a few directions, never a matrix.

$$L = D \,(I + U \,\mathrm{diag}(f - 1)\, U^T), \quad U^T U = I$$

so that, with $M(h) = I + U \,\mathrm{diag}(h - 1)\, U^T$,

$$L^T = M(f) D, \quad L^{-1} = M(1/f) D^{-1}, \quad L^{-T} L^{-1} = D^{-1} M(f^{-2}) D^{-1}, \quad
  \log |L| = \sum_i \log D_i + \sum_r \log f_r$$

Each costs 2 dim R multiplications per vector. L is not triangular.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class LowRank:
    """Factors L of the covariances of B datapoints, see above; a `Factor` of `hmc`.

    Attributes:
        diagonal: D, positive, `(B, dim)`.
        axes: U, orthonormal columns or columns of zeros, `(B, dim, R)`; 0 in coordinates that are not active.
        factors: f, positive, `(B, R)`; an axis with factor 1 has no effect.
    """

    diagonal: Tensor
    axes: Tensor
    factors: Tensor

    def apply(self, vector: Tensor) -> Tensor:
        """`L v` for v `(S, B, dim)`."""
        return self.diagonal * self._scaled(vector, self.factors)

    def apply_transpose(self, vector: Tensor) -> Tensor:
        """`L^T v`, as `apply`."""
        return self._scaled(self.diagonal * vector, self.factors)

    def solve(self, vector: Tensor) -> Tensor:
        """`L^-1 v`, as `apply`."""
        return self._scaled(vector / self.diagonal, self.factors.reciprocal())

    def precision(self, vector: Tensor) -> Tensor:
        """`L^-T L^-1 v`, as `apply`."""
        return self._scaled(vector / self.diagonal, self.factors.square().reciprocal()) / self.diagonal

    @property
    def precision_diagonal(self) -> Tensor:
        """The diagonal of the precision, `(B, dim)`."""
        rest = (self.factors.square().reciprocal() - 1)[:, None, :]
        return (1 + (self.axes.square() * rest).sum(-1)) / self.diagonal.square()

    @property
    def log_factors(self) -> Tensor:
        """What the axes add to log |L|, `(B,)`."""
        return self.factors.log().sum(-1)

    def at(self, positions: Tensor) -> "LowRank":
        """Those of the datapoints at `positions`, which may repeat."""
        return LowRank(self.diagonal[positions], self.axes[positions], self.factors[positions])

    def widened(self, factor: float | Tensor) -> "LowRank":
        """The same times `factor`, a number or `(B,)`."""
        factor = factor[:, None] if isinstance(factor, Tensor) else factor
        return replace(self, diagonal=factor * self.diagonal)

    def dense(self) -> Tensor:
        """L as matrices, `(B, dim, dim)`: for few latents, or few datapoints."""
        stretch = (self.axes * (self.factors - 1)[:, None, :]) @ self.axes.mT
        identity = torch.eye(self.diagonal.shape[-1], dtype=self.axes.dtype, device=self.axes.device)
        return self.diagonal[..., None] * (identity + stretch)

    def padded(self, rank: int) -> "LowRank":
        """The same with `rank` axes, at least as many as there are; the added ones have no effect."""
        more = rank - self.factors.shape[-1]
        return LowRank(self.diagonal, pad(self.axes, (0, more)), pad(self.factors, (0, more), value=1.0))

    def to(self, dtype: torch.dtype) -> "LowRank":
        """The same in another precision."""
        return LowRank(self.diagonal.to(dtype), self.axes.to(dtype), self.factors.to(dtype))

    def where(self, condition: Tensor, other: "LowRank") -> "LowRank":
        """These at the datapoints where `condition` `(B,)` is True, else those of `other`, of the same rank."""
        return LowRank(
            torch.where(condition[:, None], self.diagonal, other.diagonal),
            torch.where(condition[:, None, None], self.axes, other.axes),
            torch.where(condition[:, None], self.factors, other.factors),
        )

    @classmethod
    def joined(cls, parts: "Sequence[LowRank]") -> "LowRank":
        """Those of the datapoints of all parts, one after the other."""
        return cls(
            torch.cat([part.diagonal for part in parts]),
            torch.cat([part.axes for part in parts]),
            torch.cat([part.factors for part in parts]),
        )

    def _scaled(self, vector: Tensor, factors: Tensor) -> Tensor:
        along = torch.einsum("bdr,sbd->sbr", self.axes, vector)
        return vector + torch.einsum("bdr,sbr->sbd", self.axes, (factors - 1) * along)
