"""The truths of `benchmarks/trust` against the programs themselves, its judge on made-up values, and a quick run."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy import optimize
from torch import Generator, Tensor

import pyrogaps as pg
from benchmarks import reporting
from benchmarks.trust import __main__ as trust
from benchmarks.trust import heavy, hierarchies, judge, modes
from benchmarks.trust.page import page
from benchmarks.trust.problem import Bounds, Instance
from benchmarks.trust.problems import PROBLEMS
from benchmarks.trust.scales import Scales
from benchmarks.trust.truths import best_gaussian, gaussian_elbo, line, log_integral, plane
from tests.references import assert_exact, parabola_best_elbo, parabola_joint

FEW = 3


def drawn(name: str, number: int = FEW) -> tuple[Instance, pg.JointDensity]:
    instance = PROBLEMS[name].make(number, Generator().manual_seed(7))
    return instance, pg.JointDensity(instance.model, instance.data, plate=instance.plate)


def at(joint: pg.JointDensity, z: Tensor) -> Tensor:
    """log p(x_n, z) of points `(S, 1 or N, dim)`, the same for every datapoint."""
    with torch.no_grad():
        return joint(z.expand(-1, joint.num_datapoints, -1)).double()


def test_there_are_enough_problems_and_twelve_are_easy() -> None:
    assert len(PROBLEMS) >= 25
    assert sum(problem.easy for problem in PROBLEMS.values()) == 12
    assert all(problem.name == name for name, problem in PROBLEMS.items())


# Where the latents are one number: the range that holds the posterior, and points to integrate with.
LINES: dict[str, tuple[float, float, int]] = {
    **dict.fromkeys([p.name for p in modes.PROBLEMS if p.name not in ("four-modes", "two-modes-20")], (-25, 25, 20001)),
    "cauchy": (-4000.0, 4000.0, 160001),
    "conflict": (-30.0, 30.0, 60001),
    "beta": (-40.0, 40.0, 8001),
    "beta-sparse": (-120.0, 120.0, 24001),
    "gamma": (-40.0, 8.0, 8001),
    "gamma-sparse": (-300.0, 8.0, 60001),
    "truncated": (-60.0, 60.0, 20001),
    "half-normal": (-50.0, 4.0, 20001),
    "conditioned-1": (-12.0, 12.0, 4001),
    "conditioned-bit": (-12.0, 12.0, 4001),
}
PLANES: dict[str, tuple[tuple[float, float], tuple[float, float], int]] = {
    "four-modes": ((-8, 8), (-8, 8), 401),
    "ring": ((-6, 6), (-6, 6), 601),
    "banana": ((-7, 7), (-25, 25), 1001),
    "ordered": ((-8, 8), (-9, 4), 501),
    "dirichlet": ((-25, 12), (-25, 12), 501),
}
GAUSSIAN = [
    *(f"gaussian-{dim}-1e{decades}" for dim in (6, 20, 50, 200) for decades in (2, 4)),
    *("exact-guide", "narrow-guide", "wide-guide", "far-guide", "outlier", "conditioned-4", "schools-known-scale"),
]


@pytest.mark.parametrize("name", LINES)
def test_evidence_is_the_integral_of_the_program_over_a_line(name: str) -> None:
    instance, joint = drawn(name)
    low, high, points = LINES[name]
    integral = log_integral(lambda z: at(joint, z), low, high, points)
    torch.testing.assert_close(integral, instance.log_evidence, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PLANES)
def test_evidence_is_the_integral_of_the_program_over_a_plane(name: str) -> None:
    instance, joint = drawn(name, 2)
    first, second, points = PLANES[name]
    sides = plane((*first, points), (*second, points))
    area = math.log((first[1] - first[0]) * (second[1] - second[0]) / (points - 1) ** 2)
    torch.testing.assert_close(torch.logsumexp(at(joint, sides), 0) + area, instance.log_evidence, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_evidence_is_laplaces_where_the_posterior_is_gaussian(name: str) -> None:
    """log p(x, m) + d ln(2 pi) / 2 - ln |H| / 2 at the mode m, exactly; the gradient and Hessian by autograd."""
    instance, joint = drawn(name, 2)
    z = torch.zeros(1, joint.num_datapoints, joint.dim, dtype=torch.float64, requires_grad=True)
    value = joint(z)
    (gradient,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    rows = [torch.autograd.grad(gradient[..., k].sum(), z, retain_graph=True)[0] for k in range(joint.dim)]
    precision = -torch.stack(rows, -2)[0]
    rise = torch.einsum("ni,nij,nj->n", gradient[0], torch.linalg.inv(precision), gradient[0]) / 2
    exact = value[0] + rise + joint.dim * math.log(2 * math.pi) / 2 - torch.logdet(precision) / 2
    torch.testing.assert_close(exact.detach(), instance.log_evidence, rtol=1e-9, atol=1e-6)


def test_evidence_in_float32_is_the_programs_to_its_rounding() -> None:
    """The posterior is Gaussian, so that log p(x) = log p(x, z) - log p(z | x) at any z."""
    instance, _ = drawn("float32")
    assert instance.data.dtype == torch.float32
    assert float(instance.log_evidence.mean()) < -9e4
    mean, covariance = instance.model.double().posterior(instance.data.double())
    posterior = torch.distributions.MultivariateNormal(mean, covariance)
    value = pg.JointDensity(instance.model, instance.data.double())(mean[None])[0]
    torch.testing.assert_close((value - posterior.log_prob(mean)).detach(), instance.log_evidence, rtol=1e-8, atol=0)


def test_evidence_of_independent_coordinates_is_their_sum() -> None:
    for dim, make in (
        (2, lambda n, g: heavy.student(2, 1.0, n, g)),
        (2, lambda n, g: modes.mixture((0.5, 0.5), (-4, 4), (0.5, 0.5), -4, 0.5, 1, 2, 2.5, n, g)),
    ):
        instance = make(2, Generator().manual_seed(3))
        joint = pg.JointDensity(instance.model, instance.data)
        side = float(instance.data.abs().max()) + 14
        sides = plane(*[(-side, side, 801)] * dim)
        area = 2 * math.log(2 * side / 800)
        torch.testing.assert_close(
            torch.logsumexp(at(joint, sides), 0) + area, instance.log_evidence, rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("name", ["funnel", "funnel-9", "schools"])
def test_evidence_of_scales_is_that_of_a_long_run(name: str) -> None:
    """Importance sampling: the scale from a wide Normal, the rest from its posterior given the scale."""
    instance, joint = drawn(name)
    generator, size = Generator().manual_seed(1), 40_000
    number, rest = joint.num_datapoints, joint.dim - 1
    x = instance.data.reshape(number, -1)
    of_funnel = name != "schools"
    width = 4.0 if of_funnel else 1.6
    v = width * torch.randn(size, number, 1, generator=generator, dtype=torch.float64)
    unit = torch.randn(size, number, rest, generator=generator, dtype=torch.float64)
    log_q = torch.distributions.Normal(0.0, width).log_prob(v)[..., 0]
    if of_funnel:
        precision = (-v).exp().expand_as(unit) + 1
        mean, root = x / precision, precision.rsqrt()
        z = torch.cat([v, mean + root * unit], -1)
        log_q = log_q + torch.distributions.Normal(0.0, 1.0).log_prob(unit).sum(-1) - root.log().sum(-1)
    else:
        inverse = (-2 * v[..., 0]).exp()
        matrix = torch.zeros(size, rest, rest, dtype=torch.float64)  # of m and the effects
        matrix[:, 0, 0] = hierarchies.TOP**-2 + (rest - 1) * inverse[:, 0]
        matrix[:, 0, 1:] = matrix[:, 1:, 0] = -inverse
        matrix[:, 1:, 1:] = torch.diag_embed(inverse + hierarchies.SIGMAS**-2)
        information = torch.cat([torch.zeros(1).double(), x[0] / hierarchies.SIGMAS**2])
        given = torch.distributions.MultivariateNormal(torch.linalg.solve(matrix, information), precision_matrix=matrix)
        others = given.sample()
        z = torch.cat([others[:, :1], v[:, 0], others[:, 1:]], -1)[:, None]
        log_q = log_q + given.log_prob(others)[:, None]
    weights = at(joint, z) - log_q
    value = torch.logsumexp(weights, 0) - math.log(size)
    mcse = (weights - weights.amax(0)).exp()
    assert_exact(value, mcse.std(0) / mcse.mean(0) / size**0.5, instance.log_evidence)


@pytest.mark.parametrize("name", PROBLEMS)
def test_bounds_are_in_order_and_the_guides_is_the_programs(name: str) -> None:
    """L[q] <= L[q*] <= log p(x), and L[q] within 4.5 standard errors of that of 4,000 draws."""
    instance, _ = drawn(name, 2)
    bounds = instance.bounds()
    assert bounds.elbo is not None
    assert bounds.elbo_refined is not None
    slack = 1e-9 * float(instance.log_evidence.abs().max())
    assert float((bounds.elbo - bounds.elbo_refined).max()) <= slack
    assert float((bounds.elbo_refined - instance.log_evidence).max()) <= slack
    if bounds.elbo_shared is not None:
        assert float((bounds.elbo_shared - bounds.elbo_refined).max()) <= slack
    measured = pg.elbo(instance.model, instance.guide, instance.data, num_particles=4000, plate=instance.plate)
    off = (measured.value - bounds.elbo).abs()
    assert float((off - 4.5 * measured.mcse - 1e-9).max()) < 0, (off / measured.mcse).tolist()


def test_best_gaussian_is_that_of_a_search_by_another_optimiser() -> None:
    x = torch.tensor([-1.0, 0.4, 2.5, 5.0], dtype=torch.float64)

    def log_joint(z: Tensor) -> Tensor:
        columns = [parabola_joint(float(value), z[..., n, 0].numpy()) for n, value in enumerate(x)]
        return torch.from_numpy(np.stack(columns, -1))

    def differentiable(z: Tensor) -> Tensor:
        z = z[..., 0]
        return -0.5 * z**2 - 0.5 * ((x - z**2) / 0.8) ** 2 - math.log(2 * math.pi * 0.8)

    points = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None, None].expand(-1, 4, -1)
    torch.testing.assert_close(differentiable(points), log_joint(points))
    best = best_gaussian(differentiable, line(-3.0, 3.0, 31), (0.2, 0.4, 0.8), 4)
    torch.testing.assert_close(best, parabola_best_elbo(x), rtol=0, atol=1e-6)


def test_best_gaussian_of_a_gaussian_is_the_closed_form() -> None:
    precision = torch.tensor([[2.0, 1.2], [1.2, 1.5]], dtype=torch.float64)
    log_joint = lambda z: -0.5 * torch.einsum("...i,ij,...j->...", z - 0.7, precision, z - 0.7)  # noqa: E731
    evidence = math.log(2 * math.pi) - float(torch.logdet(precision)) / 2
    gap = float(precision.diagonal().log().sum() - torch.logdet(precision)) / 2
    best = best_gaussian(log_joint, plane((-2.0, 2.0, 5), (-2.0, 2.0, 5)), (0.5, 1.0), 2)
    torch.testing.assert_close(best, torch.full((2,), evidence - gap, dtype=torch.float64), rtol=0, atol=1e-9)


def test_best_log_normal_is_stirlings_remainder() -> None:
    instance, joint = drawn("gamma", 4)
    best = best_gaussian(lambda z: joint_of(joint, z), line(-4.0, 4.0, 33), (0.2, 0.5, 1.0), 4)
    refined = instance.bounds().elbo_refined
    assert refined is not None
    torch.testing.assert_close(best, refined, rtol=0, atol=1e-6)


def joint_of(joint: pg.JointDensity, z: Tensor) -> Tensor:
    """The program's density, with a graph, of points `(*, N, d)`."""
    return joint(z.reshape(-1, *z.shape[-2:])).reshape(z.shape[:-1])


