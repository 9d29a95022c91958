"""What results say of themselves in one line: no dumps of tensors, no "1 datapoints", no shares of nothing."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from torch import Tensor

import pyrogaps as pg
from pyrogaps.errors import counted
from pyrogaps.evidence.ladder_estimate import LadderEstimate
from pyrogaps.gaps.diagnose import diagnosis
from pyrogaps.gaps.other_starts import cautions_of, lines_of
from pyrogaps.log_weights import Estimate, log_mean_exp_estimate, mean_estimate
from pyrogaps.run import Run
from pyrogaps.training.settings import TrainingResult

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z[:, None].expand(x.shape), 1.0).to_event(1), obs=x)


def test_an_estimate_is_one_line() -> None:
    log_weights = torch.randn(200, 40, generator=torch.Generator().manual_seed(2)) * 0.1
    text = repr(mean_estimate(log_weights))
    assert text.startswith("Estimate(40 datapoints: mean ")
    assert text.endswith(" nats, Monte Carlo error 0.001; lower bound; 40 reliable)")
    assert "Estimate(1 datapoint: mean " in repr(log_mean_exp_estimate(log_weights[:, :1]))
    unknown = Estimate(torch.tensor([-1.0, -torch.inf]), torch.full((2,), torch.nan), "lower bound")
    assert repr(unknown) == "Estimate(2 datapoints: mean -inf nats; lower bound; reliability not examined)"


def test_no_result_dumps_its_tensors() -> None:
    estimate, number = mean_estimate(torch.randn(20, 40)), torch.zeros(40)
    results = [
        LadderEstimate(number, number, "lower bound", draws=(torch.randn(20),) * 40, method=number),
        pg.bdmc(model, X, settings=pg.AIS(2, 3, num_leapfrog=1), initial="prior"),
        pg.mapa_posterior(X, "gaussian", bandwidth=1.0),
        pg.Split(X),
        pg.Problem.of(model, None, X).simulated(0),
        TrainingResult({"train_elbo": [0.0] * 500}, 3, 500, stopped_early=False),
        estimate,
    ]
    for result in results:
        text = repr(result)
        assert text.startswith(f"{type(result).__name__}(")
        assert "tensor" not in text and "\n" not in text and len(text) < 600, text


def test_one_is_not_many() -> None:
    assert [counted(number, "start") for number in (0, 1, 2, 1000)] == [
        "0 starts",
        "1 start",
        "2 starts",
        "1,000 starts",
    ]


def tree(total: tuple[float, float], **parts: tuple[float, float]) -> xr.Dataset:
    """A ledger's gaps, each with its mean and error over datapoints."""
    rows = {"inference_gap": total, **parts}
    columns: dict[str, list[object]] = {
        "mean": [mean for mean, _ in rows.values()],
        "standard_error": [error for _, error in rows.values()],
        "mcse": [0.0] * len(rows),
        "parent": ["", *["inference_gap"] * len(parts)],
        "label": [name.replace("_", " ") for name in rows],
        "cause": [""] * len(rows),
        "remedy": [""] * len(rows),
    }
    return xr.Dataset({name: ("gap", values) for name, values in columns.items()}, {"gap": [*rows]})


@pytest.mark.parametrize(
    ("total", "said"),
    [
        ((0.02, 0.05), "The inference gap is 0.020 ± 0.050 nats: not larger than its error"),
        ((-0.02, 0.05), "The inference gap is −0.020 ± 0.050 nats: not larger than its error"),
        ((-0.5, 0.05), "The inference gap is −0.500 ± 0.050 nats: negative, so log p(x) is measured too low"),
    ],
)
def test_there_are_no_shares_of_nothing(total: tuple[float, float], said: str) -> None:
    text = str(diagnosis(tree(total, approximation_gap=(1.2, 0.1), amortization_gap=(total[0] - 1.2, 0.1)), ()))
    assert said in text
    assert "%" not in text
    assert "approximation gap 1.200 ± 0.100 nats:" in text


def test_shares_of_a_gap_stay() -> None:
    found = diagnosis(tree((1.0, 0.1), approximation_gap=(0.25, 0.1), amortization_gap=(0.75, 0.1)), ())
    assert [finding.share for finding in found.findings] == pytest.approx([0.75, 0.25])
    assert "(75%)" in str(found) and "The inference gap is" not in str(found)
    assert np.isnan(diagnosis(tree((0.0, 0.0), a=(0.0, 0.0)), ()).findings[0].share)


def laplace(x: Tensor) -> None:
    """Posteriors with an edge, which no Gaussian fits."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        pyro.sample("x", dist.Laplace(z, 0.3), obs=x)


def test_the_remedy_for_an_unreliable_ladder_is_one() -> None:
    problem = pg.Problem.of(laplace, None, torch.linspace(-3, 3, 12))

    def unreliable(evidence: pg.Ladder) -> tuple[int, list[str]]:
        measurement, run = evidence.prepare(problem, Run(0)), Run(0)
        columns = measurement.measure(run.map(lambda chunk: chunk, problem.joint)[0]).columns
        arrays = {name: np.asarray(column) for name, column in columns.items()}
        return int((~arrays["log_evidence_reliable"]).sum()), measurement.cautions(arrays)

    before, (caution,) = unreliable(pg.Ladder())
    assert before >= 4 and "Use evidence=Ladder(tolerance=0.015, num_chains=512), and compare" in caution
    assert unreliable(pg.Ladder(tolerance=0.015, num_chains=512)) == (0, [])
    _, (caution, *_) = unreliable(pg.Ladder(tolerance=0.001, num_chains=512, max_evaluations=2000))
    assert "max_evaluations of Ladder, now 2,000" in caution or "Raise max_evaluations of Ladder" in caution


def test_a_datapoint_alone_and_gains_too_small_to_print() -> None:
    known = {"number": 1, "total": 1, "included": True, "contested": 0, "log_evidence": None, "refined": {}}
    assert lines_of(known) == ["modes: the datapoint examined from other starts, no missed mode found"]
    for mean, number in ((0.004, 0), (0.2, 1)):
        raised = {**known, "number": 32, "total": 64, "refined": {"own": {"count": 1, "mean": mean}}}
        assert len(cautions_of(raised)) == number
        assert "which raised L[q*] of the own family at 1. The table has the higher values" in lines_of(raised)[0]
