r"""Guides that draw an auxiliary variable and pass an affine image of it to Deltas at the model's sites.

(`bijective` has the images that are not affine.)

In unconstrained space the draws are $z = A_n u + b_n$, as in Pyro's `AutoGaussian`, so that

$$\log q(z \mid x_n) = \log q(u \mid x_n) - \log |\det A_n|$$

The map is measured by running the guide at known `u`, and verified at a further one. So is the density that the Deltas
state: in Pyro's convention they carry the negative log-determinant of the map to their values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrogaps.density.joint import JointDensity
from pyrogaps.density.layout import leaf, plate_dim, rows_first
from pyrogaps.density.local import Draws, GuideSite, LocalGuide
from pyrogaps.density.runs import evaluating
from pyrogaps.density.score import is_bookkeeping, log_jacobian, log_prob
from pyrogaps.density.supports import CIRCULAR, bijection
from pyrogaps.errors import InputError

# Messages of the guide's sites with its terms at the points `u` `(R, dim)`, for the datapoints `rows` `(R,)`.
PlaceAt = Callable[[Tensor, Tensor], dict[str, Any]]


class Unconstrain(Messenger):
    """Sets the model's latent sites to given values, and maps these to unconstrained space.

    After the run `columns` holds the sites' columns `(R, size)`, `log_jacobians` log |d value / d unconstrained|
    `(R,)`, and `kinds` the names of the sites' distributions.
    """

    def __init__(self, joint: JointDensity, values: dict[str, Tensor], rows: int) -> None:
        super().__init__()
        self.joint, self.given, self.rows = joint, values, rows
        self.columns: dict[str, Tensor] = {}
        self.log_jacobians: dict[str, Tensor] = {}
        self.kinds: dict[str, str] = {}

    def _pyro_sample(self, message: Any) -> None:
        if is_bookkeeping(message) or message["is_observed"] or message["name"] in self.joint.enumerated:
            return  # a latent that is summed out has no place in unconstrained space
        name, fn = message["name"], message["fn"]
        site, value, transform = self.joint.sites[name], self.given[name], bijection(fn, name)
        unconstrained = transform.inv(value)
        jacobian = log_jacobian(transform, unconstrained, value, None, fn.event_dim)
        if self.joint.plate is None:
            self.columns[name], self.log_jacobians[name] = unconstrained.reshape(1, -1), jacobian.sum().expand(1)
        else:
            dim = plate_dim(message, self.joint.plate)
            assert dim is not None
            self.columns[name] = site.flatten(unconstrained).expand(self.rows, site.size)
            self.log_jacobians[name] = rows_first(jacobian, dim, self.rows)
        self.kinds[name] = type(leaf(fn)).__name__
        message["value"], message["done"] = value, True


@dataclass(frozen=True)
class Image:
    """The image of a guide's draws at known points.

    Attributes:
        z: in unconstrained space, `(R, dim)`.
        excess: for each Delta, the log-density that it states less that of the map from `z` to its value, `(R,)`.
        auxiliary: log |d draw / d unconstrained| of the auxiliary draws, `(R,)`.
        kinds: names of the model's distributions, by site.
    """

    z: Tensor
    excess: dict[str, Tensor]
    auxiliary: Tensor
    kinds: dict[str, str]


def image_of(
    messages: dict[str, Any], terms: list[GuideSite], u: Tensor, joint: JointDensity, indices: Tensor
) -> Image:
    """The image of points `u` `(R, dim)`, which the guide's run `messages` has in its terms."""
    rows, values = len(u), {name: messages[name]["value"] for name in joint.sites}
    handler = Unconstrain(joint, values, rows)
    with evaluating(joint.model), joint.plates(indices), handler:
        joint.model(*joint.fetch(indices))
    drawn = {term.name for term in terms}
    excess, auxiliary = {}, u.new_zeros(rows)
    for name in joint.sites:
        if name not in drawn:
            stated = log_prob(messages[name]["fn"], messages[name]["value"], name)
            excess[name] = _to_rows(stated, messages[name], joint, rows) + handler.log_jacobians[name]
    for term in terms:
        if term.name not in joint.sites and not term.unconstrained:
            fn = messages[term.name]["fn"]
            transform, value = bijection(fn, term.name), messages[term.name]["value"]
            own = log_jacobian(transform, transform.inv(value), value, None, fn.event_dim)
            auxiliary = auxiliary + _to_rows(own, messages[term.name], joint, rows)
    return Image(torch.cat([handler.columns[name] for name in joint.sites], -1), excess, auxiliary, handler.kinds)


def _to_rows(log_density: Tensor, message: Any, joint: JointDensity, rows: int) -> Tensor:
    axis = None if joint.plate is None else plate_dim(message, joint.plate)
    return log_density.sum().expand(rows) if axis is None else rows_first(log_density, axis, rows)


