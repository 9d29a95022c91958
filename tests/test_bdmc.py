"""BDMC on models of known evidence: two-sided, certified, and honest about what it does not know."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

from pyrogaps import AIS, Bridge, Certificate, Evidence, InputError, Ladder, Refinement, bdmc, decompose
from pyrogaps.guides.auxiliary_flows import AmortizedAuxiliaryFlow
from tests.references import (
    STANDARD_ERRORS,
    RaggedWalk,
    WrongEncoder,
    anisotropic,
    assert_exact,
    assert_mean_one,
    counts,
    gamma_poisson,
    gamma_poisson_evidence,
)

NUMBER = 512
QUICK = Refinement(num_steps=200)
BRIEF = Refinement(num_steps=80, num_particles=4, learning_rate=0.1, num_selection=32)


def assert_below(lower: Tensor, upper: Tensor) -> None:
    """Means of paired bounds in their order, to four standard errors."""
    gap = upper - lower
    assert float(gap.mean()) > -STANDARD_ERRORS * float(gap.std()) / math.sqrt(len(gap))


def jensen(log_ratio: Tensor) -> float:
    """How far a log is biased when its argument is not: half the relative variance of the argument."""
    return 0.5 * float(log_ratio.exp().var()) + 0.5 * float((-log_ratio).exp().var())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("initial", "decades"), [("refined", 0.6), ("refined", 3.0), ("prior", 0.6)])
def test_both_sides_of_a_linear_model(initial: str, decades: float, dtype: torch.dtype) -> None:
    data_dim, latent_dim = 12, 3
    model = anisotropic(data_dim, latent_dim, decades=decades, dtype=dtype)
    double = anisotropic(data_dim, latent_dim, decades=decades)
    settings = AIS(num_chains=32, num_temperatures=300 if initial == "prior" else 120, initial=initial)  # type: ignore[arg-type]
    number = NUMBER // 2
    shape = torch.zeros(number, data_dim, dtype=dtype)
    result = bdmc(model, shape, settings=settings, refinement=QUICK, batch_size=number)
    exact = double.log_evidence(result.data.double()).detach()
    assert result.data.shape == shape.shape
    assert_below(result.lower, exact)
    assert_below(exact, result.upper)
    # Each side is unbiased for p(x) or 1/p(x): ratios of mean 1 over datapoints.
    assert_mean_one((result.lower - exact).exp())
    assert_mean_one((exact - result.upper).exp())
    for side in (result.lower, result.upper):
        error = float((side - exact).std()) / math.sqrt(number)
        assert error < 0.05
        assert abs(float((side - exact).mean())) < STANDARD_ERRORS * error + jensen(side - exact)
    assert abs(result.width - float((result.upper - result.lower).mean())) < 1e-12
    assert result.width_mcse < 0.05


def test_both_sides_of_ragged_sequences() -> None:
    """What is drawn past the end of a sequence counts for nothing."""
    model, lengths = RaggedWalk(), torch.tensor([4, 1, 3, 2]).repeat(NUMBER // 8)
    shape = torch.zeros(len(lengths), 4, 1, dtype=torch.float64), lengths
    result = bdmc(model, shape, settings=AIS(num_chains=32, num_temperatures=30), refinement=QUICK, batch_size=NUMBER)
    assert isinstance(result.data, tuple)
    exact = model.log_evidence(*result.data)
    assert_below(result.lower, exact)
    assert_below(exact, result.upper)
    assert_mean_one((result.lower - exact).exp())
    assert_mean_one((exact - result.upper).exp())


def test_each_lower_bound_is_the_evidence() -> None:
    model = anisotropic(8, 3)
    result = bdmc(
        model, torch.zeros(8, 8).double(), settings=AIS(num_chains=128, num_temperatures=40), refinement=QUICK
    )
    assert_exact(result.lower, result.forward.mcse, model.log_evidence(result.data))


def test_a_guide_anchors_the_paths() -> None:
    model = anisotropic(8, 3)
    shape = torch.zeros(NUMBER, 8, dtype=torch.float64)
    settings = AIS(num_chains=16, num_temperatures=20, initial="guide", widen=1.0)
    result = bdmc(model, shape, guide_or_family=WrongEncoder(model, shrink=0.95), settings=settings, batch_size=NUMBER)
    exact = model.log_evidence(result.data).detach()
    assert_mean_one((result.lower - exact).exp())
    assert_mean_one((exact - result.upper).exp())


def test_gamma_poisson() -> None:
    shape = counts(NUMBER).double()
    result = bdmc(gamma_poisson, shape, settings=AIS(num_chains=32), refinement=QUICK, batch_size=NUMBER)
    exact = gamma_poisson_evidence(result.data)
    assert_mean_one((result.lower - exact).exp())
    assert_mean_one((exact - result.upper).exp())


def test_the_width_tells_how_good_the_settings_are() -> None:
    """Two temperatures from the prior: wide. Thirty from a refined guide: narrow. The truth in between either way."""
    model = anisotropic(8, 3)
    shape = torch.zeros(NUMBER, 8, dtype=torch.float64)
    poor = bdmc(model, shape, settings=AIS(num_chains=8, num_temperatures=2, initial="prior"), batch_size=NUMBER)
    good = bdmc(model, shape, settings=AIS(num_chains=8), refinement=QUICK, batch_size=NUMBER)
    assert poor.width > 10 * good.width
    assert good.width < 0.2
    for result in (poor, good):
        exact = model.log_evidence(result.data).detach()
        assert_below(result.lower, exact)
        assert_below(exact, result.upper)


def test_the_reverse_side_has_no_error_per_datapoint() -> None:
    """Its chains share their start: their spread says too little, so nothing is said."""
    model = anisotropic(8, 3)
    result = bdmc(model, torch.zeros(4, 8).double(), settings=AIS(num_chains=4, num_temperatures=4), refinement=QUICK)
    assert result.reverse.direction == "upper bound" and result.forward.direction == "lower bound"
    assert torch.isnan(result.reverse.mcse).all()
    assert not result.reverse.reliable.any()


def test_the_truth_is_inside_as_often_as_is_stated() -> None:
    """By few short chains, whose sandwich is wide, on 1,024 datapoints; and the means of groups of 8 of them."""
    model, probability = anisotropic(8, 3, decades=2.0), 0.8
    settings = AIS(num_chains=2, num_temperatures=2, num_leapfrog=1, num_pilot_temperatures=2)
    result = bdmc(
        model, torch.zeros(1024, 8, dtype=torch.float64), settings=settings, refinement=BRIEF, batch_size=1024
    )
    exact = model.log_evidence(result.data).detach()
    low, high = result.interval(probability)
    inside = ((low <= exact) & (exact <= high)).double()
    assert float(inside.mean()) >= probability
    assert float(((result.lower <= exact) & (exact <= result.upper)).double().mean()) < 1
    groups = torch.arange(1024).reshape(128, 8)
    means = [
        replace(result, lower=result.lower[rows], upper=result.upper[rows]).mean_interval(probability)
        for rows in groups
    ]
    truths = exact[groups].mean(1).tolist()
    assert sum(low <= truth <= high for (low, high), truth in zip(means, truths, strict=True)) >= 0.8 * len(groups)
    with pytest.raises(InputError, match="probability"):
        result.interval(1.0)


class PlainAuxiliary(nn.Module):
    """A guide with an auxiliary variable that brings no family of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = AmortizedAuxiliaryFlow(8, 3, (8,), flow_hidden=8).double()

    def forward(self, x: Tensor) -> None:
        self.inner(x)

    def augment(self, model: Callable[..., None]) -> Callable[..., None]:
        return self.inner.augment(model)


