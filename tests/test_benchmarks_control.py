"""The benchmark of control: its bound against exact values and guides, its search, its judgement, and that it runs."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import pyrogaps as pg
from benchmarks.control import __main__ as control
from benchmarks.control import judge
from benchmarks.control.bound import Moments, evidence, gap, true_moments
from benchmarks.control.climb import maximise
from benchmarks.control.learning import LOOKAHEADS, Row
from benchmarks.control.settings import SETTINGS
from pyrogaps.models.controlled import ControlledLinear
from tests.controlled import best_guide


@pytest.fixture(autouse=True)
def double(clean_state: None) -> None:
    """`clean_state` restores the default dtype."""
    torch.set_default_dtype(torch.float64)


def truth() -> ControlledLinear:
    return ControlledLinear([[0.9, 0.4], [-0.3, 0.7]], [[0.2], [1.0]], [[1.0, -0.3]], [0.3, 0.6], 0.5, [1.2, 0.7])


def another() -> ControlledLinear:
    return ControlledLinear([[0.8, 0.1], [-0.5, 0.9]], [[0.5], [0.7]], [[0.8, 0.2]], [0.4, 0.4], 0.7, [0.9, 1.1])


def data(number: int = 400, steps: int = 5) -> tuple[Tensor, Tensor]:
    u = torch.randn(number, steps, 1, generator=torch.Generator().manual_seed(1))
    return truth().simulate(u, seed=2)[0], u


def test_evidence_from_moments_is_the_mean_over_data() -> None:
    x, u = data()
    for model in (truth(), another()):
        torch.testing.assert_close(evidence(model, Moments.of(x, u)), model.log_evidence(x, u).mean())


@pytest.mark.parametrize("lookahead", [0, 1, 3, math.inf])
def test_gap_under_the_models_own_law_is_the_conditioning_gap(lookahead: float) -> None:
    for model in (truth(), another()):
        moments = Moments(true_moments(model, 5), 5, 1, 1)
        found = gap(model, moments, moments.left(lookahead))
        torch.testing.assert_close(found, model.conditioning_gap(5, lookahead), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_bound_is_the_elbo_of_the_best_guide(lookahead: float) -> None:
    """On data that do not follow the model, whose best guide is fitted to these data; only its draws are random."""
    (x, u), model = data(), another()
    moments, guide = Moments.of(x, u), best_guide(another(), x, u, lookahead)
    expected = evidence(model, moments) - gap(model, moments, moments.left(lookahead))
    # The mean over the same data, whose spread is not an error here: only that of the draws is.
    particles = 200
    elbo = pg.elbo(model, guide, (x, u), num_particles=particles, progress=False)
    error = float((elbo.log_weights.var(0) / particles).mean() / len(x)) ** 0.5
    assert abs(float(elbo.value.mean() - expected)) < 4 * error
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        with torch.no_grad():
            guide.weight.add_(0.05 * torch.randn(guide.weight.shape, generator=generator))
        assert pg.elbo(model, guide, (x, u), num_particles=20, progress=False).value.mean() < expected


def test_moments_of_infinite_data_are_those_of_many() -> None:
    number = 20000
    exact, found = true_moments(truth(), 4), Moments.of(*data(number, 4)).second
    error = ((exact**2 + exact.diagonal()[:, None] * exact.diagonal()) / number).sqrt()
    assert float(((found - exact) / error).abs().max()) < 4.5  # of 64 elements


class Hills(nn.Module):
    """Problems whose maxima are known: curved valleys of several widths, and a plane that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor([[-1.2, 1.0], [0.5, 2.0], [3.0, -1.0]]))

    def heights(self) -> Tensor:
        x, y = self.place.unbind(1)
        steepness = torch.tensor([100.0, 10.0, 1.0])
        return -((1 - x) ** 2) - steepness * (y - x**2) ** 2


def test_search_solves_every_problem_by_itself() -> None:
    hills = Hills()
    values, slopes = maximise(hills, hills.heights, 100)
    torch.testing.assert_close(hills.place.detach(), torch.ones(3, 2), atol=1e-5, rtol=0)
    assert float(values.abs().max()) < 1e-10
    assert float(slopes.max()) < 1e-5
    alone = Hills()
    with torch.no_grad():
        alone.place[1:] = torch.tensor([1.0, 1.0])
    maximise(alone, alone.heights, 20)
    together = Hills()
    maximise(together, together.heights, 20)
    torch.testing.assert_close(alone.place[0], together.place[0])


def row(setting: str, data_set: int | str, lookahead: float, regret: float) -> Row:
    return Row(setting, str(data_set), lookahead, 1.0, regret, 0.5, -3.0, 0.1, 2.0, 0.3, 0.0)


def test_judgement_leaves_no_data_set_out() -> None:
    filtered = [0.2, math.inf, 0.3, math.inf, 0.4, math.inf, math.inf]
    smoothed = [0.1, math.inf, 0.1, 0.2, 0.5, 0.1, 0.1]
    found = [row("one", n, 0, value) for n, value in enumerate(filtered)]
    found += [row("one", n, math.inf, value) for n, value in enumerate(smoothed)]
    found += [row("one", "infinite", 0, 0.25), row("other", 0, 0, 9.0)]
    summary = judge.summary(found, "one", 0)
    assert (summary.number, summary.unstable, summary.median, summary.infinite_data) == (7, 4, math.inf, 0.25)
    assert summary.low == 0.2 and summary.high == math.inf
    comparison = judge.compared(found, "one", 0)
    assert (comparison.worse, comparison.better) == (5, 1)
    assert comparison.p == pytest.approx(2 * 7 / 64)
    assert comparison.verdict == "undecided"
    assert judge.Comparison(19, 1, 4e-5).verdict == "worse"
    assert judge.Comparison(1, 19, 4e-5).verdict == "better"


def test_interval_of_a_median_covers() -> None:
    draws = np.random.default_rng(1).exponential(size=(4000, 20))
    inside = [low <= math.log(2) <= high for low, high in map(judge.interval, draws)]
    exact = 1 - 2 * float(stats.binom.cdf(5, 20, 0.5))
    assert exact > 0.95
    assert abs(np.mean(inside) - exact) < 4 * (exact * (1 - exact) / len(draws)) ** 0.5
    assert judge.interval(np.array([1.0, 2.0, 3.0])) == (-math.inf, math.inf)


def test_it_runs_and_continues(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    some = SETTINGS[0], replace(SETTINGS[5], num_trajectories=50), replace(SETTINGS[-1], num_trajectories=50)
    monkeypatch.setattr(control, "SETTINGS", some)
    monkeypatch.setattr("sys.argv", ["control", "--quick", "--runs", str(tmp_path)])
    for _ in range(2):
        control.main()
        monkeypatch.setattr(control, "rows", None)
    table = pd.read_csv(tmp_path / "quick" / "control.csv")
    assert len(table) == len(LOOKAHEADS) * (3 + 3 + 2)
    assert (table["regret"] > -1e-9).all()
    assert (table["gap_at_truth"].groupby(table["lookahead"]).max().diff().dropna() < 0).all()
    assert (tmp_path / "quick" / "control.png").stat().st_size > 0
    page = (tmp_path / "quick" / "control.md").read_text()
    assert "| random systems | smoother |" in page
    assert "{" not in page
