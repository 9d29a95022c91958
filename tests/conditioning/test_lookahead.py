"""Ledgers of guides with a lookahead, on a linear-Gaussian chain whose best guides are known in closed form."""

import math

import pytest
import torch

import pyrogaps as pg
from pyrogaps.guides.partial import PartialNormal
from pyrogaps.guides.sequential import StructuredNormal
from pyrogaps.models.state_space import LinearGaussianStateSpace
from pyrogaps.models.toy import MissingGaussian

MODEL = LinearGaussianStateSpace(0.9, 0.5, 1.0, 1.0, 1.0)
SETTINGS = {
    "evidence": pg.AIS(num_temperatures=20, num_leapfrog=5),
    "refinement": pg.Refinement(num_steps=200),
    "num_particles": 200,
    "progress": False,
}


@pytest.fixture(scope="module")
def guide() -> StructuredNormal:
    """A filter after a little training."""
    torch.manual_seed(0)
    guide = StructuredNormal(1, 1, 16, lookahead=0)
    data = pg.SimulatedData(MODEL, torch.zeros(128, 3, 1), num_datapoints=128 * 150)
    pg.train(MODEL, guide, data, num_epochs=1, batch_size=128, learning_rate=0.02, freeze_model=True, progress=False)
    return guide


def test_whole_tree_of_a_filter(guide: StructuredNormal) -> None:
    """log p(x) and the conditioning gap against Kalman; the chain has one latent, so that the family is exact."""
    x, _ = MODEL.simulate(64, 3, seed=1)
    best = MODEL.optimal_guide(0)
    ledger = pg.decompose(pg.Problem.of(MODEL, guide, x, mode="eager"), reference=best, **SETTINGS)  # type: ignore[arg-type]
    per = ledger.per_datapoint
    children = per["approximation_gap"] + per["conditioning_gap"] + per["amortization_gap"]
    torch.testing.assert_close(torch.tensor(children.values), torch.tensor(per["inference_gap"].values))
    evidence = MODEL.log_evidence(x).numpy()
    error = float((per["log_evidence_mcse"] ** 2).sum()) ** 0.5 / 64
    assert abs(float((per["log_evidence"] - evidence).mean())) < 4 * error
    # log p(x) - L[q*_C] is approximation and conditioning together.
    row = (per["approximation_gap"] + per["conditioning_gap"]).values
    assert abs(row.mean() - float(MODEL.conditioning_gap(3, 0))) < 4 * row.std() / 8
    assert "Note: Conditions of the guide: lookahead 0" in str(ledger)
    assert ledger.provenance["quantities"]["elbo_shared"]["estimator"] == "Monte Carlo ELBO of the reference guide"


def test_trained_filter_never_beats_the_best(guide: StructuredNormal) -> None:
    x, _ = MODEL.simulate(500, 3, seed=2)
    best, found = (pg.elbo(MODEL, q, x, num_particles=100).value for q in (MODEL.optimal_guide(0), guide))
    short = best - found
    assert short.mean() > -4 * short.std() / 500**0.5
    assert short.mean() < 0.1  # 150 steps


@pytest.mark.usefixtures("brief_check")
def test_filter_without_a_reference_says_so(guide: StructuredNormal) -> None:
    x, _ = MODEL.simulate(4, 3, seed=3)
    small = {**SETTINGS, "refinement": pg.Refinement(num_steps=5)}
    ledger = pg.decompose(pg.Problem.of(MODEL, guide, x, mode="eager"), **small)  # type: ignore[arg-type]
    assert "conditioning_gap" not in ledger.per_datapoint
    assert "Without a reference guide, its amortization gap includes the conditioning gap" in str(ledger)


def test_references_that_do_not_fit(guide: StructuredNormal) -> None:
    x, _ = MODEL.simulate(4, 3, seed=3)
    smoother = StructuredNormal(1, 1, 4, lookahead=math.inf)
    for wrong in (MODEL.optimal_guide(1), smoother):
        with pytest.raises(pg.InputError, match="reference: it must declare the same lookahead"):
            pg.decompose(pg.Problem.of(MODEL, guide, x, mode="eager"), reference=wrong, progress=False)
    with pytest.raises(pg.InputError, match="reference: has no effect, because the guide declares no lookahead"):
        pg.decompose(pg.Problem.of(MODEL, smoother, x, mode="eager"), reference=guide, progress=False)
    toy = MissingGaussian.unit()
    with pytest.raises(pg.InputError, match=r"needs no reference guide\. Leave reference out"):
        pg.decompose(toy, PartialNormal(2, 1, shown=1), torch.randn(4, 2), reference=guide, progress=False)


def test_reference_that_looks_ahead_is_refused(guide: StructuredNormal) -> None:
    x, _ = MODEL.simulate(4, 3, seed=3)
    liar = MODEL.optimal_guide(1)

    class Liar(torch.nn.Module):
        lookahead = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z: torch.Tensor = liar(x)
            return z

    with pytest.raises(pg.InputError, match=r"site 'z_\d' changes with data after step"):
        pg.decompose(pg.Problem.of(MODEL, guide, x, mode="eager"), reference=Liar(), progress=False)
