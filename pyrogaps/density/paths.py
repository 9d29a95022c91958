"""`Paths`: draws of a guide along which gradients are known, with weights where discrete sites take every state."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pyrogaps.density.local import Draws

# So many nats below the least probable other path, a path that the model gives density 0 counts in gradients.
IMPOSSIBLE = 100.0


@dataclass(frozen=True)
class Paths:
    r"""Draws of a guide for B datapoints, and log q as a function of the draws alone.

    Where a guide draws discrete sites y, each of S particles takes all of their K joint states, with the same noise
    otherwise: P = K S paths, of which path k S + s has the weight

    $$w_{ks} = \prod_e q(y_{k,e} \mid x, \text{earlier draws}), \qquad \sum_k w_{ks} = 1.$$

    Attributes:
        z: `(P, B, dim)`.
        log_q: `(P, B)`, in nats.
        log_weights: `(P, B)`, differentiable; None where no site is enumerated, so that P = S.
        num_particles: S.
    """

    z: Tensor
    log_q: Tensor
    log_weights: Tensor | None = None
    num_particles: int = 0

    @classmethod
    def joined(cls, parts: Sequence["Paths"]) -> "Paths":
        """The paths of several groups of datapoints side by side."""
        weights = [part.log_weights for part in parts if part.log_weights is not None]
        log_weights = torch.cat(weights, 1) if weights else None
        z, log_q = torch.cat([part.z for part in parts], 1), torch.cat([part.log_q for part in parts], 1)
        return cls(z, log_q, log_weights, parts[0].num_particles)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over particles of the expectation of `values` `(P, B)` over their paths, `(B,)`.

        No gradient reaches the weights.
        """
        if self.log_weights is None:
            return values.mean(0)
        weights = self.log_weights.detach().to(values).exp()
        weighted = torch.where(weights > 0, weights * values, torch.zeros_like(values))
        return weighted.sum(0) / self.num_particles

    def of_weights(self, values: Tensor) -> Tensor:
        r"""A function `(B,)` whose gradient is that of `mean(values)` in the weights alone, with `values` constant:
        $\sum_k w_k (f_k - \bar f) \log w_k$, where $\bar f = \sum_k w_k f_k$ is the mean of a particle.
        """
        if self.log_weights is None:
            return torch.zeros_like(values[0])
        by_particle = (-1, self.num_particles, values.shape[1])
        weights, f = self.log_weights.detach().exp().reshape(by_particle), values.detach().reshape(by_particle)
        finite = torch.isfinite(f) & (weights > 0)
        lowest = torch.where(finite, f, torch.inf).amin(0)
        lowest = torch.where(torch.isfinite(lowest), lowest, torch.zeros_like(lowest))
        f = torch.where(finite, f, lowest - IMPOSSIBLE)
        advantage = weights * (f - (weights * f).sum(0))
        logs = self.log_weights.reshape(by_particle)
        return torch.where(weights > 0, advantage * logs, torch.zeros_like(logs)).sum(0).mean(0)


@runtime_checkable
class KnowsPath(Protocol):
    """A `LocalGuide` that knows the gradients of its draws, and of log q at the draws alone, from one run."""

    def sample_path(self, num_particles: int, antithetic: bool = False) -> Draws: ...


@runtime_checkable
class Enumerates(Protocol):
    """A `LocalGuide` whose discrete sites can take all their joint states, for each of `num_particles` draws."""

    def sample_paths(self, num_particles: int, antithetic: bool = False) -> Paths: ...
