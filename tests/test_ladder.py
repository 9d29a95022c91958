"""log p(x) by the ladder: each rung against exact evidence, what is decided and why, and the ledger it makes."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyrogaps as pg
from pyrogaps import InputError, JointDensity, Ladder, Refinement, log_evidence
from pyrogaps.annealing.loop import AdaptedStepSizes, Annealed, StepSizes, anneal, pilot, schedule
from pyrogaps.annealing.rotations import Rotation
from pyrogaps.capture import BoundDensity, GradientEvaluator
from pyrogaps.capture.slots import Slots
from pyrogaps.evidence import METHODS, LadderEstimate
from pyrogaps.evidence.climb import ANNEALING, SAMPLING
from pyrogaps.evidence.importance import Sampler
from pyrogaps.gaps import GapLedger
from pyrogaps.gaussians import Gaussian, anchor_of, gaussian_by_curvature, gaussian_of
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.refine import Refiner
from pyrogaps.run import Run
from pyrogaps.streams import Chunk, Noise, Stream, seeded
from tests import references
from tests.references import (
    RaggedWalk,
    WrongEncoder,
    anisotropic,
    assert_mean_one,
    draws_of,
    gamma_poisson,
    gamma_poisson_evidence,
)

QUICK = Refinement(num_steps=300, num_particles=8, learning_rate=0.1, num_selection=128)
BRIEF = Refinement(num_steps=120, num_particles=8, learning_rate=0.15, num_selection=64)


def intensities(x: Tensor) -> None:
    """J independent `gamma_poisson`s, one count each: a skewed posterior in J dimensions."""
    one = x.new_ones(x.shape[1])
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(1.5 * one, 0.5 * one).to_event(1))
        pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)


def intensities_evidence(x: Tensor) -> Tensor:
    return sum((gamma_poisson_evidence(x[:, [j]]) for j in range(x.shape[1])), start=torch.zeros(len(x)).double())


def draws_of_intensities(number: int, columns: int) -> Tensor:
    with seeded(5, "intensities"):
        return dist.Poisson(dist.Gamma(1.5, 0.5).sample((number, columns)).double()).sample()


def z_scores(estimate: LadderEstimate, exact: Tensor) -> Tensor:
    return (estimate.value - exact) / estimate.mcse


def test_intervals_cover_on_a_skewed_posterior() -> None:
    """Of 1,024 datapoints; four binomial standard errors are 2.7 points."""
    x = draws_of_intensities(1024, 4)
    exact = intensities_evidence(x)
    estimate = log_evidence(intensities, None, x)
    low, high = estimate.interval()
    assert 0.923 <= float(((low <= exact) & (exact <= high)).double().mean()) <= 0.977
    assert float(z_scores(estimate, exact).mean().abs()) < 0.2
    assert set(estimate.method.tolist()) == {SAMPLING, ANNEALING}


def test_tolerance_is_reached() -> None:
    x = draws_of_intensities(128, 12)
    errors = {}
    for tolerance in (0.1, 0.03):
        estimate = log_evidence(intensities, None, x, evidence=Ladder(tolerance=tolerance, min_ess=0.99))
        errors[tolerance] = float(estimate.mcse.square().mean().sqrt())
        assert errors[tolerance] < 1.2 * tolerance
        assert (estimate.method == ANNEALING).all()
    assert errors[0.03] < errors[0.1]


class Rotations:
    """S points of each datapoint along the path from a Gaussian, by rotations."""

    def __init__(self, start: Gaussian, density: BoundDensity, num_points: int) -> None:
        self.move, self.num_points = Rotation(start, density, 1), num_points

    def pilot(self, num_temperatures: int, target_acceptance: float, noise: Noise) -> tuple[Tensor, Annealed]:  # type: ignore[type-arg]
        """The step sizes of a pilot, and its end."""
        state = self.move.start_at(noise.normal(self.num_points, self.move.density.dim))
        steps = AdaptedStepSizes(self.move.adaptation, target_acceptance, state.position)
        path = [
            (steps.current, reached)
            for reached in pilot(self.move, state, schedule("linear", num_temperatures), steps, noise)
        ]
        return torch.stack([size for size, _ in path]), path[-1][1]

    def run(self, sizes: Tensor, noise: Noise) -> Annealed:  # type: ignore[type-arg]
        """The end of a run with the step sizes of a pilot."""
        state = self.move.start_at(noise.normal(self.num_points, self.move.density.dim))
        *_, end = anneal(self.move, state, schedule("linear", len(sizes)), StepSizes(sizes), noise)
        return end


def rotations(model: object, data: object, widen: float = 1.2, points: int = 512) -> tuple[Rotations, Chunk]:
    joint = JointDensity(model, data)
    evaluator, chunk = GradientEvaluator(joint), Chunk(0, joint.num_datapoints)
    refined, _ = Refiner(AutoNormal, QUICK)(evaluator, chunk, Run(0))
    start = gaussian_of(joint, refined, chunk, Stream(0, "anchor")).widened(widen)
    return Rotations(start, evaluator.bind(chunk.indices, points), points), chunk


@pytest.mark.parametrize("temperatures", [1, 4, 16])
def test_weights_along_rotations_are_unbiased(temperatures: int) -> None:
    x = references.counts(6)
    with seeded(0, "unused"):
        path, chunk = rotations(gamma_poisson, x)
        sizes, _ = path.pilot(temperatures, 0.8, Noise(Stream(1, "pilot"), chunk, dtype=torch.float64, device="cpu"))
        ran = path.run(sizes, Noise(Stream(2, "run"), chunk, dtype=torch.float64, device="cpu"))
    assert_mean_one((ran.log_weights - gamma_poisson_evidence(x)).exp())


def test_weights_of_ragged_sequences_are_unbiased() -> None:
    """What lies past the end of a sequence neither moves nor counts."""
    lengths = torch.tensor([1, 3, 4, 2])
    with seeded(3, "sequences"):
        x = torch.randn(4, 4, 1).double()
    model = RaggedWalk()
    with seeded(0, "unused"):
        path, chunk = rotations(model, (x, lengths))
        sizes, _ = path.pilot(12, 0.8, Noise(Stream(1, "pilot"), chunk, dtype=torch.float64, device="cpu"))
        ran = path.run(sizes, Noise(Stream(2, "run"), chunk, dtype=torch.float64, device="cpu"))
    assert_mean_one((ran.log_weights - model.log_evidence(x, lengths)).exp())


def posterior_start(model: LinearGaussian, x: Tensor) -> Gaussian:
    """Where a refinement of a mean-field guide ends: the posterior's mean, scales from its precision."""
    mean, covariance = model.posterior(x)
    scale = torch.linalg.inv(covariance).diagonal(dim1=-2, dim2=-1).rsqrt()
    return Gaussian(mean.detach(), scale.detach().expand_as(mean).clone())


