"""AIS against exact evidence; its weights are unbiased whatever the steps, and biased where steps follow the chain."""

import math
from dataclasses import replace
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pyrogaps import AIS, Refinement, ais
from pyrogaps.annealing.loop import StepSizes, Tuning, anneal, schedule, tune
from pyrogaps.capture import GradientEvaluator
from pyrogaps.density import JointDensity
from pyrogaps.errors import InputError
from pyrogaps.evidence.ais import AISRun, run_path, run_pilot
from pyrogaps.evidence.paths import LeapfrogMove, Path, anchored_path, prior_path
from pyrogaps.gaussians import Gaussian, gaussian_by_moments
from pyrogaps.guides.sequential import StructuredNormal
from pyrogaps.hmc import HMCState, Leapfrog, transition
from pyrogaps.log_weights import effective_sample_size
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.run import Run
from pyrogaps.streams import Chunk, Noise, Stream, seeded
from tests.references import (
    NearPosterior,
    RaggedWalk,
    WrongEncoder,
    anisotropic,
    assert_exact,
    assert_mean_one,
    counts,
    draws_of,
    gamma_poisson,
    gamma_poisson_evidence,
    parabola,
    parabola_evidence,
)

QUICK = Refinement(num_steps=200)

# ----------------------------------------------------------------------------------------------------- exact evidence


@pytest.mark.parametrize("kind", ["linear", "sigmoid", "thermodynamic"])
@pytest.mark.parametrize("initial", ["refined", "guide", "prior"])
def test_evidence_of_a_linear_model(initial: str, kind: str) -> None:
    model = anisotropic(8, 3)
    x, _ = draws_of(model, 6)
    chains, temperatures = (1024, 100) if initial == "prior" else (128, 20)
    settings = AIS(num_chains=chains, num_temperatures=temperatures, schedule=kind, initial=initial)  # type: ignore[arg-type]
    guide = NearPosterior(model) if initial == "guide" else WrongEncoder(model)
    estimate = ais(model, guide, x, settings=settings, refinement=QUICK)
    assert_exact(estimate.value, estimate.mcse, model.log_evidence(x))
    assert estimate.direction == "lower bound"
    assert estimate.acceptance is not None and 0.5 < float(estimate.acceptance.min()) <= 1


