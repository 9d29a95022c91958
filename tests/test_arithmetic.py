"""Cheaper arithmetic gives torch's numbers: but for last digits in double precision, with no more error in single."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.functional import elu as torch_elu
from torch.nn.functional import softplus as torch_softplus

from pyrogaps.capture.arithmetic import bernoulli, elu, softplus, summed_bernoulli
from pyrogaps.capture.graphs import record

FAR = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 40.0, -40.0, 90.0, -90.0, 1e4, -1e4, torch.inf, -torch.inf])


def points(*shape: int, spread: float = 6.0) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 2.0


@pytest.mark.parametrize(("alpha", "scale"), [(1.0, 1.0), (1.6732632423543772, 1.0507009873554805), (0.5, 1.0)])
def test_elu(alpha: float, scale: float) -> None:
    x = torch.cat([points(1000), FAR.double()])
    torch.testing.assert_close(elu(x, alpha, scale), scale * torch_elu(x, alpha), rtol=1e-14, atol=1e-15)
    single = elu(x.float(), alpha, scale).double()
    torch.testing.assert_close(single, scale * torch_elu(x, alpha), rtol=2e-7, atol=2e-7)
    assert bool(torch.isnan(elu(torch.tensor(torch.nan), alpha, scale)))


def test_softplus_at_every_magnitude() -> None:
    tiny = torch.logspace(-30, 2, 20_001, dtype=torch.float64)
    x = torch.cat([torch.linspace(-80, 80, 20_001, dtype=torch.float64), tiny, -tiny])
    exact = x.relu() + torch.log1p(torch.exp(-x.abs()))  # torch's own turns into the identity at 20
    torch.testing.assert_close(softplus(x), exact, rtol=1e-15, atol=0.0)
    single = x.float()
    exact = single.double().relu() + torch.log1p(torch.exp(-single.double().abs()))
    torch.testing.assert_close(softplus(single).double(), exact, rtol=3e-7, atol=1e-37)  # denormals
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan])
    torch.testing.assert_close(softplus(odd), torch_softplus(odd), equal_nan=True)


@pytest.mark.parametrize("width", [1, 7, 16, 64, 100, 784, 1024, 3001])
def test_bernoulli_sums(width: int) -> None:
    logits = points(50, width)
    x = torch.bernoulli(torch.full_like(logits, 0.3), generator=torch.Generator().manual_seed(1))
    exact = binary_cross_entropy_with_logits(logits, x, reduction="none")
    torch.testing.assert_close(bernoulli(logits, x), exact, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(summed_bernoulli(logits, x), exact.sum(-1), rtol=1e-13, atol=1e-13)
    # Single precision: no worse than torch's own, whose logarithms are each rounded and summed.
    single = summed_bernoulli(logits.float(), x.float()).double() - exact.sum(-1)
    theirs = binary_cross_entropy_with_logits(logits.float(), x.float(), reduction="none").sum(-1) - exact.sum(-1)
    assert float(single.abs().max()) <= max(2 * float(theirs.abs().max()), 1e-5 * width**0.5)


def test_bernoulli_far_out_and_not_a_number() -> None:
    logits = FAR[:-2].double()
    x = torch.full_like(logits, 0.3)
    exact = binary_cross_entropy_with_logits(logits, x, reduction="none")
    torch.testing.assert_close(bernoulli(logits, x), exact, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(summed_bernoulli(logits, x), exact.sum(), rtol=1e-13, atol=1e-13)
    bad = torch.cat([logits, torch.tensor([torch.nan]).double()])
    assert bool(torch.isnan(summed_bernoulli(bad, torch.zeros_like(bad))))


def summed(logits: Tensor, x: Tensor) -> Tensor:
    return -binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(-1)


def partly_summed(logits: Tensor, x: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)


def used_twice(logits: Tensor, x: Tensor) -> Tensor:
    each = binary_cross_entropy_with_logits(logits, x, reduction="none")
    return each.sum((1, 2)) + each.square().sum((1, 2))


def several_axes(logits: Tensor, x: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(logits, x, reduction="none").sum((-2, -1))


@pytest.mark.parametrize("function", [summed, partly_summed, used_twice, several_axes])
def test_records_keep_their_meaning(function) -> None:  # type: ignore[no-untyped-def]
    logits, x = points(5, 4, 9), (points(5, 4, 9) > 0).double()
    graph = record(function, logits, x)
    assert "binary_cross_entropy" not in graph.code
    for scale in (1.0, 0.1):
        torch.testing.assert_close(graph(scale * logits, x), function(scale * logits, x), rtol=1e-12, atol=1e-12)


def test_weighted_cross_entropies_are_left_alone() -> None:
    logits, x = points(5, 4), (points(5, 4) > 0).double()
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()

    def weighted(logits: Tensor, x: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(logits, x, weight, reduction="none").sum(-1)

    torch.testing.assert_close(record(weighted, logits, x)(logits, x), weighted(logits, x))
