"""log p(x) by the ladder: each rung against exact evidence, what is decided and why, and the ledger it makes."""

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps import InputError, JointDensity, Ladder, Refinement, log_evidence
from pyrogaps.capture import BoundDensity, GradientEvaluator
from pyrogaps.evidence import METHODS, LadderCheck, LadderEstimate, Measured
from pyrogaps.evidence.annealing import AdaptedStepSizes, Annealed, StepSizes, anneal, pilot, schedule
from pyrogaps.evidence.importance import weigh
from pyrogaps.evidence.ladder import LadderMeasurement
from pyrogaps.evidence.plan import FIRST_AIS, GAUSSIAN, GUIDE, Plan
from pyrogaps.evidence.rotations import Rotation
from pyrogaps.evidence.slots import POINTS, Slots
from pyrogaps.gaps import GapLedger
from pyrogaps.gaussians import Gaussian, gaussian_by_curvature, gaussian_of
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
    two_wells,
)

QUICK = Refinement(num_steps=300, num_particles=8, learning_rate=0.1, num_selection=128)
BRIEF = Refinement(num_steps=120, num_particles=8, learning_rate=0.15, num_selection=64)
UNCHECKED = Ladder(num_simulated=0)


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


def climbed(model: object, x: Tensor, *ladders: tuple[Ladder, int]) -> list[LadderEstimate]:
    """By each of some settings from a lowest rung on, of one refinement."""
    problem, run, zero = pg.Problem.of(model, None, x), Run(0, 512), torch.zeros(1)
    measurements = [
        LadderMeasurement(settings, problem, run, LadderCheck(zero, zero, lowest, zero)) for settings, lowest in ladders
    ]
    refiner = Refiner(AutoNormal, BRIEF)

    def measure(chunk: Chunk) -> list[Measured]:
        refined, _ = refiner(problem.evaluator, chunk, run)
        return [measurement.measure(chunk, refined) for measurement in measurements]

    parts = zip(*run.map(measure, problem.joint), strict=True)
    return [measurement.estimate(its) for measurement, its in zip(measurements, parts, strict=True)]


def test_intervals_cover_on_a_skewed_posterior() -> None:
    """Of 2,048 datapoints; four binomial standard errors are 1.9 points."""
    x = draws_of_intensities(2048, 4)
    exact = intensities_evidence(x)
    (estimate,) = climbed(intensities, x, (UNCHECKED, GUIDE))
    low, high = estimate.interval()
    assert 0.93 <= float(((low <= exact) & (exact <= high)).double().mean()) <= 0.97
    assert float(((estimate.value - exact) / estimate.mcse).mean().abs()) < 0.2
    assert set(estimate.method.tolist()) == {0, 1, 2}


def test_intervals_cover_where_the_guide_is_of_the_wrong_shape() -> None:
    """A mean-field anchor in a correlated posterior, without the curvature that would put it right."""
    model = anisotropic(4, 2, dtype=torch.float64)
    x, _ = draws_of(model, 2048, seed=2024)
    (estimate,) = climbed(model, x, (replace(UNCHECKED, max_curvature_dim=1), GUIDE))
    low, high = estimate.interval()
    exact = model.log_evidence(x).detach()
    assert 0.93 <= float(((low <= exact) & (exact <= high)).double().mean()) <= 0.97
    assert int((estimate.method == 2).sum()) > 500


def test_tolerance_is_reached() -> None:
    x = draws_of_intensities(128, 6)
    errors = {}
    for tolerance in (0.1, 0.03):
        (estimate,) = climbed(intensities, x, (replace(UNCHECKED, tolerance=tolerance), FIRST_AIS))
        errors[tolerance] = float(estimate.mcse.square().mean().sqrt())
        assert errors[tolerance] < 1.2 * tolerance
        assert int(estimate.num_draws.min()) >= POINTS
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


@pytest.mark.parametrize("scale", [1.0, 0.05, 20.0])
def test_curvature_finds_a_gaussian_posterior(scale: float) -> None:
    """From wrong scales too: what is cut off is measured again."""
    model = anisotropic(5, 3, dtype=torch.float64)
    x, _ = draws_of(model, 7, seed=1)
    start = posterior_start(model, x)
    slots = Slots(GradientEvaluator(JointDensity(model, x)), Chunk(0, 7))
    members = torch.tensor([0, 2, 5])
    begin = Gaussian(start.loc + 0.3 * start.scale, scale * start.scale).at(members)
    fitted, cost = gaussian_by_curvature(begin, lambda rows, points: slots.gradients(members[rows], points))
    mean, covariance = model.posterior(x)
    torch.testing.assert_close(fitted.loc, mean[members].detach(), atol=1e-6, rtol=1e-6)
    found = fitted.scale @ fitted.scale.mT
    torch.testing.assert_close(found, covariance.detach().expand_as(found), atol=1e-6, rtol=1e-6)
    assert int(cost.min()) >= 2 * 3


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
    cut = [(len(batch), kept) for batch, kept in slots.batches(torch.arange(41) % 50)]
    assert cut == [(32, 32), (8, 8), (8, 1)]