@pytest.mark.filterwarnings("ignore:guide. it is refined datapoint by datapoint")  # on a slow machine
@pytest.mark.usefixtures("brief_check")
def test_auxiliary_variables_are_simulated_too() -> None:
    """AIS runs on the space of both, and so does its reverse; a certificate needs it as well."""
    torch.manual_seed(0)
    model, guide = anisotropic(8, 3), PlainAuxiliary()
    settings, hasty = AIS(num_chains=8, num_temperatures=20), replace(BRIEF, num_steps=25)
    result = bdmc(model, torch.zeros(24, 8).double(), guide_or_family=guide, settings=settings, refinement=hasty)
    exact = model.log_evidence(result.data).detach()
    assert result.z.shape == (24, 6)
    assert_mean_one((result.lower - exact).exp())
    assert_mean_one((exact - result.upper).exp())
    ledger = decompose(
        model,
        guide,
        result.data[:2],
        evidence=Ladder(),
        certificate=Certificate(2, 2, 2),
        refinement=hasty,
        num_particles=50,
        progress=False,
    )
    assert ledger.certificate is not None


@pytest.mark.parametrize("evidence", [Ladder(), Bridge()], ids=["ladder", "bridge"])
@pytest.mark.parametrize("guided", [True, False])
def test_any_evidence_is_certified(evidence: Evidence, guided: bool) -> None:
    model = anisotropic(8, 3)
    shape = torch.zeros(NUMBER, 8, dtype=torch.float64)
    anchor = WrongEncoder(model, shrink=0.95) if guided else AutoNormal
    result = bdmc(model, shape, guide_or_family=anchor, settings=evidence, refinement=QUICK, batch_size=NUMBER)
    exact = model.log_evidence(result.data).detach()
    assert_exact(result.lower, result.forward.mcse, exact)
    assert_mean_one((exact - result.upper).exp())


def test_where_paths_start_is_for_ais_alone() -> None:
    with pytest.raises(InputError, match=r"initial: it is for AIS, and settings is a Ladder\. Leave it out"):
        bdmc(anisotropic(8, 3), torch.zeros(4, 8).double(), settings=Ladder(), initial="prior")
