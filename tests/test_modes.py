"""Other starts: the modes they find, the integral of each, and what ledgers say of missed modes, by closed forms."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyrogaps as pg
from pyrogaps.capture.slots import POINTS
from pyrogaps.evidence.parts import PartSlots
from pyrogaps.evidence.referee import ByModes
from pyrogaps.gaussians import anchor_of, prior_gaussian
from pyrogaps.modes import Contested, Gain, Modes, examine, explore, sample
from pyrogaps.problem import Problem
from pyrogaps.run import Run
from pyrogaps.streams import Chunk
from tests.references import WrongEncoder, anisotropic, draws_of

SHARES, PLACES, WIDTH, NOISE = torch.tensor([0.7, 0.3]), torch.tensor([-4.0, 4.0]), 0.5, 5.0
X = torch.linspace(-9, 9, 40, dtype=torch.float64)
SHORT: dict[str, Any] = {"num_particles": 50, "progress": False}
BRIEF = pg.Refinement(num_steps=60, num_particles=4, num_selection=32)


def two_modes(x: Tensor) -> None:
    """The posterior keeps both modes of the prior, in shares that the datum moves."""
    with pyro.plate("data", len(x)):
        mixture = dist.Normal(PLACES.double(), torch.tensor(WIDTH, dtype=torch.float64))
        z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(SHARES.double()), mixture))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def exact(x: Tensor) -> Tensor:
    """log p(x), a mixture of Normals."""
    density = dist.Normal(PLACES.double(), math.hypot(WIDTH, NOISE)).log_prob(x[:, None])
    return (density + SHARES.double().log()).logsumexp(1)


class OneMode(nn.Module):
    """A guide that knows the first mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x - 4.0, WIDTH))


def modes_of(problem: Problem, run: Run) -> Modes:
    block = Chunk(0, problem.num_datapoints)
    wide = prior_gaussian(problem, block, run.stream("test"))
    return explore(problem, anchor_of(problem, block, run), block, run, wide)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.of(two_modes, OneMode(), X)


@pytest.fixture(scope="module")
def modes(problem: Problem) -> Modes:
    return modes_of(problem, Run())


def test_both_modes_are_found(modes: Modes) -> None:
    assert torch.equal(torch.bincount(modes.owners), torch.full((len(X),), 2))
    locations = modes.curvature.gaussian.loc[:, 0].unflatten(0, (-1, 2))
    variance = 1 / (1 / WIDTH**2 + 1 / NOISE**2)
    truth = variance * (PLACES / WIDTH**2 + X[:, None] / NOISE**2)
    assert torch.allclose(locations, truth, atol=1e-6)
    assert torch.allclose(modes.curvature.gaussian.scale.flatten(), torch.tensor(variance).double().sqrt(), atol=1e-6)
    assert torch.equal(modes.several, torch.arange(len(X)))
    some = modes.of(torch.tensor([3, 5]))
    assert torch.equal(some.owners, torch.tensor([0, 0, 1, 1]))
    assert torch.equal(some.curvature.gaussian.loc[:, 0].unflatten(0, (2, 2)), locations[[3, 5]])
    assert torch.equal(modes.ranked(1).loc[:, 0], locations[:, 1])
    assert torch.equal(modes.ranked(2).loc[:, 0], locations[:, 0])  # there is no third


def test_posteriors_with_one_mode_are_not_contested() -> None:
    model = anisotropic(6, 3)
    problem = Problem.of(model, WrongEncoder(model), draws_of(model, 64)[0])
    assert not len(modes_of(problem, Run()).several)


