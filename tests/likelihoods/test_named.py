"""Likelihoods by name: exact against torch's losses and closed forms; what losses leave out; what outputs can be."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyrogaps.likelihoods import LIKELIHOODS, OUTPUTS
from pyrogaps.mapa.continuous_bernoulli import log_normaliser

N, D = 6, 5
VALUE = torch.linspace(-3, 3, N * D, dtype=torch.float64).reshape(N, D)
SCALE = torch.linspace(0.2, 2, N * D, dtype=torch.float64).reshape(N, D)
BITS = (torch.arange(N * D).reshape(N, D) % 3 == 0).double()
GREY = torch.linspace(0, 1, N * D, dtype=torch.float64).reshape(N, D)
COUNTS = (torch.arange(N * D).reshape(N, D) % 7).double()


def built(name: str, value: Tensor, kind: str = "", second: Any = None) -> Any:
    return LIKELIHOODS[name].build(value, kind, second)


def negative_binomial(x: Tensor, mean: Tensor, dispersion: Tensor) -> Tensor:
    """As in the literature on counts of cells: mean m and dispersion r."""
    total = mean + dispersion
    counts = torch.lgamma(x + dispersion) - torch.lgamma(dispersion) - torch.lgamma(x + 1)
    return counts + dispersion * (dispersion / total).log() + x * (mean / total).log()


@pytest.mark.parametrize(
    ("fn", "x", "exact"),
    [
        (built("bernoulli", VALUE, "logits"), BITS, -F.binary_cross_entropy_with_logits(VALUE, BITS, reduction="none")),
        (
            built("bernoulli", VALUE.sigmoid(), "probabilities"),
            BITS,
            -F.binary_cross_entropy_with_logits(VALUE, BITS, reduction="none"),
        ),
        (
            built("binary-cross-entropy", VALUE, "logits"),
            GREY,
            -F.binary_cross_entropy_with_logits(VALUE, GREY, reduction="none"),
        ),
        (built("continuous-bernoulli", VALUE, "logits"), GREY, VALUE * GREY - log_normaliser(VALUE)),
        (
            built("normal", VALUE, "", SCALE),
            GREY,
            -F.gaussian_nll_loss(VALUE, GREY, SCALE**2, full=True, reduction="none"),
        ),
        (built("laplace", VALUE, "", SCALE), GREY, -(GREY - VALUE).abs() / SCALE - (2 * SCALE).log()),
        (built("categorical", VALUE, "logits"), COUNTS[:, 0] % D, None),
        (
            built("poisson", VALUE, "log_rate"),
            COUNTS,
            COUNTS * VALUE - VALUE.exp() - torch.lgamma(COUNTS + 1),
        ),
        (built("poisson", SCALE, "rate"), COUNTS, COUNTS * SCALE.log() - SCALE - torch.lgamma(COUNTS + 1)),
        (built("negative-binomial", VALUE, "log_rate", SCALE), COUNTS, negative_binomial(COUNTS, VALUE.exp(), SCALE)),
        (built("negative-binomial", SCALE + 1, "rate", SCALE), COUNTS, negative_binomial(COUNTS, SCALE + 1, SCALE)),
    ],
)
def test_log_prob_is_exact(fn: Any, x: Tensor, exact: Tensor | None) -> None:
    if exact is None:
        exact = -F.cross_entropy(VALUE, x.long(), reduction="none")
    torch.testing.assert_close(fn.log_prob(x), exact, rtol=1e-6, atol=1e-6)


def test_the_dispersion_is_that_of_the_variance() -> None:
    fn = built("negative-binomial", VALUE, "log_rate", SCALE)
    torch.testing.assert_close(fn.mean, VALUE.exp())
    torch.testing.assert_close(fn.variance, VALUE.exp() + VALUE.exp().square() / SCALE)
    zero = built("negative-binomial", torch.zeros(3), "rate", torch.ones(3)).log_prob(torch.zeros(3))
    assert torch.isfinite(zero).all()


@pytest.mark.parametrize(
    ("fn", "name", "x", "loss"),
    [
        (built("normal", VALUE, "", SCALE), "normal", GREY, (GREY - VALUE).square() / (2 * SCALE**2)),
        (built("laplace", VALUE, "", SCALE), "laplace", GREY, (GREY - VALUE).abs() / SCALE),
        (
            built("poisson", VALUE, "log_rate"),
            "poisson",
            COUNTS,
            F.poisson_nll_loss(VALUE, COUNTS, log_input=True, reduction="none"),
        ),
        (
            built("continuous-bernoulli", VALUE, "logits"),
            "continuous-bernoulli",
            GREY,
            F.binary_cross_entropy_with_logits(VALUE, GREY, reduction="none"),
        ),
    ],
)
def test_what_losses_leave_out(fn: Any, name: str, x: Tensor, loss: Tensor) -> None:
    omitted = LIKELIHOODS[name].omitted
    assert omitted is not None
    torch.testing.assert_close(fn.log_prob(x) - omitted[0](fn, x), -loss, rtol=1e-6, atol=1e-6)


def test_outputs_contradict_what_they_cannot_be() -> None:
    contradicted = {
        name: {kind for kind, output in OUTPUTS.items() if output.contradicted(values)}
        for name, values in {
            "real": torch.tensor([-0.5, 0.2, 3.0]),
            "unit": torch.tensor([0.0, 0.5, 1.0]),
            "positive": torch.tensor([0.0, 0.5, 3.0]),
        }.items()
    }
    assert contradicted == {
        "real": {"probabilities", "rate"},
        "unit": {"logits", "log_rate"},
        "positive": {"probabilities", "log_rate"},
    }
    assert all(output.likelier in OUTPUTS for output in OUTPUTS.values())


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_row_is_whole(name: str) -> None:
    """Data outside a support have a remedy; kinds are known; what it draws has a density."""
    row = LIKELIHOODS[name]
    assert {*row.outputs} <= {*OUTPUTS}
    kind = row.outputs[0] if row.outputs else ""
    value = SCALE if kind == "rate" else VALUE
    fn = row.build(value.float(), kind, SCALE.float() if row.second else None)
    outside = fn.support.check(torch.full((N, D), math.pi) if not row.over_classes else torch.full((N,), math.pi))
    opted_out = name == "binary-cross-entropy"
    assert bool(outside.all()) or bool(row.remedy) or opted_out
    assert torch.isfinite(fn.log_prob(fn.sample())).all()