@dataclass(frozen=True)
class AffineMap:
    """z = A u + b of B datapoints: `matrix` `(B, dim, dim)`, or its diagonal `(B, dim)`, and `offset` `(B, dim)`."""

    matrix: Tensor
    offset: Tensor

    @property
    def log_det(self) -> Tensor:
        """log |det A| `(B,)`."""
        if self.matrix.dim() == 2:
            return self.matrix.abs().log().sum(-1)
        log_det: Tensor = torch.linalg.slogdet(self.matrix)[1]
        return log_det

    def __call__(self, u: Tensor) -> Tensor:
        scaled = self.matrix * u if self.matrix.dim() == 2 else (self.matrix @ u[..., None])[..., 0]
        return scaled + self.offset

    def inverse(self, z: Tensor) -> Tensor:
        centred = z - self.offset
        if self.matrix.dim() == 2:
            return centred / self.matrix
        solved: Tensor = torch.linalg.solve(self.matrix, centred.movedim(0, -1)).movedim(-1, 0)
        return solved


class NotAffineError(InputError):
    """A guide's Delta is no affine function of its draws in unconstrained space."""


def affine_map(place_at: PlaceAt, terms: list[GuideSite], joint: JointDensity, indices: Tensor) -> AffineMap:
    """The map from a guide's own draws to the model's latents at `indices`, from runs of the guide.

    Raises `InputError` naming the site, where it is not affine and invertible in unconstrained space, or the Deltas
    state another log-density than it has.
    """
    dim, number = joint.dim, len(indices)
    names = [name for name in joint.sites if name not in {term.name for term in terms}]
    zeros = joint.zeros(1)
    other = torch.linspace(0.3, 1.1, dim, dtype=zeros.dtype, device=zeros.device)[None] * (-1) ** torch.arange(dim)

    def images(points: Tensor) -> tuple[Tensor, Tensor, dict[str, str]]:
        """The images `(P, B, dim)` of `points` `(P, dim)`, and by how much the stated log-density exceeds log q."""
        u = points[:, None].expand(-1, number, -1).flatten(0, 1)
        if joint.plate is None:
            parts = [image_of(place_at(row, indices), terms, row, joint, indices) for row in u.split(1)]
        else:
            rows = indices.repeat(len(points))
            parts = [image_of(place_at(u, rows), terms, u, joint, rows)]
        z = torch.cat([part.z for part in parts])
        excess = torch.cat([sum(part.excess.values(), -part.auxiliary) for part in parts])
        return z.reshape(len(points), number, dim), excess.reshape(len(points), number), parts[0].kinds

    z, excess, kinds = images(torch.cat([zeros, zeros + 1, other]))
    result = AffineMap(z[1] - z[0], z[0])
    if not _agree(result(other), z[2]):
        columns = images(torch.eye(dim, dtype=zeros.dtype, device=zeros.device))[0] - z[0]
        result = AffineMap(columns.movedim(0, -1), z[0])
    if not _agree(result(other), z[2]):
        for name in names:
            if kinds[name] in CIRCULAR:
                raise periodic(name, kinds[name])
        raise NotAffineError(f"site '{names[0]}': the guide's Delta is no affine function of its auxiliary draws")
    log_det = result.log_det
    if not bool(torch.isfinite(log_det).all()):
        raise InputError(
            f"site '{names[0]}': the guide's Delta is no invertible function of its auxiliary draws, so the guide "
            "has no density. Give every latent a draw of its own"
        )
    check_stated(names, excess[0] + log_det)
    return result


def periodic(name: str, kind: str) -> InputError:
    """The error for a guide on the line at a site on the circle."""
    return InputError(
        f"site '{name}': {kind} is periodic, but the guide's draws leave the one turn from -pi to pi. Draw the site "
        "itself within it, from a VonMises, or from a TransformedDistribution(Normal(loc, scale), "
        "[SigmoidTransform(), AffineTransform(-math.pi, 2 * math.pi)])"
    )


def check_stated(names: list[str], excess: Tensor) -> None:
    """Refuse Deltas that state another log-density than their values have; `excess` `(R,)` is by how much."""
    tolerance = 1e-5 if excess.dtype == torch.float64 else 2e-2
    worst = float(excess.detach().abs().max()) if len(excess) else 0.0
    if not worst <= tolerance:
        sites = f"site '{names[0]}'" if len(names) == 1 else "sites " + ", ".join(f"'{name}'" for name in names)
        raise InputError(
            f"{sites}: the log_density of the guide's Delta is wrong by {worst:.3g} nats. Pass minus the "
            "log-determinant of the Jacobian of the map from the auxiliary draws to the values"
        )


def _agree(left: Tensor, right: Tensor) -> bool:
    tolerance = 1e-8 if left.dtype == torch.float64 else 1e-4
    scale = max(1.0, float(right.detach().abs().max())) if bool(torch.isfinite(right).all()) else 1.0
    return torch.allclose(left, right, rtol=tolerance, atol=tolerance * scale)


class MappedGuide:
    """A `LocalGuide` in the model's coordinates: the affine image of a guide in its own."""

    mean_field = False

    def __init__(self, own: LocalGuide, affine: AffineMap) -> None:
        self.own, self.affine = own, affine
        self.joint, self.indices = own.joint, own.indices

    def sample(self, num_particles: int, antithetic: bool = False) -> Draws:
        u, log_q = self.own.sample(num_particles, antithetic)
        return self.affine(u), log_q - self.affine.log_det

    def log_prob(self, z: Tensor) -> Tensor:
        return self.own.log_prob(self.affine.inverse(z)) - self.affine.log_det