@pytest.mark.parametrize(
    "name", ["two-modes-unequal", "three-modes", "spike-and-slab", "cauchy", "conflict", "truncated"]
)
def test_no_gaussian_of_a_fine_search_is_better(name: str) -> None:
    instance, joint = drawn(name)
    best = instance.bounds().elbo_refined
    assert best is not None
    with torch.no_grad():
        for mean in torch.linspace(-6, 6, 41, dtype=torch.float64):
            for scale in (0.1, 0.2, 0.5, 1.5, 4.0):
                centre = torch.full((FEW, 1), float(mean), dtype=torch.float64)
                value = gaussian_elbo(lambda z: joint_of(joint, z), centre, torch.full_like(centre, scale))
                assert float((value - best).max()) < 1e-4


def test_best_mean_field_of_a_funnel_is_that_of_all_parameters() -> None:
    of, x = Scales(2.0, 1.0), torch.tensor([[0.4, -1.5, 3.0]], dtype=torch.float64)

    def loss(theta: np.ndarray) -> float:
        m, s, mean, scale = (torch.from_numpy(part) for part in np.split(theta, [1, 2, 5]))
        return -float(of.of_mean_field(x, m, s.exp(), mean[None], scale.exp()[None]))

    starts = [np.r_[v, -0.5, 0.5 * x[0].numpy(), np.zeros(3)] for v in (-3.0, 0.0, 2.0)]
    found = min(optimize.minimize(loss, start, tol=1e-10).fun for start in starts)
    torch.testing.assert_close(of.best(x), torch.tensor([-found], dtype=torch.float64), rtol=0, atol=1e-6)


