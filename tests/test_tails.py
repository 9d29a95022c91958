"""Heavy tails are found where no draw comes, against tails of known mass; and what the ladder then trusts."""

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor

import pyrogaps as pg
from pyrogaps.evidence.tails import FAR, NEAR, Rays, heavy_tails, log_integral
from pyrogaps.gaussians import Gaussian

LAWS = {
    "Normal": dist.Normal(0.0, 1.0),
    **{f"t{df}": dist.StudentT(float(df)) for df in (2, 3, 5, 10)},
}
LIGHT = {"Normal": True, "t2": False, "t3": False, "t5": True, "t10": True}


@dataclass(frozen=True)
class Axes:
    """Stands in for `Slots`: datapoints whose whitened coordinates are independent, with a law for each."""

    anchor: Gaussian
    laws: list[list[str]]

    @property
    def dim(self) -> int:
        return len(self.laws[0])

    def values(self, positions: Tensor, points: Tensor) -> Tensor:
        white = self.anchor.at(positions).whiten(points)
        rows = [
            sum(LAWS[law].log_prob(white[:, m, i]) for i, law in enumerate(self.laws[n]))
            for m, n in enumerate(positions.tolist())
        ]
        return torch.stack(rows, 1)  # type: ignore[arg-type]


def correlated(number: int, dim: int) -> Gaussian:
    noise = torch.Generator().manual_seed(0)
    root = torch.randn(number, dim, dim, generator=noise, dtype=torch.float64)
    factor = torch.linalg.cholesky(root @ root.mT + torch.eye(dim, dtype=torch.float64))
    return Gaussian(torch.randn(number, dim, generator=noise, dtype=torch.float64), factor)


def test_one_heavy_axis_is_enough() -> None:
    laws = [["Normal", law, "Normal"] for law in LAWS] + [["Normal"] * 3]
    slots = Axes(correlated(len(laws), 3), laws)
    positions = torch.tensor([3, 1, 0, 5, 2, 4])
    heavy, cost = heavy_tails(slots, slots.anchor, positions)  # type: ignore[arg-type]
    assert (~heavy).tolist() == [(LIGHT | {"t0": True})[([*LAWS, "Normal"])[n]] for n in positions.tolist()]
    assert cost[[2, 3]].tolist() == [15, 15]  # the Gaussians: 3 axes and 4 diagonals, either way, and the mean
    assert cost[[1, 4]].tolist() == [29, 29]


@pytest.mark.parametrize(("df", "light"), [(2, False), (3, False), (300, True)])
@pytest.mark.parametrize("dim", [2, 5, 20])
def test_heavy_tails_of_the_radius(dim: int, df: int, light: bool) -> None:
    """The multivariate Student has far lighter tails along a line than it has in all."""
    width = math.sqrt(df / (df + dim - 1))  # of which the square is the inverse of the curvature over its own breadth

    class Spherical(Axes):
        def values(self, positions: Tensor, points: Tensor) -> Tensor:
            return -0.5 * (df + dim) * torch.log1p(points.square().sum(-1) / df)

    eye = torch.eye(dim, dtype=torch.float64)[None]
    anchor = Gaussian(torch.zeros(1, dim, dtype=torch.float64), width * eye)
    heavy, _ = heavy_tails(Spherical(anchor, [["Normal"] * dim]), anchor, torch.zeros(1, dtype=torch.long))  # type: ignore[arg-type]
    assert heavy.tolist() == [not light]


def test_coordinates_that_are_in_no_density_have_no_tails() -> None:
    class Flat(Axes):
        def values(self, positions: Tensor, points: Tensor) -> Tensor:
            return -0.5 * points[..., 0].square()

    active = torch.tensor([[True, False]])
    anchors = [Gaussian(torch.zeros(1, 2), torch.eye(2)[None], mask) for mask in (active, None)]
    found = [
        heavy_tails(Flat(anchor, [["Normal"] * 2]), anchor, torch.zeros(1, dtype=torch.long))[0].tolist()  # type: ignore[arg-type]
        for anchor in anchors
    ]
    assert found == [[False], [True]]


def test_what_cannot_be_evaluated_is_not_light() -> None:
    class Overflowing(Axes):
        def values(self, positions: Tensor, points: Tensor) -> Tensor:
            values = -0.5 * points[..., 0].square()
            return torch.where(points[..., 0] > 5, math.nan, values)

    anchor = Gaussian(torch.zeros(1, 1), torch.ones(1, 1, 1))
    heavy, _ = heavy_tails(Overflowing(anchor, [["Normal"]]), anchor, torch.zeros(1, dtype=torch.long))  # type: ignore[arg-type]
    assert heavy.tolist() == [True]


@pytest.mark.parametrize("rate", [-0.5, 0.0, 0.1, 1.0])
def test_the_integral_of_an_exponential_is_exact(rate: float) -> None:
    length, start = FAR - NEAR, torch.tensor(math.log(0.02), dtype=torch.float64)
    exact = 0.02 * (length if rate == 0 else (1 - math.exp(-rate * length)) / rate)
    assert abs(float(log_integral(start, start - rate * length).exp()) - exact) < 1e-12
    nothing = torch.tensor(-math.inf, dtype=torch.float64)
    assert float(log_integral(nothing, nothing)) == float(log_integral(start, nothing)) == -math.inf


@pytest.mark.parametrize("df", [2, 3, 5])
def test_the_mass_of_students_tails(df: int) -> None:
    """In units of a Gaussian with the same peak."""
    law = stats.t(df)
    anchor = Gaussian(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64))
    rays = Rays(Axes(anchor, [[f"t{df}"]]), anchor, torch.zeros(1, dtype=torch.long))  # type: ignore[arg-type]
    mass = log_integral(rays.log_integrand(NEAR), rays.log_integrand(FAR)).exp().sum(0)
    exact = 2 * (law.cdf(FAR) - law.cdf(NEAR)) / (law.pdf(0) * math.sqrt(2 * math.pi))
    torch.testing.assert_close(mass, torch.full_like(mass, exact), rtol=0.15, atol=0)  # not quite exponential


@pytest.mark.parametrize(("df", "dim", "trusted"), [(3, 1, False), (3, 5, False), (5, 1, True)])
def test_the_ladder_trusts_light_tails(df: int, dim: int, trusted: bool) -> None:
    """Student posteriors. Of 3 degrees of freedom, intervals of 64 chains would cover in 88% (5 latents: 76%)."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            one = torch.ones(dim, dtype=x.dtype)
            z = pyro.sample("z", dist.StudentT(df * one, 0 * one, one).to_event(1))
            pyro.sample("x", dist.Normal(0 * z[..., 0], 1.0), obs=x)

    x = torch.zeros(64, dtype=torch.float64)
    found = pg.log_evidence(model, None, x)
    assert found.vouched is not None
    assert bool(found.vouched.bool().all()) is trusted
    assert bool(found.vouched.bool().any()) is trusted
    share = float(found.reliable.double().mean())
    assert share > 0.8 if trusted else share < 0.1