def test_a_weight_that_is_nan_names_its_own_datapoint() -> None:
    """Not the place that it has among those which are still open."""

    class Broken:
        joint = staticmethod(lambda z, indices: torch.where(indices == 71, torch.nan, z.sum(-1)))

        def draw(self, members: Tensor, number: int, purpose: str, part: int) -> tuple[Tensor, Tensor]:
            return torch.zeros(number, len(members), 2), torch.zeros(number, len(members))

    members = torch.tensor([2, 7, 9])
    with pytest.raises(InputError, match=r"^datapoints 71: "):
        weigh(Broken(), Chunk(64, 80), members, torch.full((3,), 128), "draws")  # type: ignore[arg-type]


def test_a_perfect_guide_is_left_with_at_once() -> None:
    """Weights that do not vary have a meaningless k-hat, which must not send anyone up the ladder."""
    model = anisotropic(5, 3, dtype=torch.float64)
    x, _ = draws_of(model, 8, seed=1)
    _, covariance = model.posterior(x)

    class Exact(nn.Module):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.MultivariateNormal(model.posterior(x)[0].detach(), covariance.detach()))

    estimate = log_evidence(model, Exact(), x, evidence=UNCHECKED, refinement=QUICK)
    assert estimate.method.tolist() == [0] * 8
    torch.testing.assert_close(estimate.value, model.log_evidence(x).detach(), atol=1e-3, rtol=0)


def test_the_plan_buys_what_the_tolerance_takes_and_the_budget_allows() -> None:
    settings = Ladder(tolerance=0.1, max_evaluations=5_000)
    plan = Plan(3, settings)
    everyone = torch.arange(3)
    plan.note(GUIDE, everyone, torch.tensor([1.0, 50.0, 80.0]), torch.tensor([True, False, False]))
    plan.note(GAUSSIAN, everyone[1:], torch.tensor([60.0, 4.0]), torch.tensor([False, False]))
    plan.note_chains(FIRST_AIS, everyone[1:], torch.tensor([9.0, math.log(2)]))
    plan.close()
    # Nothing could be trusted with the second: of a variance of 60, 50 and e^(9 / 4^0.85) - 1 it takes the last.
    assert plan.rung.tolist() == [GUIDE, FIRST_AIS, FIRST_AIS]
    costs = torch.tensor([128, 16, 16])
    wanted = plan.units(costs)
    assert int((wanted * costs).sum()) <= plan.budget
    assert wanted.tolist()[0] == 2  # 1.4 * 1 / 0.01 draws, in 128s
    plan.evaluations += 4_900
    fewer = plan.units(costs)
    assert (fewer <= wanted).all()
    assert int((fewer * costs).sum()) <= plan.budget - int(plan.evaluations.sum())


def test_a_rung_that_the_check_took_away_is_not_chosen() -> None:
    """However little its weights vary: only where no other has been tried."""
    plan = Plan(2, Ladder(), lowest=FIRST_AIS)
    both = torch.arange(2)
    plan.note(GUIDE, both, torch.tensor([0.01, 0.01]), torch.tensor([True, True]))
    assert plan.open.tolist() == [0, 1]
    plan.note_chains(FIRST_AIS, both[:1], torch.tensor([5.0]))
    plan.close()
    assert plan.rung.tolist() == [FIRST_AIS, GUIDE]


def test_what_is_spent_stays_within_the_budget() -> None:
    x = draws_of_intensities(64, 6)
    short = replace(UNCHECKED, max_evaluations=2_000, tolerance=0.01)
    free, bound = climbed(intensities, x, (UNCHECKED, FIRST_AIS), (short, FIRST_AIS))
    assert float(bound.num_evaluations.double().mean()) <= 2_000
    assert float(bound.mcse.mean()) > 0.01
    assert float(free.num_evaluations.double().mean()) < 20_000


def test_batches_and_seeds() -> None:
    x = draws_of_intensities(100, 2)
    refined = pg.refine(intensities, AutoNormal, x, settings=BRIEF, batch_size=64)
    small, large, other = (
        log_evidence(intensities, refined, x, evidence=UNCHECKED, batch_size=size, seed=seed)
        for size, seed in ((64, 0), (64, 0), (64, 1))
    )
    torch.testing.assert_close(small.value, large.value)
    assert not torch.equal(small.value, other.value)
    whole = pg.refine(intensities, AutoNormal, x, settings=BRIEF, batch_size=128)
    assert torch.equal(
        log_evidence(intensities, whole, x, evidence=UNCHECKED, batch_size=128).num_draws,
        log_evidence(intensities, whole, x, evidence=UNCHECKED, batch_size=64).num_draws,
    )