def test_best_mean_field_of_the_schools_is_that_of_all_parameters() -> None:
    instance = PROBLEMS["schools"].make(1, Generator().manual_seed(2))
    y, size = instance.data, len(instance.data)

    def loss(theta: np.ndarray) -> float:
        t, s, m, s_m, mean, scale = (torch.from_numpy(part) for part in np.split(theta, [1, 2, 3, 4, 4 + size]))
        return -float(hierarchies.schools_elbo(y, t, s.exp(), m, s_m.exp(), mean[None], scale.exp()[None]))

    starts = [np.r_[t, -0.7, float(y.mean()), -0.7, y.numpy() / 2, np.zeros(size)] for t in (-2.0, 0.0)]
    limits = [(-6.0, 6.0), (-4.0, 1.0), (-6.0, 6.0), (-4.0, 3.0), *[(-9.0, 9.0)] * size, *[(-5.0, 3.0)] * size]
    found = min(optimize.minimize(loss, start, bounds=limits, tol=1e-12).fun for start in starts)
    refined = instance.bounds().elbo_refined
    assert refined is not None
    torch.testing.assert_close(refined, torch.tensor([-found], dtype=torch.float64), rtol=0, atol=1e-5)


def values(off: list[float], mcse: list[float], declared: list[bool]) -> judge.Values:
    value, error = np.array(off), np.array(mcse)
    bounds = value + 0.1, np.full_like(value, 0.01)
    return judge.Values(value, error, np.array(declared), value - 2 * error, value + 2 * error, *bounds)


