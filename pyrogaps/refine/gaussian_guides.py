"""Gaussian guides of any datapoints of a chunk, refined without Pyro."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyrogaps.density import JointDensity
from pyrogaps.density.local import Draws, LocalGuide
from pyrogaps.gaussians import Gaussian
from pyrogaps.refine.gaussian_form import GaussianForm
from pyrogaps.streams import Chunk


@dataclass(frozen=True)
class Subset(Chunk):
    """Some datapoints of a chunk, `chosen` in increasing order. Blocks keep their streams."""

    chosen: Tensor = field(compare=False)

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def indices(self) -> Tensor:
        return self.chosen

    def blocks(self) -> Iterator[Chunk]:
        for block in super().blocks():
            within = self.chosen[(self.chosen >= block.start) & (self.chosen < block.stop)]
            if len(within):
                yield Subset(block.start, block.stop, within)


class GaussianGuides:
    """Gaussians of the family of `form` for a subset of its datapoints; see `Refinable`.

    The scales are freed by their logarithms, which are on the diagonal of a factor; units are as in `FreedGuide`. What
    the family does not free has units of 0, so that no step moves it.
    """

    def __init__(self, form: GaussianForm, start: Gaussian, subset: Subset) -> None:
        self.joint, self._start, self._subset = form.joint, start, subset
        loc_unit, scale_unit = (free.to(start.loc.dtype) for free in (form.free_loc, form.free_scale))
        if form.blocks is None:
            raw, spread = start.matrix.log(), start.matrix
            raw_unit = scale_unit.expand_as(raw)
        else:
            diagonal = start.matrix.diagonal(dim1=-2, dim2=-1)
            spread = start.matrix.norm(dim=-1)
            raw = start.matrix.tril(-1) + torch.diag_embed(diagonal.log())
            lower = (spread[..., None] * form.blocks).tril(-1) + torch.eye(raw.shape[-1], dtype=raw.dtype).to(raw)
            raw_unit = lower * scale_unit[:, None]
        self.parameters: list[Tensor] = [value.clone().requires_grad_() for value in (start.loc, raw)]
        self.units: list[Tensor | float] = [loc_unit * spread, raw_unit]
        self.axes, self.rows = [0, 0], [slice(None), slice(None)]

    def at(self, indices: Tensor) -> LocalGuide:
        """The Gaussians at `indices` of the subset, differentiable in `parameters`."""
        return self._at(indices)

    def gaussian(self) -> Gaussian:
        """The Gaussians of all datapoints of the subset."""
        with torch.no_grad():
            return self._at(self._subset.indices).gaussian

    def _at(self, indices: Tensor) -> "LocalGaussian":
        rows = torch.searchsorted(self._subset.indices, indices).to(self.parameters[0].device)
        loc, raw = (parameter[rows] for parameter in self.parameters)
        scale = raw.exp() if raw.dim() == 2 else raw.tril(-1) + torch.diag_embed(raw.diagonal(dim1=-2, dim2=-1).exp())
        return LocalGaussian(self.joint, indices, replace(self._start.at(rows), loc=loc, scale=scale))


@dataclass
class LocalGaussian:
    """Gaussians at some datapoints, see `LocalGuide`."""

    joint: JointDensity
    indices: Tensor
    gaussian: Gaussian

    def sample(self, num_particles: int, antithetic: bool = False) -> Draws:
        """Draws `z` `(S, B, dim)` and log q `(S, B)`; `antithetic` mirrors half of them."""
        loc = self.gaussian.loc
        mirrored = antithetic and num_particles % 2 == 0
        shape = (num_particles // 2 if mirrored else num_particles, *loc.shape)
        noise = torch.randn(shape, dtype=loc.dtype, device=loc.device)
        z = self.gaussian.draw(torch.cat([noise, -noise]) if mirrored else noise)
        return z, self.log_prob(z)

    def log_prob(self, z: Tensor) -> Tensor:
        """log q `(S, B)` of `z` `(S, B, dim)`."""
        return self.gaussian.log_density(z)[0]