def test_one_datapoint_without_a_plate() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.tensor([0.3, 1.1, 0.7], dtype=torch.float64)
    refined = pg.refine(model, AutoNormal, x, settings=QUICK, plate=False)
    estimate = log_evidence(model, refined, x, evidence=UNCHECKED, plate=False)
    exact = dist.MultivariateNormal(torch.zeros(3).double(), 0.25 * torch.eye(3).double() + 1.0).log_prob(x)
    torch.testing.assert_close(estimate.value, exact[None], atol=0.02, rtol=0)


@pytest.fixture(scope="module")
def pair() -> tuple[LinearGaussian, WrongEncoder, Tensor]:
    model = anisotropic(4, 2, dtype=torch.float64)
    return model, WrongEncoder(model), draws_of(model, 40, seed=3)[0]


@pytest.fixture(scope="module")
def ledger(pair: tuple[LinearGaussian, WrongEncoder, Tensor]) -> GapLedger:
    evidence = Ladder(max_curvature_dim=1, num_simulated=16)
    return pg.decompose(*pair, evidence=evidence, refinement=QUICK, num_particles=500, progress=False)


def test_ladder_is_checked_and_kept_where_it_is_right(ledger: GapLedger) -> None:
    check = ledger.provenance["evidence"]["check"]
    assert check["lowest"] == 0
    assert check["num_simulated"] == 16
    assert check["width"] < 0.1


def test_ladder_is_found_wrong_where_a_mode_is_missed() -> None:
    """Of two wells a Gaussian holds one: no rung sees the other, and the sandwich stays open."""
    with seeded(0, "wells"):
        z = torch.randn(24, 2).double()
        x = z[:, 0] ** 2 + 0.3 * z[:, 1] + 0.3 * torch.randn(24).double()
    settings = Ladder(temperatures=(4, 8), num_simulated=24, max_evaluations=3000)
    refined = Refinement(num_steps=150, num_particles=8, learning_rate=0.1, num_selection=64)
    guide = AutoNormal(two_wells)
    pyro.clear_param_store()
    guide(x)
    ledger = pg.decompose(two_wells, guide, x, evidence=settings, refinement=refined, num_particles=200, progress=False)
    check = ledger.provenance["evidence"]["check"]
    assert check["lowest"] == 3
    assert check["width"] > 0.1
    assert any("log p(x) of simulated data may be" in warning for warning in ledger.diagnose().warnings)
    assert "The lowest 3 rungs are left out" in str(ledger)


def test_ledger_tells_how_it_was_measured(
    ledger: GapLedger, pair: tuple[LinearGaussian, WrongEncoder, Tensor], tmp_path: object
) -> None:
    model, _, x = pair
    data = ledger.per_datapoint
    exact = model.log_evidence(x).detach().numpy()
    error = (data["log_evidence"].values - exact) / data["log_evidence_mcse"].values
    assert np.abs(error).max() < 5
    assert "evaluations per datapoint" in str(ledger)
    assert ", tolerance 0.1" in str(ledger)
    assert "checked on 16 datapoints" in str(ledger)
    sampled = data["log_evidence_method"].values < METHODS.index("AIS")
    assert np.isnan(data["acceptance"].values).tolist() == sampled.tolist()
    again = GapLedger.from_datatree(ledger.to_datatree())
    assert str(again) == str(ledger)
    assert str(again.diagnose()) == str(ledger.diagnose())
    pg.plot_ledger(again)


def test_certificate_of_an_escalation(pair: tuple[LinearGaussian, WrongEncoder, Tensor]) -> None:
    certificate = pg.Certificate(num_simulated=8, num_refined_again=4, longer=2)
    ledger = pg.decompose(
        *pair, evidence=UNCHECKED, refinement=QUICK, num_particles=200, certificate=certificate, progress=False
    )
    assert "certificate: BDMC on 8 datapoints" in str(ledger)


def test_what_cannot_be_simulated_is_measured_unchecked() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)
            pyro.factor("penalty", -z[..., 1].abs())

    class Guide(nn.Module):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.stack([x, 0 * x], -1), 1.0).to_event(1))

    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    ledger = pg.decompose(model, Guide(), x, evidence=Ladder(), refinement=QUICK, num_particles=200, progress=False)
    assert "no check on simulated data (site 'penalty'" in str(ledger)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": 0.0}, "evidence.tolerance"),
        ({"max_evaluations": 0}, "evidence.max_evaluations"),
        ({"num_pilot_draws": 10}, "evidence.num_pilot_draws"),
        ({"temperatures": ()}, "evidence.temperatures"),
        ({"temperatures": (8, 4)}, "evidence.temperatures"),
        ({"target_acceptance": 1.0}, "evidence.target_acceptance"),
        ({"widen": 0.9}, "evidence.widen"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Ladder(**settings)  # type: ignore[arg-type]


def test_other_evidence_is_refused(pair: tuple[LinearGaussian, WrongEncoder, Tensor]) -> None:
    with pytest.raises(InputError, match="evidence: must be"):
        pg.decompose(*pair, evidence="best", progress=False)  # type: ignore[arg-type]