def judged(found: judge.Values, **how: bool) -> judge.Judgement:
    settings = {"flagged": False, "easy": True, **how}
    return judge.judged(judge.LEDGER, "log_evidence", found, np.zeros(len(found.value)), **settings)


def test_judge_of_means() -> None:
    right, off = values([0.01, -0.01], [0.01, 0.01], [True, True]), values([-0.2, -0.2], [0.01, 0.01], [False, False])
    assert judged(off).wrong
    assert judged(off).wrong_datapoints == 0
    assert not judged(off, flagged=True).wrong
    assert not judged(off, flagged=True).false_alarm
    assert not judged(right).wrong
    assert judged(right, flagged=True).false_alarm
    assert not judged(right, flagged=True, easy=False).false_alarm
    # Far off, but by less than four of its errors; and by many errors, but less than 0.03 nats.
    assert not judged(values([-0.2, -0.2], [0.1, 0.1], [True, True])).wrong
    assert not judged(values([-0.02, -0.02], [0.0, 0.0], [True, True])).wrong
    assert judged(values([math.nan, 0.0], [0.1, 0.1], [True, True])).wrong


def test_judge_of_datapoints() -> None:
    result = judged(values([0.0, -0.5, 0.5, -1.0], [0.01, 0.01, 0.2, 0.01], [True, True, True, False]))
    assert (result.declared, result.wrong_datapoints, result.comparable) == (3, 1, 3)
    assert (result.worst, result.worst_stated) == (-0.5, 0.01)
    assert result.covered == 1
    # Below 0 by more than the upper bound's four errors allow: -0.5 + 0.1 + 0.04; 0.5 lies above by 2.5 errors.
    assert result.outside == 1


def test_negligible_errors_are_covered() -> None:
    assert judged(values([5e-4, 2e-3], [1e-6, 1e-6], [True, True])).covered == 1


def test_means_of_an_estimate_are_over_those_declared() -> None:
    found = values([0.0, -5.0], [0.01, 0.01], [True, False])
    result = judge.judged(judge.ALONE, "log_evidence", found, np.zeros(2), flagged=False, easy=False)
    assert not result.wrong
    assert result.error == 0.0


@pytest.mark.parametrize(
    ("warning", "quantities"),
    [
        ("log p(x), and the gaps measured from it, cannot be trusted for 3 datapoints", {"log_evidence"}),
        (
            "refinement had not converged for 20%, so the approximation gap is too large and the amortization gap too "
            "small",
            {"elbo_refined", "approximation_gap", "amortization_gap"},
        ),
        ("retraining (phi-hat) had not converged", set()),
    ],
)
def test_warnings_name_quantities(warning: str, quantities: set[str]) -> None:
    assert {name for name in judge.NAMES if judge.named(name, [warning.lower()])} == quantities