@pytest.mark.parametrize("scale", [1.0, 0.15, 20.0])
def test_curvature_finds_a_gaussian_posterior(scale: float) -> None:
    """From wrong scales too: what a pass cuts off, the next one measures again."""
    model = anisotropic(5, 3, dtype=torch.float64)
    x, _ = draws_of(model, 7, seed=1)
    start = posterior_start(model, x)
    bound = GradientEvaluator(JointDensity(model, x)).bind(torch.arange(7), 6)
    begin = Gaussian(start.loc + 0.3 * start.scale, scale * start.scale)
    found = gaussian_by_curvature(begin, lambda points: bound.gradients(points)[0])
    mean, covariance = model.posterior(x)
    torch.testing.assert_close(found.gaussian.loc, mean.detach(), atol=1e-6, rtol=1e-6)
    fitted = found.gaussian.scale @ found.gaussian.scale.mT
    torch.testing.assert_close(fitted, covariance.detach().expand_as(fitted), atol=1e-6, rtol=1e-6)
    assert not found.cut.any()
    assert found.agrees.all() or scale > 1
    assert found.num_gradients.tolist() == [3 * 2 * 3] * 7


def test_curvature_says_where_it_found_none() -> None:
    """Of log p = -|z|^2 / 2 + 3 log(1 + |z|^2), whose curvature at the start is negative, and of a flat direction."""

    def gradients(points: Tensor) -> Tensor:
        return torch.stack([-points[..., 0], torch.zeros_like(points[..., 1])], -1)

    begin = Gaussian(torch.zeros(2, 2), torch.ones(2, 2))
    flat = gaussian_by_curvature(begin, gradients)
    assert flat.cut.all()
    assert not flat.agrees.any()
    broken = gaussian_by_curvature(begin, lambda points: torch.full_like(points, torch.nan))
    assert broken.cut.all()
    assert torch.isfinite(broken.gaussian.loc).all()
    assert torch.isfinite(broken.gaussian.scale).all()


@pytest.mark.parametrize(("dim", "condition"), [(6, 1e4), (50, 1e2)])
def test_a_correlated_gaussian_is_found_from_a_mean_field_guide(dim: int, condition: float) -> None:
    """The anchor of a mean-field guide alone was 1.9 nats low in 50 dimensions, with a stated error of 0.13."""
    scales = torch.logspace(0, math.log10(condition), dim, dtype=torch.float64).sqrt()
    with seeded(0, "rotation"):
        axes, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))
        x = torch.randn(6, dim, dtype=torch.float64)
    prior = axes * scales @ axes.T

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MultivariateNormal(x.new_zeros(dim), precision_matrix=prior @ prior / condition))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    covariance = torch.linalg.inv(prior @ prior / condition) + torch.eye(dim, dtype=torch.float64)
    exact = dist.MultivariateNormal(x.new_zeros(dim), covariance).log_prob(x)
    guide = AutoNormal(model)
    guide(x)
    estimate = log_evidence(model, guide, x)
    assert float(z_scores(estimate, exact).abs().max()) < 5
    assert float(estimate.mcse.max()) < 0.1


