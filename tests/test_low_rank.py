"""Gaussians of low rank plus diagonal: their algebra against matrices, their fits against exact posteriors."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyrogaps as pg
from pyrogaps.gaussians import (
    Curvature,
    Gaussian,
    LowRank,
    bhattacharyya,
    fitted,
    gaussian_by_low_rank_curvature,
)
from pyrogaps.gaussians.probes import probe
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.streams import Chunk, Noise, Stream
from tests.references import assert_exact, draws_of

NUMBER, DIM, RANK = 3, 7, 2


def noise(number: int) -> Noise:
    return Noise(Stream(0, "probes"), Chunk(0, number), dtype=torch.float64, device="cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def low_rank(*, active: Tensor | None = None, seed: int = 0) -> LowRank:
    draws = torch.randn(NUMBER, DIM, RANK + 1, generator=generator(seed), dtype=torch.float64)
    if active is not None:
        draws = draws * active[..., None]
    axes = torch.linalg.qr(draws[..., :RANK])[0]
    return LowRank(draws[..., RANK].exp(), axes, torch.tensor([[0.05, 20.0]], dtype=torch.float64).expand(NUMBER, -1))


@pytest.fixture
def vectors() -> Tensor:
    return torch.randn(4, NUMBER, DIM, generator=generator(1), dtype=torch.float64)


def test_algebra_is_that_of_the_matrix(vectors: Tensor) -> None:
    scale = low_rank()
    L = scale.dense()
    precision = torch.linalg.inv(L @ L.mT)
    for result, matrix in (
        (scale.apply(vectors), L),
        (scale.apply_transpose(vectors), L.mT),
        (scale.solve(vectors), torch.linalg.inv(L)),
        (scale.precision(vectors), precision),
    ):
        torch.testing.assert_close(result, torch.einsum("bij,sbj->sbi", matrix, vectors))
    torch.testing.assert_close(scale.diagonal.log().sum(-1) + scale.log_factors, torch.logdet(L))
    torch.testing.assert_close(scale.precision_diagonal, precision.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(scale.widened(3.0).dense(), 3.0 * L)
    torch.testing.assert_close(scale.at(torch.tensor([2, 0])).dense(), L[[2, 0]])
    torch.testing.assert_close(scale.padded(5).dense(), L)
    torch.testing.assert_close(LowRank.joined([scale, low_rank(seed=3)]).dense()[NUMBER:], low_rank(seed=3).dense())


def test_density_is_that_of_the_covariance(vectors: Tensor) -> None:
    scale = low_rank()
    gaussian, L = Gaussian(vectors[0], scale), scale.dense()
    exact = dist.MultivariateNormal(vectors[0], L @ L.mT)
    z = vectors.clone().requires_grad_()
    log_density, gradient = gaussian.log_density(vectors)
    torch.testing.assert_close(log_density, exact.log_prob(vectors))
    torch.testing.assert_close(gradient, torch.autograd.grad(exact.log_prob(z).sum(), z)[0])
    torch.testing.assert_close(gaussian.whiten(gaussian.draw(vectors)), vectors)
    torch.testing.assert_close(gaussian.triangular().log_density(vectors)[0], log_density)


def test_what_is_not_active_counts_for_nothing(vectors: Tensor) -> None:
    active = torch.ones(NUMBER, DIM, dtype=torch.bool)
    active[1, 4:] = False
    gaussian = Gaussian(vectors[0], low_rank(active=active), active)
    drawn = gaussian.draw(vectors)
    assert not drawn[:, ~active].any()
    scale = gaussian.scale
    assert isinstance(scale, LowRank)
    covariance = (scale.dense() @ scale.dense().mT)[1, :4, :4]
    exact = dist.MultivariateNormal(vectors[0, 1, :4], covariance).log_prob(vectors[:, 1, :4])
    torch.testing.assert_close(gaussian.log_density(vectors)[0][:, 1], exact)
    moves = gaussian.moves
    assert isinstance(moves, LowRank)
    assert not moves.apply(vectors)[:, ~active].any()
    assert not moves.apply_transpose(vectors)[:, ~active].any()


def test_distance_is_that_of_full_factors(vectors: Tensor) -> None:
    one, other = (Gaussian(vectors[k, :1], low_rank(seed=k).at(torch.tensor([0]))) for k in range(2))
    assert bhattacharyya(one, other) == pytest.approx(bhattacharyya(one.triangular(), other.triangular()))
    assert bhattacharyya(one, one) == pytest.approx(0.0, abs=1e-9)


# --- Fits. Targets are Gaussian, so that the curvature is the same everywhere.


def directions(dim: int, number: int, condition: float, *, wide: bool, seed: int = 0) -> Tensor:
    """A precision: a diagonal, and directions along which the posterior is much wider, or narrower."""
    draws = torch.randn(dim, number + 1, generator=generator(seed), dtype=torch.float64)
    axes, diagonal = torch.linalg.qr(draws[:, :number])[0], (-0.5 * draws[:, number]).exp()
    stretch = torch.logspace(math.log10(condition) / 2, math.log10(condition), number, dtype=torch.float64)
    middle = torch.eye(dim, dtype=torch.float64) + axes * ((1 / stretch if wide else stretch) - 1) @ axes.T
    return diagonal[:, None] * middle * diagonal


def chain(length: int, correlation: float) -> Tensor:
    """The precision of an autoregressive chain: correlations that no few directions hold."""
    one = torch.ones(length - 1, dtype=torch.float64)
    inner = torch.full((length,), 1 + correlation**2, dtype=torch.float64)
    inner[[0, -1]] = 1.0
    return (inner.diag() - correlation * (one.diag(1) + one.diag(-1))) / (1 - correlation**2)


def start_and_gradients(
    precision: Tensor, width: float, number: int = 2
) -> tuple[Gaussian, Callable[[Tensor], Tensor]]:
    """The best factorised Gaussian, its mean off by half a standard deviation and its scales by `width`."""
    scale = precision.diagonal().rsqrt().expand(number, -1)
    return Gaussian(0.5 * scale, width * scale), lambda points: -points @ precision


def eigenvalues(fit: Curvature, precision: Tensor) -> Tensor:
    """Of L^T H L, which are 1 where L is exact."""
    L = fit.gaussian.factor()
    return torch.linalg.eigvalsh(L.mT @ precision @ L)


@pytest.mark.parametrize("width", [1.2, 0.33])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_few_directions_and_a_diagonal_are_found(condition: float, wide: bool, width: float) -> None:
    precision = directions(150, 6, condition, wide=wide)
    start, gradients = start_and_gradients(precision, width)
    fit = gaussian_by_low_rank_curvature(start, gradients, noise(2))
    values = eigenvalues(fit, precision)
    assert float((values - 1).abs().max()) < 0.1
    assert float(fit.gaussian.whiten(torch.zeros(1, 2, 150, dtype=torch.float64)).norm(dim=-1).max()) < 0.01
    assert fit.agrees.all()
    assert not fit.cut.any()
    assert fit.num_gradients.tolist() == [960] * 2


def test_more_directions_than_axes_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyrogaps.gaussians.low_rank_curvature.RANK", 4)
    precision = directions(120, 8, 1e3, wide=True)
    fit = gaussian_by_low_rank_curvature(*start_and_gradients(precision, 1.0), noise(2))
    assert float(eigenvalues(fit, precision).min()) < 0.1
    assert fit.cut.all()
    assert not fit.agrees.any()


def test_bounds_hold_for_what_was_not_measured() -> None:
    """A lone direction in 60, at 1,000 datapoints: where a pass has no axes, every random sign may miss it."""
    number, dim = 1000, 60
    axis = torch.randn(number, dim, generator=generator(2), dtype=torch.float64)
    axis = axis / axis.norm(dim=-1, keepdim=True)
    curvature = torch.linspace(0.05, 0.5, number, dtype=torch.float64)

    def gradients(points: Tensor) -> Tensor:
        along = (points * axis).sum(-1, keepdim=True)
        return -points - (curvature - 1)[:, None] * along * axis

    ones = torch.ones(number, dim, dtype=torch.float64)
    signs = torch.randint(2, (16, number, dim), generator=generator(3)).double() * 2 - 1
    probed = probe(torch.zeros_like(ones), LowRank(ones, ones[..., None][..., :0], ones[:, :0]), signs, gradients)
    held = (probed.flattest <= curvature) & (probed.steepest >= 1)
    assert float((~held).double().mean()) < 0.001 + 4 * math.sqrt(0.001 / number)
    # Not by being far too wide: the estimate is a power mean of squares.
    assert float((probed.flattest >= 1 - 2 * (1 - curvature)).double().mean()) > 0.9


def test_a_long_chain_is_cut_and_fitted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyrogaps.gaussians.anchor.MAX_DIM", 8)
    precision = chain(100, 0.9)
    start, gradients = start_and_gradients(precision, 1.0)
    assert gaussian_by_low_rank_curvature(start, gradients, noise(2)).cut.all()
    fit = fitted(start, lambda _, points: gradients(points), noise(2))
    assert float((eigenvalues(fit, precision) - 1).abs().max()) < 0.1
    assert fit.agrees.all()
    assert fit.num_gradients.tolist() == [960 + 600] * 2
    monkeypatch.setattr("pyrogaps.gaussians.anchor.MAX_DIM_AGAIN", 99)
    assert fitted(start, lambda _, points: gradients(points), noise(2)).cut.all()


def test_fits_do_not_touch_what_is_not_active() -> None:
    """The second datapoint has fewer active latents than there are probes and axes."""
    precision = directions(60, 3, 1e2, wide=True)
    active = torch.ones(2, 60, dtype=torch.bool)
    active[1, 10:] = False
    start, _ = start_and_gradients(precision, 1.0)
    start = Gaussian(start.loc * active, start.scale, active)
    fit = gaussian_by_low_rank_curvature(start, lambda points: -(points * active) @ precision * active, noise(2))
    scale = fit.gaussian.scale
    assert isinstance(scale, LowRank)
    assert not scale.axes[~active].any()
    torch.testing.assert_close(fit.gaussian.loc[~active], start.loc[~active])
    L = scale.dense()[1, :10, :10]
    values = torch.linalg.eigvalsh(L.mT @ precision[:10, :10] @ L)
    assert float((values - 1).abs().max()) < 0.1
    assert fit.agrees.all()


def test_gradients_that_are_not_finite_leave_the_start() -> None:
    start, gradients = start_and_gradients(directions(40, 2, 1e2, wide=True), 1.0)

    def some_broken(points: Tensor) -> Tensor:
        return torch.where(torch.tensor([[True], [False]]), gradients(points), torch.nan)

    fit = gaussian_by_low_rank_curvature(start, some_broken, noise(2))
    assert fit.cut.tolist() == [False, True]
    torch.testing.assert_close(fit.gaussian.loc[1], start.loc[1])
    torch.testing.assert_close(fit.gaussian.factor()[1], start.factor()[1])


# --- Through the ladder.


def few_observations(dim: int, number: int, seed: int = 0) -> LinearGaussian:
    """Five observations of many latents: the posterior is narrow in five directions."""
    weight = torch.randn(5, dim, generator=generator(seed), dtype=torch.float64)
    prior = torch.linspace(0.5, 2.0, dim, dtype=torch.float64)
    return LinearGaussian(weight, 0.0, 3.0, prior)


@pytest.mark.parametrize("dim", [300, 600])
def test_evidence_of_many_latents(dim: int) -> None:
    model = few_observations(dim, 3)
    x, _ = draws_of(model, 3)
    estimate = pg.log_evidence(model, None, x, referee=False, evidence=pg.Ladder(tolerance=0.03))
    assert_exact(estimate.value, estimate.mcse, model.log_evidence(x))
    assert estimate.vouched is not None
    assert estimate.vouched.all()
    assert estimate.reliable.all()


def squares(x: Tensor) -> None:
    """x_0 is the square of one latent, with noise; all others are observed as they are. Two modes."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
        mean = torch.cat([z[..., :1].square(), z[..., 1:]], -1)
        pyro.sample("x", dist.Normal(mean, x.new_tensor(0.3)).to_event(1), obs=x)


def squares_evidence(x: Tensor) -> Tensor:
    grid = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    first = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(grid.square(), 0.3).log_prob(x[:, :1])
    rest = dist.Normal(0.0, math.hypot(1.0, 0.3)).log_prob(x[:, 1:]).sum(-1)
    return first.logsumexp(1) + math.log(12 / 20000) + rest


def one_mode(x: Tensor) -> None:
    """A guide at the positive root."""
    x0, rest = x[:, :1].clamp(min=0.1).sqrt(), x[:, 1:] / 1.09
    scale = torch.cat([0.15 / x0, torch.full_like(rest, 0.287)], -1)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.cat([x0, rest], -1), scale).to_event(1))


def test_other_modes_of_many_latents_are_found() -> None:
    x = torch.randn(2, 280, generator=generator(5), dtype=torch.float64)
    x[:, 0] = torch.tensor([3.0, 4.0])
    exact = squares_evidence(x)
    alone = pg.log_evidence(squares, one_mode, x, referee=False)
    assert float((exact - alone.value).min()) > 0.5  # half the mass
    estimate = pg.log_evidence(squares, one_mode, x, referee=2)
    assert_exact(estimate.value, estimate.mcse.clamp(max=0.049), exact)
