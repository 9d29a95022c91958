"""Guides that are Gaussian in unconstrained space: how to read the Gaussians off them, and how to set them."""

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import LogNormal, MultivariateNormal, Normal

from pyrogaps.density import JointDensity
from pyrogaps.density.draws import BlockedGuide
from pyrogaps.density.layout import leaf
from pyrogaps.density.local import FactorisedGuide, GuideSite
from pyrogaps.gaussians import Gaussian
from pyrogaps.refine.local import Refinable, keep_where
from pyrogaps.refine.parameters import free_leaf
from pyrogaps.streams import Chunk

# Two densities agree to this, in units of the square root of the machine's precision and of their own size.
AGREEMENT = 10.0


@runtime_checkable
class Settable(Protocol):
    """A `Refinable` that can be set to Gaussians, as far as its family contains them."""

    def move_to(self, gaussian: Gaussian) -> bool:
        """Set the free parameters of the guides of a chunk; False where the family has no way to."""
        ...

    def free_columns(self, dim: int) -> tuple[Tensor, Tensor]:
        """Which means, and which scales, are free: booleans `(dim,)` each."""
        ...


@dataclass(frozen=True)
class GaussianForm:
    """The guides of a chunk as Gaussians N(loc, L L^T) in unconstrained space.

    Attributes:
        refinable: the guides.
        joint, chunk: the density and the datapoints that they are for.
        blocks: `(dim, dim)`, True where two coordinates may be correlated; None for independent coordinates.
        free_loc, free_scale: `(dim,)`, what the family frees. The rest stays as the guide has it.
    """

    refinable: Refinable
    joint: JointDensity
    chunk: Chunk
    blocks: Tensor | None
    free_loc: Tensor
    free_scale: Tensor

    def read(self) -> Gaussian:
        """The Gaussians that the guides are now."""
        columns = _columns(self.refinable, self.chunk)
        assert columns is not None
        return _gaussian(columns, self.joint, self.chunk)

    def write(self, gaussian: Gaussian, where: Tensor) -> None:
        """Set the guides of the datapoints `where` `(B,)` to these Gaussians."""
        before = [parameter.detach().clone() for parameter in self.refinable.parameters]
        assert isinstance(self.refinable, Settable)
        self.refinable.move_to(gaussian)
        keep_where(~where, before, self.refinable)


def gaussian_form(refinable: Refinable, joint: JointDensity, chunk: Chunk) -> GaussianForm | None:
    """The form of guides that are Gaussian in unconstrained space and can be set to any Gaussian of their family.

    It is detected by tests. The site distributions must be Normal, LogNormal or multivariate Normal, log q
    must be the Gaussian's log density, and a Gaussian that is set must be read back. Returns None for other
    guides.
    """
    if not isinstance(refinable, Settable):
        return None
    with torch.no_grad():
        columns = _columns(refinable, chunk)
        if columns is None:
            return None
        free_loc, free_scale = refinable.free_columns(joint.dim)
        form = GaussianForm(refinable, joint, chunk, _blocks(columns, joint.dim), free_loc, free_scale)
        gaussian = _gaussian(columns, joint, chunk)
        return form if _is_density(gaussian, refinable, chunk) and _can_be_set(form, gaussian) else None


# The columns of a site, means `(B, size)`, and scales: `(B, size)`, or factors `(B, size, size)`.
_Columns = list[tuple[slice, Tensor, Tensor]]


def _columns(refinable: Refinable, chunk: Chunk) -> _Columns | None:
    parts = [_columns_at(refinable.at(block.indices)) for block in chunk.blocks()]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return [
        (same_site[0][0], *(torch.cat([each[k] for each in same_site]).detach() for k in (1, 2)))
        for same_site in zip(*known, strict=True)
    ]


def _columns_at(local: Any) -> _Columns | None:
    if not isinstance(local, FactorisedGuide) or local.num_auxiliary:
        return None
    # A subclass of a Normal is one too, though its parameters may not be free by name.
    leaves = [free_leaf(fn) or leaf(fn) for fn in (local.distributions[term.name] for term in local.terms)]
    sites = [_columns_of(term, inner, local) for term, inner in zip(local.terms, leaves, strict=True)]
    known = [site for site in sites if site is not None]
    return known if len(known) == len(sites) else None