def test_a_gaussian_target_is_kept_by_every_rotation() -> None:
    model = anisotropic(5, 3, dtype=torch.float64)
    x, _ = draws_of(model, 3, seed=1)
    mean, covariance = model.posterior(x)
    exact = Gaussian(mean.detach(), torch.linalg.cholesky(covariance.detach()).expand(3, -1, -1))
    bound = GradientEvaluator(JointDensity(model, x)).bind(torch.arange(3), 8)
    noise = Noise(Stream(0, "noise"), Chunk(0, 3), dtype=torch.float64, device="cpu")
    _, ran = Rotations(exact, bound, 8).pilot(4, 0.8, noise)
    torch.testing.assert_close(ran.acceptance, torch.ones(8, 3).double())
    torch.testing.assert_close(ran.log_weights, model.log_evidence(x).detach().expand(8, -1))


def test_slots_give_each_point_its_own_gradient() -> None:
    """In batches of two widths, padded, with points that fill no slot."""
    model = anisotropic(5, 3, dtype=torch.float64)
    x, _ = draws_of(model, 50, seed=1)
    joint = JointDensity(model, x)
    slots, members = Slots(GradientEvaluator(joint), Chunk(0, 50)), torch.arange(3, 48, 4)
    points = torch.randn(37, len(members), joint.dim, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(joint(points, members).sum(), points)
    torch.testing.assert_close(slots.gradients(members, points.detach()), expected)
    torch.testing.assert_close(slots.values(members, points.detach()), joint(points, members).detach())
    cut = [(len(batch), kept) for batch, kept in slots.batches(torch.arange(41) % 50)]
    assert cut == [(16, 16), (16, 16), (16, 9)]


def test_a_weight_that_is_nan_names_its_own_datapoint() -> None:
    """Not the place that it has among those which are still open."""

    class Broken:
        dim, block = 2, Chunk(64, 80)

        @staticmethod
        def noise(stream: Stream, width: int, dtype: torch.dtype) -> Noise:
            return stream.noise(Chunk(64, 64 + width), dtype=dtype, device="cpu")

        @staticmethod
        def values(positions: Tensor, points: Tensor) -> Tensor:
            return torch.where(positions == 7, torch.nan, points.sum(-1))

    positions, start = torch.tensor([2, 7, 9]), Gaussian(torch.zeros(16, 2), torch.ones(16, 2))
    with pytest.raises(InputError, match=r"^datapoints 71: "):
        Sampler(Broken(), start, Run()).log_weights(positions, 128, "draws")  # type: ignore[arg-type]


def test_a_gaussian_posterior_is_left_with_at_once() -> None:
    """Weights that hardly vary have a meaningless k-hat, which must not send anyone up the ladder."""
    model = anisotropic(5, 3, dtype=torch.float64)
    x, _ = draws_of(model, 8, seed=1)
    estimate = log_evidence(model, WrongEncoder(model), x)
    assert estimate.method.tolist() == [SAMPLING] * 8
    assert float(z_scores(estimate, model.log_evidence(x).detach()).abs().max()) < 4
    # The anchor, a pilot, and draws for the estimate.
    assert (
        float(estimate.num_evaluations.double().mean()) <= 6 * 3 + (1 + 2 * (3 + 4)) + 512 + 512
    )  # curvature, tails, pilot, draws


def test_what_is_spent_stays_within_the_budget() -> None:
    x = draws_of_intensities(64, 6)
    free = log_evidence(intensities, None, x, evidence=Ladder(tolerance=0.01))
    bound = log_evidence(intensities, None, x, evidence=Ladder(tolerance=0.01, max_evaluations=3_000))
    assert int(bound.num_evaluations.max()) <= 3_000 < int(free.num_evaluations.max())
    assert float(bound.mcse.mean()) > 0.01
    assert float(free.mcse.square().mean().sqrt()) < 0.014


def test_batches_and_seeds() -> None:
    x = draws_of_intensities(100, 2)
    small, large, other = (
        log_evidence(intensities, None, x, batch_size=size, seed=seed) for size, seed in ((64, 0), (128, 0), (64, 1))
    )
    torch.testing.assert_close(small.value, large.value)
    assert torch.equal(small.num_draws, large.num_draws)
    assert not torch.equal(small.value, other.value)


def test_a_refined_guide_is_taken_as_it_is() -> None:
    x = draws_of_intensities(20, 2)
    refined = pg.refine(intensities, AutoNormal, x, settings=BRIEF)
    estimate = log_evidence(intensities, refined, x)
    assert float(z_scores(estimate, intensities_evidence(x)).abs().max()) < 5


def test_one_datapoint_without_a_plate() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.tensor([0.3, 1.1, 0.7], dtype=torch.float64)
    estimate = log_evidence(model, None, x, plate=False)
    exact = dist.MultivariateNormal(torch.zeros(3).double(), 0.25 * torch.eye(3).double() + 1.0).log_prob(x)
    torch.testing.assert_close(estimate.value, exact[None], atol=5 * float(estimate.mcse), rtol=0)


def test_intervals_cover_where_the_anchor_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single probe and a single axis for two latents that are correlated."""
    monkeypatch.setattr("pyrogaps.gaussians.anchor.MAX_DIM", 1)
    monkeypatch.setattr("pyrogaps.gaussians.anchor.MAX_DIM_AGAIN", 1)
    monkeypatch.setattr("pyrogaps.gaussians.low_rank_curvature.NUM_LOW_RANK_PASSES", 1)
    model = anisotropic(4, 2, dtype=torch.float64)
    x, _ = draws_of(model, 512, seed=2024)
    estimate, exact = log_evidence(model, WrongEncoder(model), x, referee=False), model.log_evidence(x).detach()
    assert (estimate.method == ANNEALING).all()
    low, high = estimate.interval()
    assert float(((low <= exact) & (exact <= high)).double().mean()) >= 0.92
    assert float(z_scores(estimate, exact).mean().abs()) < 0.2


def test_the_anchor_is_fitted_once_for_a_chunk() -> None:
    model = anisotropic(4, 2, dtype=torch.float64)
    x, _ = draws_of(model, 5, seed=1)
    problem, run = pg.Problem.of(model, WrongEncoder(model), x), Run(0)
    first = anchor_of(problem, Chunk(0, 5), run)
    before = problem.evaluator.num_gradients
    assert anchor_of(problem, Chunk(0, 5), run) is first
    assert problem.evaluator.num_gradients == before
    assert anchor_of(problem, Chunk(0, 5), run.derived("other")) is not first


@pytest.fixture(scope="module")
def pair() -> tuple[LinearGaussian, WrongEncoder, Tensor]:
    model = anisotropic(4, 2, dtype=torch.float64)
    return model, WrongEncoder(model), draws_of(model, 40, seed=3)[0]


@pytest.fixture(scope="module")
def ledger(pair: tuple[LinearGaussian, WrongEncoder, Tensor]) -> GapLedger:
    return pg.decompose(*pair, refinement=QUICK, num_particles=500, progress=False)


def test_ledger_tells_how_it_was_measured(
    ledger: GapLedger, pair: tuple[LinearGaussian, WrongEncoder, Tensor], tmp_path: object
) -> None:
    model, _, x = pair
    data = ledger.per_datapoint
    exact = model.log_evidence(x).detach().numpy()
    error = (data["log_evidence"].values - exact) / data["log_evidence_mcse"].values
    assert np.abs(error).max() < 5
    full = str(ledger.table("full"))
    assert "evaluations per datapoint" in full and ", tolerance 0.1" in full
    assert f"log p(x) reliable {int(data['log_evidence_reliable'].sum())}/{len(x)}" in str(ledger)
    sampled = data["log_evidence_method"].values < METHODS.index("AIS")
    assert np.isnan(data["acceptance"].values).tolist() == sampled.tolist()
    again = GapLedger.from_datatree(ledger.to_datatree())
    assert str(again) == str(ledger)
    assert str(again.diagnose()) == str(ledger.diagnose())
    pg.plot_ledger(again)


def test_certificate_of_a_ladder(pair: tuple[LinearGaussian, WrongEncoder, Tensor]) -> None:
    certificate = pg.Certificate(num_simulated=8, num_refined_again=4, longer=2)
    ledger = pg.decompose(*pair, refinement=QUICK, num_particles=200, certificate=certificate, progress=False)
    assert "by BDMC on 8 datapoints" in str(ledger)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": 0.0}, "evidence.tolerance"),
        ({"max_evaluations": 0}, "evidence.max_evaluations"),
        ({"num_pilot_draws": 10}, "evidence.num_pilot_draws"),
        ({"temperatures": ()}, "evidence.temperatures"),
        ({"temperatures": (8, 4)}, "evidence.temperatures"),
        ({"target_acceptance": 1.0}, "evidence.target_acceptance"),
        ({"num_chains": 8}, "evidence.num_chains"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Ladder(**settings)  # type: ignore[arg-type]


def test_other_evidence_is_refused(pair: tuple[LinearGaussian, WrongEncoder, Tensor]) -> None:
    with pytest.raises(InputError, match="evidence: must be"):
        pg.decompose(*pair, evidence="best", progress=False)  # type: ignore[arg-type]