@pytest.mark.parametrize(("initial", "num_draws"), [("refined", 1024), ("refined", 40), ("guide", 1024), ("prior", 0)])
def test_evidence_of_ragged_sequences(initial: str, num_draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps past a sequence's end are in no density, the start's included; 40 draws are too few for a covariance."""
    monkeypatch.setattr(import_module("pyrogaps.gaussians.moments"), "NUM_DRAWS", num_draws)
    model, guide = RaggedWalk(), StructuredNormal(1, 1, 4).double()
    lengths = torch.tensor([5, 1, 3, 4, 2])
    with seeded(0, "walks"):
        x = 1.5 * torch.randn(len(lengths), 5, 1, dtype=torch.float64)
    chains, temperatures = {"prior": (128, 200), "guide": (512, 50), "refined": (128, 50)}[initial]
    settings = AIS(num_chains=chains, num_temperatures=temperatures, num_leapfrog=5, initial=initial)  # type: ignore[arg-type]
    estimate = ais(model, guide, (x, lengths), settings=settings, refinement=Refinement(num_steps=60))
    assert_exact(estimate.value, estimate.mcse, model.log_evidence(x, lengths))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("data_dim", "latent_dim", "decades"), [(50, 10, 0.6), (20, 4, 3.0)])
def test_evidence_of_large_and_badly_scaled_models(
    data_dim: int, latent_dim: int, decades: float, dtype: torch.dtype
) -> None:
    model = anisotropic(data_dim, latent_dim, decades=decades, dtype=dtype)
    x, _ = draws_of(model, 6)
    settings = AIS(num_chains=256, num_temperatures=60)
    exact = anisotropic(data_dim, latent_dim, decades=decades).log_evidence(x.double())
    estimate = ais(model, WrongEncoder(model, shrink=0.95), x, settings=settings)
    assert_exact(estimate.value, estimate.mcse, exact, dtype)


@pytest.mark.slow
def test_evidence_from_the_prior_of_a_large_model() -> None:
    model = anisotropic(50, 10)
    x, _ = draws_of(model, 1)
    settings = AIS(2048, 500, schedule="sigmoid", initial="prior", target_acceptance=0.9, num_pilot_temperatures=60)
    estimate = ais(model, None, x, settings=settings)  # type: ignore[arg-type]
    assert_exact(estimate.value, estimate.mcse, model.log_evidence(x))


@pytest.mark.parametrize("initial", ["refined", "prior"])
def test_evidence_of_a_gamma_posterior(initial: str) -> None:
    from tests.test_bounds import GammaEncoder

    x = counts().double()
    settings = AIS(num_chains=512, num_temperatures=60, initial=initial)  # type: ignore[arg-type]
    estimate = ais(gamma_poisson, GammaEncoder(1.5), x, settings=settings, refinement=QUICK)
    assert_exact(estimate.value, estimate.mcse, gamma_poisson_evidence(x))


def test_evidence_of_two_modes() -> None:
    x = torch.tensor([-1.0, 0.5, 2.0, 4.0], dtype=torch.float64)
    estimate = ais(parabola, None, x, settings=AIS(num_chains=512, num_temperatures=60, initial="prior"))  # type: ignore[arg-type]
    assert_exact(estimate.value, estimate.mcse, parabola_evidence(x))


def test_batches_and_neighbours_change_nothing() -> None:
    model = anisotropic(8, 3)
    x, _ = draws_of(model, 100)
    settings = AIS(num_chains=4, num_temperatures=5)
    whole, batched = (
        ais(model, WrongEncoder(model), x, settings=settings, refinement=QUICK, batch_size=size) for size in (128, 64)
    )
    alone = ais(model, WrongEncoder(model), x[:64], settings=settings, refinement=QUICK)
    torch.testing.assert_close(batched.value, whole.value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(alone.value, whole.value[:64], rtol=1e-9, atol=1e-9)


# -------------------------------------------------------------------------------------------------------- unbiasedness

CHAINS, POINTS = 2500, 3


def small(dtype: torch.dtype) -> tuple[LinearGaussian, Tensor, Tensor]:
    """A correlated posterior in two dimensions: model, data and exact log p(x) in double precision."""
    model, exact = (anisotropic(3, 2, dtype=d, seed=3) for d in (dtype, torch.float64))
    x, _ = draws_of(model, POINTS, seed=5)
    return model, x, exact.log_evidence(x.double()).detach()


def gaussian_start(model: LinearGaussian, x: Tensor) -> Gaussian:
    """The best mean-field Gaussian, widened and off centre."""
    mean, scale = (part.detach() for part in model.mean_field_optimum(x))
    return Gaussian(mean + 0.5 * scale, (1.3 * scale).expand_as(mean).contiguous())


def by_hand(num_temperatures: int, step: float, num_datapoints: int = POINTS) -> Tuning:
    betas = schedule("linear", num_temperatures)[:, None].expand(-1, num_datapoints)
    return Tuning(betas, torch.full((num_temperatures, num_datapoints), step, dtype=torch.float64))


def path_of(start: str, model: LinearGaussian, x: Tensor, chunk: Chunk) -> Path:
    joint = JointDensity(model, x)
    evaluator = GradientEvaluator(joint, split=start == "prior")
    if start == "prior":
        with seeded(0, "test"):
            return prior_path(evaluator, chunk, Stream(0, "scale prior"))
    return anchored_path(evaluator, gaussian_start(model, x), chunk)


def assert_gate(path: Path) -> None:
    """f_0 alone, as an importance sampler, has an effective sample size of at least 5%."""
    with seeded(0, "gate"):
        state = path.evaluate(CHAINS)(path.draw(CHAINS, Stream(0, "gate")))
    ess = effective_sample_size(state.log_densities[1] - state.log_densities[0])
    assert float(ess.min()) > 0.05 * CHAINS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("start", ["gaussian", "prior"])
@pytest.mark.parametrize(
    ("num_temperatures", "step"), [(3, 0.01), (3, 0.6), (3, 2.5), (15, 0.01), (15, 0.6), (15, 2.5)]
)
def test_weights_are_unbiased(start: str, num_temperatures: int, step: float, dtype: torch.dtype) -> None:
    """E[w] = p(x) over 2,500 chains at each of 3 datapoints, with steps far too small, right, and far too large."""
    model, x, exact = small(dtype)
    chunk = Chunk(0, POINTS)
    path = path_of(start, model, x, chunk)
    assert_gate(path)
    settings = AIS(num_chains=CHAINS, num_leapfrog=4)
    with seeded(0, "run"):
        result = run_path(path, by_hand(num_temperatures, step), chunk, settings, Run(num_temperatures))
    if step == 2.5 and start == "gaussian":
        assert float(result.acceptance.max()) < 0.5
    if step == 0.01:
        assert float(result.acceptance.min()) > 0.98
    assert result.log_weights.dtype == torch.float64
    for ratios in (result.log_weights - exact).exp().T:
        assert_mean_one(ratios)


@pytest.mark.parametrize("step", [0.01, 0.6, 2.5])
@pytest.mark.parametrize("start", ["gaussian", "prior"])
def test_reverse_weights_are_unbiased(start: str, step: float) -> None:
    """E[1/w] = 1/p(x) from 4,096 exact posterior draws, one chain each."""
    model, _, _ = small(torch.float64)
    x, z = draws_of(model, 4096, seed=7)
    chunk = Chunk(0, 4096)
    path = path_of(start, model, x, chunk)
    settings = AIS(num_chains=1, num_leapfrog=4)
    with seeded(0, "run"):
        result = run_path(path, by_hand(10, step, 4096), chunk, settings, Run(0), z)
    assert_mean_one((model.log_evidence(x).detach() - result.log_weights[0]).exp())


def test_reverse_needs_exact_draws() -> None:
    """The reverse test has power: from draws a tenth too close to the posterior mean it fails by far."""
    model, _, _ = small(torch.float64)
    x, z = draws_of(model, 4096, seed=7)
    mean = model.posterior(x)[0].detach()
    chunk = Chunk(0, 4096)
    path = path_of("gaussian", model, x, chunk)
    settings = AIS(num_chains=1, num_leapfrog=4)
    with seeded(0, "run"):
        result = run_path(path, by_hand(10, 0.01, 4096), chunk, settings, Run(0), mean + 0.9 * (z - mean))
    ratios = (model.log_evidence(x).detach() - result.log_weights[0]).exp()
    assert abs(float(ratios.mean()) - 1) > 4 * float(ratios.std()) / 64


def test_the_tuned_run_is_unbiased_in_single_precision() -> None:
    """As it is used, pilot and all: 16 chains at each of 1,024 datapoints, float32."""
    model = anisotropic(10, 4, dtype=torch.float32, seed=1)
    x, _ = draws_of(model, 1024)
    exact = anisotropic(10, 4, seed=1).log_evidence(x.double()).detach()
    chunk = Chunk(0, 1024)
    path = path_of("gaussian", model, x, chunk)
    settings = AIS(num_chains=16)
    with seeded(0, "run"):
        result = run_path(path, run_pilot(path, chunk, settings, Run(0)), chunk, settings, Run(0))
    assert_mean_one((result.log_weights - exact).exp())


def gamma_path(position: Tensor) -> HMCState:
    """From N(0, 1.5^2) to the log of a Gamma(2) variable, normalised: every evidence is 1."""
    y, wide = position[..., 0], 1.5
    log_start = -0.5 * (y / wide).square() - math.log(wide) - 0.5 * math.log(2 * math.pi)
    return HMCState(position, (log_start, 2 * y - y.exp()), (-position / wide**2, 2 - position.exp()))


def gamma_chains(*, adapting: bool) -> tuple[Tensor, HMCState]:
    """Weights of 50,000 chains; if `adapting`, each lengthens its step where it accepts and halves it where not."""
    torch.manual_seed(0)
    count = 50_000
    state = gamma_path(1.5 * torch.randn(count, 1, 1, dtype=torch.float64))
    log_weights, steps = torch.zeros(count, 1, dtype=torch.float64), torch.ones(count, 1, dtype=torch.float64)
    betas, scale = torch.linspace(0, 1, 31, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    first = state
    for previous, beta in pairwise(betas):
        log_weights += (beta - previous) * (state.log_densities[1] - state.log_densities[0])
        velocity, uniform = torch.randn(count, 1, 1, dtype=torch.float64), torch.rand(count, 1, dtype=torch.float64)
        state, info = transition(Leapfrog(gamma_path, scale, 3), state, (1 - beta, beta), steps, velocity, uniform)
        if adapting:
            steps = torch.where(info.accepted, 1.3 * steps, 0.5 * steps)
    return log_weights.exp(), first


def test_adapting_on_the_running_chain_is_biased() -> None:
    """Why there is a pilot. A chain whose steps follow its own acceptances does not leave the path invariant.

    On the log of a Gamma variable it overstates p(x) by some 5%, dozens of standard errors; with steps fixed there
    is nothing to see at the same number of chains.
    """
    fixed, first = gamma_chains(adapting=False)
    ess = effective_sample_size(first.log_densities[1] - first.log_densities[0])
    assert float(ess) > 0.05 * len(fixed)
    assert_mean_one(fixed)
    adapted, _ = gamma_chains(adapting=True)
    assert float(adapted.mean()) - 1 > 10 * float(adapted.std()) / math.sqrt(len(adapted))


@pytest.mark.parametrize("step", [0.05, 1.0, 3.0])
def test_weights_are_unbiased_on_a_skewed_path(step: float) -> None:
    """By `anneal` itself, with fixed steps whatever their size, to half a percent."""
    torch.manual_seed(0)
    count = 50_000
    betas = torch.linspace(0, 1, 31, dtype=torch.float64)[:, None]
    steps = torch.full((30, 1), step, dtype=torch.float64)
    noise = Noise(Stream(0, "test"), Chunk(0, 1), dtype=torch.float64, device=torch.device("cpu"))
    state = gamma_path(1.5 * torch.randn(count, 1, 1, dtype=torch.float64))
    move = LeapfrogMove(gamma_path, torch.ones(1, 1, dtype=torch.float64), 3)
    *_, result = anneal(move, state, betas, StepSizes(steps), noise)
    assert_mean_one(result.log_weights.exp())
    assert float(result.log_weights.exp().std()) / math.sqrt(count) < 0.005


# -------------------------------------------------------------------------------------------------------------- pieces


def test_the_run_does_not_reuse_the_pilot() -> None:
    """With the tuning given, the run does not depend on how large the pilot was."""
    model, x, _ = small(torch.float64)
    chunk = Chunk(0, POINTS)
    path = path_of("gaussian", model, x, chunk)
    settings = AIS(num_chains=5, num_temperatures=4)
    results: list[AISRun] = []
    with seeded(0, "run"):
        for pilot_chains in (2, 8):
            run_pilot(path, chunk, replace(settings, num_pilot_chains=pilot_chains), Run(0))
            results.append(run_path(path, by_hand(4, 0.5), chunk, settings, Run(0)))
    assert torch.equal(results[0].log_weights, results[1].log_weights)


def test_the_pilot_finds_the_target_acceptance() -> None:
    model, x, _ = small(torch.float64)
    chunk = Chunk(0, POINTS)
    path = path_of("gaussian", model, x, chunk)
    settings = AIS(num_chains=500, num_temperatures=30, num_pilot_chains=64, num_leapfrog=4, target_acceptance=0.8)
    with seeded(0, "run"):
        tuning = run_pilot(path, chunk, settings, Run(0))
        result = run_path(path, tuning, chunk, settings, Run(0))
    assert float((result.acceptance - 0.8).abs().max()) < 0.1


@pytest.mark.parametrize("kind", ["linear", "sigmoid", "thermodynamic"])
def test_schedules_rise_from_0_to_1(kind: str) -> None:
    steps, spreads = torch.ones(20, 2, dtype=torch.float64), torch.rand(20, 2, dtype=torch.float64)
    tuning = tune(kind, 15, schedule(kind, 20), steps, spreads)  # type: ignore[arg-type]
    betas = tuning.inverse_temperatures
    assert betas.shape == (16, 2) and tuning.step_sizes.shape == (15, 2)
    assert (betas[0] == 0).all() and (betas[-1] == 1).all()
    assert (betas.diff(dim=0) > 0).all()


def test_thermodynamic_steps_are_short_where_the_spread_is_wide() -> None:
    """Spread 9 on the first half of the path and 1 on the second: nine tenths of the temperatures in the first half."""
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    spreads = torch.cat([torch.full((50, 1), 9.0), torch.full((50, 1), 1.0)]).double()
    betas = tune("thermodynamic", 100, grid, torch.ones(100, 1).double(), spreads).inverse_temperatures
    assert int((betas < 0.5).sum()) == pytest.approx(90, abs=1)


@pytest.mark.parametrize("triangular", [False, True])
def test_gaussian_start_draws_from_its_density(triangular: bool) -> None:
    scale = torch.tensor([[2.0, 0.01]]).double()
    if triangular:
        scale = torch.tensor([[[2.0, 0.0], [0.03, 0.01]]]).double()
    start = Gaussian(torch.tensor([[1.0, -3.0]]).double(), scale)
    z = start.draw(torch.randn(1000, 1, 2, dtype=torch.float64)).requires_grad_()
    covariance = scale @ scale.mT if triangular else torch.diag_embed(scale**2)
    exact = torch.distributions.MultivariateNormal(start.loc, covariance)
    log_density, gradient = start.log_density(z)
    torch.testing.assert_close(log_density, exact.log_prob(z), rtol=1e-9, atol=1e-9)
    (expected,) = torch.autograd.grad(exact.log_prob(z).sum(), z)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-8)


def test_gaussian_start_keeps_its_density_in_single_precision() -> None:
    """Correlations of 0.999 over three decades of scale cost less than a thousandth of a nat."""
    torch.manual_seed(0)
    correlation = torch.full((6, 6), 0.999).double() + 0.001 * torch.eye(6).double()
    factor = torch.logspace(-2, 1, 6).double()[:, None] * torch.linalg.cholesky(correlation)
    noise = torch.randn(2000, 1, 6)
    start = Gaussian(torch.zeros(1, 6), factor.float()[None])
    exact = -0.5 * noise.double().square().sum(-1) - factor.diagonal().log().sum() - 3 * math.log(2 * math.pi)
    error = start.log_density(start.draw(noise))[0].double() - exact
    assert float(error.abs().max()) < 1e-3


def test_moments_start_recovers_a_gaussian() -> None:
    """Mean and covariance of 1,024 draws, entry by entry within four standard errors; scales widened."""
    torch.manual_seed(0)
    factor = torch.tensor([[1.0, 0, 0], [0.6, 0.2, 0], [-20.0, 10.0, 40.0]]).double()
    draws = (torch.randn(1024, 5, 3).double() @ factor.T)[:, :, :]
    start = gaussian_by_moments([draws], diagonal=False, active=None).widened(1.5)
    covariance = factor @ factor.T
    variance = covariance.diagonal()
    error = ((variance[:, None] * variance + covariance**2) / 1024).sqrt()
    found = start.scale @ start.scale.mT / 1.5**2
    assert float(((found - covariance).abs() / error).max()) < 4
    assert float((start.loc.abs() / (variance / 1024).sqrt()).max()) < 4
    diagonal = gaussian_by_moments([draws], diagonal=True, active=None).widened(1.5)
    torch.testing.assert_close(diagonal.scale, 1.5 * draws.std(0))


def test_moments_start_gives_padding_unit_scales() -> None:
    draws = torch.randn(200, 2, 3, dtype=torch.float64)
    draws[:, 0, 2] = 0.0
    active = torch.tensor([[True, True, False], [True, True, True]])
    for diagonal in (True, False):
        start = gaussian_by_moments([draws], diagonal=diagonal, active=active).widened(1.0)
        assert torch.isfinite(start.scale).all()
        log_density, gradient = start.log_density(draws)
        assert torch.isfinite(log_density).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_chains": 0}, "evidence.num_chains: must be a whole number of at least 1"),
        ({"num_temperatures": 0}, "evidence.num_temperatures"),
        ({"num_pilot_chains": 1}, "evidence.num_pilot_chains: must be a whole number of at least 2"),
        ({"widen": 0.9}, "evidence.widen: must be a number of at least 1"),
        ({"target_acceptance": 1.0}, "evidence.target_acceptance: must be a number above 0 and below 1"),
        ({"schedule": "cosine"}, "evidence.schedule: must be one of linear, sigmoid, thermodynamic"),
        ({"initial": "posterior"}, "evidence.initial: must be one of curvature, refined, guide, prior"),
    ],
)
def test_bad_settings_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AIS(**arguments)  # type: ignore[arg-type]