def test_shares_of_the_parts_add_up_and_have_the_gradients_they_say(problem: Problem, modes: Modes) -> None:
    pair = modes.of(torch.tensor([2, 7]))
    slots = PartSlots(problem.at(torch.tensor([2, 7])).evaluator, pair)
    z = 6 * torch.randn(POINTS, 4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z[:, 1], z[:, 3] = z[:, 0].clone(), z[:, 2].clone()  # both parts of a datapoint at the same points
    density = slots.at(torch.arange(4))
    (values,), (gradients,) = density(z)
    whole = problem.joint(z[:, ::2], torch.tensor([2, 7]))
    assert torch.allclose(values.unflatten(1, (2, 2)).logsumexp(-1), whole, atol=1e-9)
    step = 1e-5
    (above,), (below,) = density.values(z + step), density.values(z - step)
    assert torch.allclose(gradients[..., 0], (above - below) / (2 * step), atol=1e-5)
    assert torch.equal(density.gradients(z)[0], gradients)


def test_shares_are_known_beyond_the_reach_of_all_parts(problem: Problem, modes: Modes) -> None:
    slots = PartSlots(problem.at(torch.tensor([2])).evaluator, modes.of(torch.tensor([2])))
    far = torch.full((POINTS, 2, 1), 1e160, dtype=torch.float64)
    share, slope = slots.at(torch.arange(2))._log_share(far)
    assert torch.allclose(share, torch.tensor(0.5, dtype=torch.float64).log())
    assert not slope.isnan().any()


def test_the_parts_sum_to_the_evidence(problem: Problem, modes: Modes) -> None:
    estimate_of = ByModes(pg.Ladder(), problem, Run(), modes)
    measured = estimate_of.measure(Chunk(0, len(X)))
    estimate = estimate_of.estimate([measured])
    z_scores = (estimate.value - exact(X)) / estimate.mcse
    assert z_scores.abs().max() < 4
    assert estimate.reliable.all()
    low, high = estimate.interval()
    assert ((low <= exact(X)) & (exact(X) <= high)).double().mean() > 0.85
    upper = measured.columns["log_evidence_upper"]
    assert (upper - exact(X)).mean() > -4 * float(measured.columns["log_evidence_upper_mcse"].norm()) / len(X)


def test_a_ledger_includes_the_modes_of_those_examined_and_warns_of_the_others() -> None:
    ledger = pg.decompose(two_modes, OneMode(), X, referee=16, refinement=BRIEF, **SHORT)
    columns = ledger.per_datapoint
    examined, error = columns["examined"].values, columns["log_evidence"].values - exact(X).numpy()
    assert examined.sum() == 16
    assert abs(error[examined] / columns["log_evidence_mcse"].values[examined]).max() < 4
    assert error[~examined].min() < -1  # the second mode of the others is missed
    assert not columns["log_evidence_reliable"].values[~examined].any()
    (warning, *_) = [line for line in ledger.diagnose().warnings if line.startswith("log p(x) is too low")]
    assert "other 24 are low by about" in warning and "Pass referee=40 to examine all" in warning
    assert f"Warning: {warning}" in str(ledger)
    about = float(warning.split("low by about ")[1].split(" nats")[0])
    assert abs(about + error[~examined].mean()) < 4 * error[~examined].std() / 24**0.5


def test_all_are_examined_where_there_are_no_more() -> None:
    ledger = pg.decompose(two_modes, OneMode(), X[:30], refinement=BRIEF, **SHORT)
    error = ledger.per_datapoint["log_evidence"].values - exact(X[:30]).numpy()
    assert abs(error / ledger.per_datapoint["log_evidence_mcse"].values).max() < 4
    assert not [line for line in ledger.diagnose().warnings if "too low" in line]
    assert "Modes: all 30 datapoints examined from other starts, which raised log p(x) at" in str(ledger.table("full"))
    assert "modes missed at" in str(ledger) and "/30 reliable" not in str(ledger)


def test_without_a_referee_nothing_is_examined() -> None:
    ledger = pg.decompose(two_modes, OneMode(), X[:3], referee=False, refinement=BRIEF, **SHORT)
    assert "examined" not in ledger.per_datapoint
    for wrong in (0, True, -1, 2.5):
        with pytest.raises(pg.InputError, match="referee: must be"):
            pg.decompose(two_modes, OneMode(), X, referee=wrong, **SHORT)


def test_other_evidence_is_warned_of() -> None:
    evidence = pg.AIS(num_chains=8, num_temperatures=10)
    ledger = pg.decompose(two_modes, OneMode(), X[:20], evidence=evidence, refinement=BRIEF, **SHORT)
    assert [line for line in ledger.diagnose().warnings if "log p(x) is too low" in line and "Ladder()" in line]


def test_log_evidence_is_unreliable_where_modes_may_be_missed() -> None:
    estimate = pg.log_evidence(two_modes, OneMode(), X, referee=16)
    assert int(estimate.reliable.sum()) == 16
    kept = estimate.reliable
    assert ((estimate.value - exact(X))[kept] / estimate.mcse[kept]).abs().max() < 4
    assert pg.log_evidence(two_modes, OneMode(), X, referee=False).reliable.all()


class AtSecond(nn.Module):
    """A guide whose output lies at the second of two observations, where a refinement stays."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.2, dtype=torch.float64).log())

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 1], self.log_scale.exp()))


def conflicting(x: Tensor) -> None:
    """Heavy-tailed observations that disagree."""
    zero = torch.tensor(0.0, dtype=torch.float64)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(zero, 3.0))
        likelihood = dist.StudentT(zero + 3, z[..., None].expand(x.shape), zero + 0.2)
        pyro.sample("x", likelihood.to_event(1), obs=x)


CONFLICTING = torch.tensor([[-5.0, 5.0], [-4.6, 5.3], [-5.2, 4.9]], dtype=torch.float64)


def test_refinement_ends_at_the_best_of_the_modes() -> None:
    """The best Normal lies at one of two observations; from the other, refinement ends there, 0.4 nats lower."""
    alone = pg.refine(conflicting, AtSecond(), CONFLICTING, referee=False)
    refined = pg.refine(conflicting, AtSecond(), CONFLICTING)
    before, after = (pg.elbo(conflicting, guide, CONFLICTING) for guide in (alone, refined))
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    log_joint = Problem.of(conflicting, None, CONFLICTING).joint(grid[:, None, None].expand(-1, 3, -1))
    best = _best_normal(grid, log_joint)
    assert ((after.value - best).abs() < 4 * after.mcse + 0.02).all()
    stuck = before.value < best - 0.2
    assert stuck.tolist() == [False, True, False]
    assert refined.examined.all() and refined.gain.count == int(stuck.sum())
    assert f"other starts improved {int(stuck.sum())} of 3 examined" in repr(refined)


def _best_normal(grid: Tensor, log_joint: Tensor) -> Tensor:
    """The highest ELBO of a Normal, by a grid over its location and scale, `(N,)`."""
    best = torch.full((log_joint.shape[1],), -torch.inf, dtype=torch.float64)
    for scale in torch.linspace(0.1, 0.5, 41, dtype=torch.float64):
        for location in torch.linspace(-6, 6, 241, dtype=torch.float64):
            q = dist.Normal(location, scale)
            weight = q.log_prob(grid).exp() * (grid[1] - grid[0])
            best = best.maximum((weight[:, None] * log_joint).sum(0) + q.entropy())
    return best


def test_guides_with_parameters_for_each_datapoint_are_examined_too() -> None:
    guide = AutoNormal(two_modes, init_loc_fn=lambda site: torch.full((len(X),), -4.0, dtype=torch.float64))
    guide(X)
    ledger = pg.decompose(two_modes, guide, X, referee=10, refinement=BRIEF, **SHORT)
    assert [line for line in ledger.diagnose().warnings if "other 30 are low" in line]


def test_one_datapoint_is_examined() -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(SHARES), dist.Normal(PLACES, WIDTH)))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("at", torch.tensor(-4.0)), 0.5))

    pyro.clear_param_store()
    ledger = pg.decompose(model, guide, torch.tensor(3.0), plate=False, refinement=BRIEF, **SHORT)
    truth = float(exact(torch.tensor([3.0], dtype=torch.float64)))
    assert abs(float(ledger.per_datapoint["log_evidence"][0]) - truth) < 0.1


def test_a_problem_at_some_datapoints_is_the_same_there(problem: Problem) -> None:
    places = torch.tensor([4, 9, 30])
    part, z = problem.at(places), torch.randn(5, 3, 1, dtype=torch.float64)
    assert torch.equal(part.joint(z), problem.joint(z, places))
    assert torch.equal(part.guided().at(torch.arange(3)).log_prob(z), problem.guided().at(places).log_prob(z))
    assert problem.at(torch.arange(len(X))) is problem


def test_a_sample_is_random_and_its_own() -> None:
    chosen = sample(1000, 32, 0)
    assert len(chosen.unique()) == 32 and torch.equal(chosen, chosen.sort().values)
    assert not torch.equal(chosen, sample(1000, 32, 1))
    assert torch.equal(sample(5, 32, 0), torch.arange(5))


def test_examine_measures_the_contested_alone(problem: Problem) -> None:
    def measure(contested: Contested, run: Run) -> int:
        assert contested.problem.num_datapoints == len(contested.indices) == len(contested.modes.num_evaluations)
        return contested.modes.most

    indices, results = examine(problem, 7, Run(), measure)
    ((contested, most),) = results
    assert torch.equal(indices, contested) and len(indices) == 7 and most == 2


def test_a_gain_is_found_by_one_or_by_all_together() -> None:
    small, error = torch.full((32,), 0.025), torch.full((32,), 0.02)
    assert Gain(small, error, 32).count == 1 and not Gain(small, error, 32).found.any()
    assert Gain(small[:2], error[:2], 32).count == 0
    single = Gain(torch.tensor([0.5, 0.0, -0.3]), torch.tensor([0.1, 0.1, 0.05]), 32)
    assert single.count == 1 and single.mean == pytest.approx(0.5 / 32)
    assert torch.equal(single.accepted, torch.tensor([True, True, False]))
