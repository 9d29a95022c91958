"""The stated errors of L[q*_C], datapoint by datapoint: exact ones of linear Gaussians, and coverage."""

import pytest
import torch
from torch import Tensor

import pyrogaps as pg
from pyrogaps.conditioning import SharedPosterior
from pyrogaps.conditioning.errors import STUDENT, FitError, mean_of_halves, mean_over_completions
from pyrogaps.conditioning.latents import number_of_distinct, systematic
from pyrogaps.guides.partial import PartialNormal
from pyrogaps.log_weights import Estimate, effective_sample_size
from pyrogaps.models.toy import MissingGaussian
from pyrogaps.streams import seeded
from tests.conditioning.test_shared import FullCovariance, drawn


def measured(model: MissingGaussian, number: int, steps: int) -> tuple[SharedPosterior, Tensor]:
    """The shared posteriors, and the exact L[q*_C] of each datapoint."""
    x = drawn(model, number)
    guide = FullCovariance(model.data_dim, model.latent_dim, int(model.shown.sum())).double()
    found = pg.shared_posterior(model, guide, x, refinement=pg.Refinement(num_steps=steps))
    mean, covariance = model.shared_posterior(x)
    return found, model.elbo(x, mean, scale_tril=torch.linalg.cholesky(covariance)).detach()


def coverage(found: SharedPosterior, exact: Tensor) -> float:
    return float(((found.elbo.value - exact).abs() < 1.96 * found.elbo.mcse).double().mean())


def test_errors_of_the_unit_toy() -> None:
    """One latent: the bound changes by (E[z|x] - m) / Var(z|x) times the change of m, the mean of q."""
    model = MissingGaussian.unit().double()
    found, exact = measured(model, 128, 200)
    assert coverage(found, exact) > 0.93 - 2 * (0.93 * 0.07 / 128) ** 0.5
    x = drawn(model, 128)
    # Var of a completion's mean E[z|C, Cbar]: Var(z|C) - Var(z|x) = 1/2 - 1/3.
    misfit = (model.posterior(x)[0] - model.shared_posterior(x)[0])[:, 0] * 3
    completions = (misfit.square() * (1 / 2 - 1 / 3) / found.num_completions).mean().sqrt()
    error = found.elbo.mcse.square().mean().sqrt()
    assert 0.9 < error / completions.detach() < 1.5  # and the errors of draws and of refinements


def covers(value: Tensor, mcse: Tensor, exact: Tensor) -> bool:
    """95% intervals hold 93%, less two binomial standard errors."""
    share = float(((value - exact).abs() < 1.96 * mcse).double().mean())
    return share > 0.93 - 2 * (0.93 * 0.07 / len(exact)) ** 0.5


CASES = [(1, 1, 1, None, True), (2, 2, 3, 1, False), (2, 2, 3, 2, True), (4, 2, 2, 3, True), (4, 3, 3, 5, False)]


@pytest.mark.slow
@pytest.mark.parametrize(("latent", "shown", "hidden", "seed", "full"), CASES)
def test_coverage(latent: int, shown: int, hidden: int, seed: int | None, full: bool) -> None:
    """Of L[q*_C] and of the conditioning gap, 1,000 datapoints each; mean-field Normals where not `full`."""
    model = MissingGaussian.unit() if seed is None else MissingGaussian.random(shown + hidden, latent, 1.0, seed, shown)
    model, size = model.double(), shown + hidden
    guide = FullCovariance(size, latent, shown) if full else PartialNormal(size, latent, (8,), shown=shown)
    x = drawn(model, 1000)
    columns = pg.decompose(
        model, guide.double(), x, refinement=pg.Refinement(num_steps=200),
        evidence=pg.AIS(num_chains=16, num_temperatures=2), progress=False,
    ).per_datapoint  # fmt: skip
    _, covariance = model.shared_posterior(x)
    shape = {"scale_tril": torch.linalg.cholesky(covariance)} if full else {"scale": model.precision.diagonal().rsqrt()}
    best, shared = [model.elbo(x, of(x)[0], **shape).detach() for of in (model.posterior, model.shared_posterior)]

    def column(name: str) -> list[Tensor]:
        return [torch.as_tensor(columns[part].values) for part in (name, f"{name}_mcse")]

    assert covers(*column("elbo_shared"), shared)
    assert covers(*column("conditioning_gap"), best - shared)


def test_halves_that_differ_by_more_than_their_errors() -> None:
    """Whatever the completions' own errors leave out, the differences of 64 datapoints put in."""
    noise = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 64, generator=noise, dtype=torch.float64)
    draws, zeros = torch.full((64,), 0.01, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
    nothing = [FitError(zeros, zeros)] * 2
    halves = [Estimate(value, draws, "lower bound") for value in (first, second)]
    found = mean_of_halves(*halves, nothing, torch.full((64,), 128.0), 128)
    assert 0.8 < float(found.mcse.square().mean().sqrt()) * 2**0.5 < 1.3
    alike = [Estimate(0 * value, draws, "lower bound") for value in (first, second)]
    torch.testing.assert_close(mean_of_halves(*alike, nothing, torch.full((64,), 128.0), 128).mcse, draws / 2**0.5)


def test_the_error_of_two_halves_is_that_of_all_completions() -> None:
    """Variances of the halves average and halve, their bias does not; copies of a latent count once."""
    nothing = torch.zeros(2000, dtype=torch.float64)
    variance, bias = nothing + 0.09, nothing + 0.2
    found = mean_of_halves(
        *[Estimate(nothing, nothing, "lower bound")] * 2, [FitError(variance, bias)] * 2, nothing + 50.0, 100
    )
    # Independent completions are half of all, so that variances and biases double.
    expected = 2 * variance / 2 + (2 * bias).square() + 2 * (2 * bias).square() / 2
    torch.testing.assert_close(found.mcse, STUDENT * expected.sqrt())


def test_copies_of_latents_count_as_one() -> None:
    """The mean of resampled Normals: its variance is one over the effective number of distinct ones, on average."""
    noise = torch.Generator().manual_seed(2)
    values = torch.randn(64, 4000, generator=noise, dtype=torch.float64)
    log_weights = 0.3 * torch.randn(64, 4000, generator=noise, dtype=torch.float64)
    with seeded(0, "resampling"):
        which = systematic(log_weights, 64)
    distinct = number_of_distinct(which)
    assert float(distinct.mean()) < 0.95 * float(effective_sample_size(log_weights).mean())
    squares = values.gather(0, which).mean(0).square()
    error = float((squares * distinct).std()) / 4000**0.5
    assert abs(float((squares * distinct).mean()) - 1) < 4 * error
    assert torch.equal(number_of_distinct(torch.tensor([[0, 1], [1, 1], [2, 1]])), torch.tensor([3.0, 1.0]).double())


def test_draws_that_share_a_completion_are_not_independent() -> None:
    noise = torch.Generator().manual_seed(1)
    of_completions = torch.randn(400, 32, 1, generator=noise, dtype=torch.float64).expand(-1, -1, 10)
    weights = of_completions.transpose(1, 2).flatten(1).T  # 320 draws, 10 of each completion, of 400 datapoints
    found = mean_over_completions(weights, 32)
    assert abs(float(found.value.std() / found.mcse.square().mean().sqrt()) - 1) < 4 / (2 * 400) ** 0.5
    few = mean_over_completions(weights[:20], 32)  # a completion for each draw
    torch.testing.assert_close(few.mcse, weights[:20].std(0) / 20**0.5)
