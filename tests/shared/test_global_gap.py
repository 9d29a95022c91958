"""The global gap between two bounds, against its closed form."""

import math
from typing import Any

import pytest
import torch

import pyrogaps as pg
from pyrogaps.density.shared import SharedLatents
from pyrogaps.run import Run
from pyrogaps.shared import GlobalGap, Shared, global_gap
from pyrogaps.shared.marginals import Marginals
from pyrogaps.shared.whole import WholeEvidence, whole_evidence
from tests.shared import hierarchies
from tests.shared.hierarchies import NOISE, SHARE, Structured, X, hierarchy


def measured(guide: Structured, settings: Shared, *, by_ladder: bool) -> GlobalGap:
    with pytest.raises(SharedLatents) as raised:
        pg.Problem.of(hierarchy, guide, X)
    parts, run = raised.value.hierarchy, Run(3)
    values = parts.draw(8, run.stream("shared latents")).values
    local = pg.Problem.of(parts.model, parts.guide, parts.at(values[0]), parts.plate)
    whole = whole_evidence(hierarchy, guide, X, 1 + len(X), settings.tolerance, run) if by_ladder else None
    gap = global_gap(parts, local, values, whole, settings, run)
    assert gap is not None
    return gap


@pytest.mark.parametrize(
    ("loc", "scale", "by_ladder"), [(0.5, 0.22, True), (0.7, 0.4, True), (0.7, 0.4, False), (0.9, 0.35, False)]
)
def test_between_the_bounds(loc: float, scale: float, by_ladder: bool) -> None:
    gap = measured(Structured(loc, scale), Shared(max_draws=1024), by_ladder=by_ladder)
    truth = hierarchies.global_gap(loc, scale)
    assert 0.05 < truth < 1
    assert max(gap.lower_mcse, gap.upper_mcse) < 0.06
    assert gap.lower - 4 * gap.lower_mcse <= truth <= gap.upper + 4 * gap.upper_mcse
    # Nor are the bounds further off than their errors and their distance explain.
    assert abs(gap.lower - truth) < 4 * gap.lower_mcse + 0.1
    assert gap.bounded <= (gap.upper - gap.lower <= 0.1)
    if by_ladder:
        assert gap.bounded and gap.upper - gap.lower <= 0.1
        assert abs(gap.log_evidence - hierarchies.log_evidence()) < 0.1


def test_zero_where_the_guide_is_the_posterior() -> None:
    """Noise in log p(x_n | theta) makes up no gap."""
    precision = 1 + len(X) * SHARE
    gap = measured(Structured(SHARE * float(X.sum()) / precision, precision**-0.5), Shared(), by_ladder=False)
    assert gap.bounded
    assert gap.lower <= 4 * gap.lower_mcse
    assert gap.lower - 4 * gap.lower_mcse <= 0 <= gap.upper + 4 * gap.upper_mcse


def test_few_draws_of_a_poor_guide_bound_nothing_from_above() -> None:
    """A KL of three nats, and too few draws to see it: at least something, and not bounded."""
    gap = measured(Structured(1.5, 0.135), Shared(max_draws=256), by_ladder=False)
    truth = hierarchies.global_gap(1.5, 0.135)
    assert truth > 3
    assert not gap.bounded
    assert 0 < gap.value <= truth
    assert gap.value == gap.lower


def test_log_p_given_theta_is_between_its_estimates() -> None:
    with pytest.raises(SharedLatents) as raised:
        pg.Problem.of(hierarchy, Structured(), X)
    parts, run = raised.value.hierarchy, Run(0)
    values = parts.draw(200, run.stream("shared latents")).values
    local = pg.Problem.of(parts.model, parts.guide, parts.at(values[0]), parts.plate)
    marginals = Marginals.of(parts, local, values[0], run).piloted(values[:8], 0.1)
    low, high = marginals(values, 0)
    m = torch.stack([each["m"] for each in values])
    exact = torch.distributions.Normal(m[:, None], math.hypot(1.0, NOISE)).log_prob(X).double().sum(1)
    for difference, sign in ((low - exact, -1), (high - exact, 1)):
        error = float(difference.std()) / len(values) ** 0.5
        assert sign * float(difference.mean()) > -4 * error
        assert abs(float(difference.mean())) < 4 * error + 0.5
    assert float((high - low).mean()) > 0


def test_an_unreliable_ladder_is_not_used() -> None:
    whole = WholeEvidence(-3.0, 0.01, -2.9, 0.01, False)
    with pytest.raises(SharedLatents) as raised:
        pg.Problem.of(hierarchy, Structured(), X)
    parts, run = raised.value.hierarchy, Run(0)
    values: list[Any] = parts.draw(2, run.stream("shared latents")).values
    local = pg.Problem.of(parts.model, parts.guide, parts.at(values[0]), parts.plate)
    gap = global_gap(parts, local, values, whole, Shared(max_draws=128), run)
    assert gap is not None and "weights" in gap.method and gap.log_evidence < -10