def made_up_ledger(*warnings: str) -> Any:
    """Three datapoints of which the first was examined from other starts, and all are low by a nat."""
    columns = {"log_evidence": -1.0, "elbo": -2.0, "elbo_refined": -1.5, "inference_gap": 1.0, "approximation_gap": 0.5}
    variables: dict[str, Any] = {name: ("datapoint", np.full(3, value)) for name, value in columns.items()}
    variables |= {f"{name}_mcse": ("datapoint", np.full(3, 0.01)) for name in columns}
    variables |= {name: ("datapoint", [True, True, False]) for name in ("log_evidence_reliable", "converged")}
    ends = {"low": -1.02, "high": -0.98, "upper": -0.9, "upper_mcse": 0.01}
    variables |= {f"log_evidence_{name}": ("datapoint", np.full(3, value)) for name, value in ends.items()}
    data = xr.Dataset({**variables, "examined": ("datapoint", [True, False, False])})

    class Ledger:
        per_datapoint = data

        def diagnose(self) -> SimpleNamespace:
            return SimpleNamespace(warnings=warnings)

        def __str__(self) -> str:
            return "a table"

    return Ledger()


def test_judge_of_a_ledger() -> None:
    """Reliable columns decide; of L[q*], a warning holds for those that were not examined."""
    zero = torch.zeros(3).double()
    bounds = Bounds(zero - 2, zero - 1.5)
    silent = {row.quantity: row for row in judge.of_ledger(made_up_ledger(), zero, bounds, easy=False)}
    assert [silent[name].declared for name in ("log_evidence", "elbo", "elbo_refined", "inference_gap")] == [2, 3, 2, 2]
    assert [silent[name].wrong for name in ("log_evidence", "elbo", "elbo_refined", "inference_gap")] == [1, 0, 0, 1]
    assert silent["log_evidence"].wrong_datapoints == silent["log_evidence"].outside == 2
    warned = made_up_ledger("log p(x) is too low: other starts found more", "L[q*] is too low: other starts found more")
    loud = {row.quantity: row for row in judge.of_ledger(warned, zero, bounds, easy=False)}
    unnamed = [name for name, row in loud.items() if not row.flagged]
    assert unnamed == ["elbo"]
    declared = [loud[name].declared for name in ("log_evidence", "elbo", "elbo_refined", "approximation_gap")]
    assert declared == [2, 3, 1, 1]
    assert not any(row.wrong for row in loud.values())


def test_truths_of_gaps_are_differences_and_sum() -> None:
    one = torch.ones(2).double()
    known = judge.known(0 * one, Bounds(-6 * one, -1 * one, -3 * one))
    gaps = [known[name][0] for name in ("approximation_gap", "conditioning_gap", "amortization_gap")]
    assert gaps == [1, 2, 3]
    assert known["inference_gap"][0] == 6
    assert "conditioning_gap" not in judge.known(0 * one, Bounds(-6 * one, -1 * one))


def table_of(**columns: object) -> pd.DataFrame:
    facts = {"problem": "gamma", "easy": True, "seed": 0, "seconds": 1.0, "warnings": "", "machine": "one"}
    row = judged(values([0.0] * 1200, [0.01] * 1200, [True] * 1200))
    return pd.DataFrame([facts | vars(row) | columns])


def test_page_says_what_the_table_says() -> None:
    assert "None." in page(table_of())
    text = page(table_of(wrong=True, error=-0.7, stated=0.002, covered=1000))
    assert "| means of ledgers, confidently wrong | 1 of 1 |" in text
    assert "**-0.700** ± 0.0020" in text
    assert "83.3% **below**" in text


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(reporting, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(*arguments: object) -> None:
        monkeypatch.setattr("sys.argv", ["trust", *map(str, arguments)])
        trust.main()

    return run


@pytest.mark.usefixtures("brief_check")
def test_quick_run_writes_its_page_and_continues(
    results: Path, command: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for _ in range(2):
        command("--quick", "--runs", tmp_path / "runs")
        table = pd.read_csv(results / "trust-quick.csv")
        assert table["problem"].unique().tolist() == list(trust.QUICK)
        assert set(table[table["problem"] == "conditioned-1"]["quantity"]) >= {"elbo_shared", "conditioning_gap"}
        monkeypatch.setattr(trust, "measured", None)
    assert not (results / "trust.csv").exists()


def test_unknown_problem_is_refused(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("--problem", "nothing")
    assert "no problem nothing" in capsys.readouterr().err