def _columns_of(term: GuideSite, inner: Any, local: FactorisedGuide) -> tuple[slice, Tensor, Tensor] | None:
    site, rows = term.site, len(local.indices)

    def flat(value: Tensor) -> Tensor:
        value = value.expand(inner.batch_shape + inner.event_shape)
        return site.flatten(value) if local.joint.plate is not None else value.reshape(1, -1)

    if isinstance(inner, Normal | LogNormal):
        loc, scale = flat(inner.loc), flat(inner.scale)
    elif isinstance(inner, MultivariateNormal) and inner.event_shape == (site.size,):
        loc, scale = flat(inner.loc), inner.scale_tril.reshape(-1, site.size, site.size)
    else:
        return None
    return (site.columns, loc, scale) if len(loc) == len(scale) == rows else None


def _blocks(columns: _Columns, dim: int) -> Tensor | None:
    if all(scale.dim() == 2 for _, _, scale in columns):
        return None
    blocks = torch.eye(dim, dtype=torch.bool, device=columns[0][1].device)
    for place, _, scale in columns:
        if scale.dim() == 3:
            blocks[place, place] = True
    return blocks


def _gaussian(columns: _Columns, joint: JointDensity, chunk: Chunk) -> Gaussian:
    loc = columns[0][1].new_zeros(len(chunk), joint.dim)
    diagonal = _blocks(columns, joint.dim) is None
    scale = torch.zeros_like(loc) if diagonal else torch.diag_embed(loc)
    for place, mean, own in columns:
        loc[:, place] = mean
        if diagonal:
            scale[:, place] = own
        else:
            scale[:, place, place] = own if own.dim() == 3 else torch.diag_embed(own)
    return Gaussian(loc, scale, joint.active(chunk.indices))


def _is_density(gaussian: Gaussian, refinable: Refinable, chunk: Chunk) -> bool:
    """Whether log q is the log density of `gaussian`, at two points of every datapoint."""
    shape = gaussian.loc.shape
    steps = torch.linspace(-1.5, 1.5, 2 * shape.numel(), dtype=gaussian.loc.dtype, device=gaussian.loc.device)
    points = gaussian.draw(steps.reshape(2, *shape))
    own, right = BlockedGuide(refinable, chunk).log_prob(points), gaussian.log_density(points)[0]
    return _agree(own, right, right.abs() + shape[-1])


def _can_be_set(form: GaussianForm, gaussian: Gaussian) -> bool:
    """Whether the guides can be set to other Gaussians, and are read back as these."""
    dim, dtype, device = form.joint.dim, gaussian.loc.dtype, gaussian.loc.device
    step = torch.linspace(0.1, 0.3, dim, dtype=dtype, device=device)
    diagonal = gaussian.matrix.dim() == 2
    scale = gaussian.matrix if diagonal else gaussian.matrix.diagonal(dim1=-2, dim2=-1)
    loc = torch.where(form.free_loc, gaussian.loc + step * scale, gaussian.loc)
    wider = torch.where(form.free_scale, 1 + step, torch.ones_like(step))
    other = replace(gaussian, loc=loc, scale=gaussian.matrix * (wider if diagonal else wider[:, None]))
    if form.blocks is not None:
        # Below the diagonal, correlations of about a tenth.
        free = (form.blocks & form.free_scale[:, None]).tril(-1)
        other = replace(other, scale=other.matrix + 0.1 / dim * free * scale[..., None])
    before = [parameter.detach().clone() for parameter in form.refinable.parameters]
    assert isinstance(form.refinable, Settable)
    if not form.refinable.move_to(other):
        return False
    read = form.read()
    keep_where(torch.ones(len(gaussian.loc), dtype=torch.bool, device=device), before, form.refinable)
    unit = scale if diagonal else scale[..., None]
    return _agree(read.loc, loc, scale + loc.abs()) and _agree(read.matrix, other.matrix, unit)


def _agree(left: Tensor, right: Tensor, size: Tensor) -> bool:
    tolerance = AGREEMENT * torch.finfo(left.dtype).eps ** 0.5
    return bool(((left - right).abs() <= tolerance * size).all())
