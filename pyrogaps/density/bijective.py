r"""Guides that draw an auxiliary variable and pass an invertible image of it, not an affine one, to Deltas.

With the map $z = F(u)$ from the guide's draws to the latents, both in unconstrained space,

$$\log q(z \mid x_n) = \log q(u \mid x_n) - \log |\det F'(u)|$$

The Deltas state the log-determinant. It is compared with the Jacobian at draws of the guide before it is used, and so
is whether other draws lead to the same latents. Given latents are scored at the draw that Newton's method finds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.density.joint import JointDensity
from pyrogaps.density.local import Draws, GuideSite, LocalGuide, NoInverseError
from pyrogaps.density.mapped import Image, PlaceAt, check_stated, image_of
from pyrogaps.errors import InputError

NUM_STEPS = 50
WIDTHS = (0.3, 1.0, 2.0)  # of the draws that a map is checked at


@dataclass(frozen=True)
class BijectiveMap:
    """The map F of the datapoints `indices` `(B,)`, from runs of the guide, one for all rows where there is a plate."""

    place_at: PlaceAt
    terms: list[GuideSite]
    joint: JointDensity
    indices: Tensor

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """z and the log |det F'(u)| that the Deltas state, `(S, B, dim)` and `(S, B)`, at `u` `(S, B, dim)`."""
        flat = u.flatten(0, 1)
        if self.joint.plate is None:
            parts = [self._image(row, self.indices) for row in flat.split(1)]
        else:
            parts = [self._image(flat, self.indices.repeat(len(u)))]
        z = torch.cat([part.z for part in parts])
        stated = torch.cat([part.auxiliary - sum(part.excess.values()) for part in parts])
        return z.reshape(u.shape), stated.reshape(u.shape[:-1])

    def _image(self, u: Tensor, rows: Tensor) -> Image:
        return image_of(self.place_at(u, rows), self.terms, u, self.joint, rows)

    def jacobian(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """z and F'(u) `(S, B, dim, dim)`, without history."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            z = self(u)[0]
            rows = [
                torch.autograd.grad(column.sum(), u, retain_graph=True, allow_unused=True)[0] for column in z.unbind(-1)
            ]
        return z.detach(), torch.stack([torch.zeros_like(u) if row is None else row for row in rows], -2).detach()

    def inverse(self, z: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """The draws `(S, B, dim)` that lead to `z`, from `start`, and whether they were found `(S, B)`."""
        u, best = start.detach(), torch.full(z.shape[:-1], torch.inf, dtype=z.dtype, device=z.device)
        step, there = torch.zeros_like(u), torch.zeros_like(best, dtype=torch.bool)
        for _ in range(NUM_STEPS):
            image, matrix = self.jacobian(u + step)
            error = torch.nan_to_num(image - z.detach(), nan=torch.inf).abs().amax(-1)
            better = error < best
            u, best = torch.where(better[..., None], u + step, u), torch.where(better, error, best)
            there = best <= _tolerance(z) * (1 + z.detach().abs().amax(-1))
            if bool(there.all()):
                break
            full = torch.linalg.lstsq(torch.nan_to_num(matrix), (z.detach() - image)[..., None]).solution[..., 0]
            step = torch.where(better[..., None], torch.nan_to_num(full), step / 2)
        return u, there


def _tolerance(z: Tensor) -> float:
    return 1e-9 if z.dtype == torch.float64 else 1e-4


def check_bijective(bijection: BijectiveMap, names: list[str]) -> None:
    """Check the log-densities that the Deltas at the sites `names` state, and that the map has an inverse.

    Raises `InputError` naming the site.
    """
    joint, number = bijection.joint, len(bijection.indices)
    draws = torch.randn(len(WIDTHS), number, joint.dim, dtype=joint.dtype, device=joint.device)
    u = draws * torch.tensor(WIDTHS, dtype=joint.dtype, device=joint.device)[:, None, None]
    stated = bijection(u)[1]
    z, matrix = bijection.jacobian(u)
    sign, log_det = torch.linalg.slogdet(matrix)
    if not bool(torch.isfinite(log_det).all()) or not bool((sign == sign[:1]).all()):
        raise _not_invertible(names)
    check_stated(names, (stated.detach() - log_det).flatten())
    for start in (torch.zeros_like(u), u.roll(1, 0), -u):
        again, there = bijection.inverse(z, start)
        apart = (again - u).abs().amax(-1) > 0.05 * (1 + u.abs().amax(-1))
        if bool((there & apart).any()):
            raise _not_invertible(names)


def _not_invertible(names: list[str]) -> InputError:
    return InputError(
        f"site '{names[0]}': the guide's Delta is no invertible function of its auxiliary draws, so the guide has no "
        "density. Give every latent a draw of its own, and map it by an invertible function"
    )


class BijectiveGuide:
    """A `LocalGuide` in the model's coordinates: the image of a guide in its own."""

    mean_field = False

    def __init__(self, own: LocalGuide, bijection: BijectiveMap) -> None:
        self.own, self.bijection = own, bijection
        self.joint, self.indices = own.joint, own.indices

    def sample(self, num_particles: int, antithetic: bool = False) -> Draws:
        u, log_q = self.own.sample(num_particles, antithetic)
        z, log_det = self.bijection(u)
        return z, log_q - log_det

    def log_prob(self, z: Tensor) -> Tensor:
        start = self.own.sample(1)[0].expand(z.shape)
        u, there = self.bijection.inverse(z, start)
        if not bool(there.all()):
            raise NoInverseError(
                "guide: the map from its draws to the latents could not be inverted at some points. Draw the sites "
                "themselves, from a TransformedDistribution of the auxiliary draws' distribution"
            )
        image, matrix = self.bijection(u)[0], self.bijection.jacobian(u)[1]
        # A last step of Newton's method, whose derivatives are those of the inverse.
        u = u + torch.linalg.solve(matrix, (z - image)[..., None])[..., 0]
        return self.own.log_prob(u) - self.bijection(u)[1]
