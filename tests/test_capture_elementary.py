"""The faster elementary functions of recorded graphs: as exact as PyTorch's, at every magnitude, and used at all."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, elu, softplus

from pyrogaps.capture.graphs import record, reuse_memory

aten = torch.ops.aten


def cross_entropy(x: Tensor, target: float) -> Tensor:
    return binary_cross_entropy_with_logits(x, torch.full_like(x, target), reduction="none")


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "elu": (lambda x: elu(x), lambda x: elu(x)),
    # PyTorch's own turns into the identity at 20.
    "softplus": (softplus, lambda x: x.relu() + torch.log1p(torch.exp(-x.abs()))),
    "cross-entropy of 0": (lambda x: cross_entropy(x, 0.0), lambda x: x.relu() + torch.log1p(torch.exp(-x.abs()))),
    "cross-entropy of 1": (lambda x: cross_entropy(x, 1.0), lambda x: (-x).relu() + torch.log1p(torch.exp(-x.abs()))),
}
SLOW = {aten.elu.default, aten.softplus.default, aten.binary_cross_entropy_with_logits.default}


def points() -> Tensor:
    tiny = torch.logspace(-30, 2, 20_001)
    return torch.cat([torch.linspace(-80, 80, 20_001), tiny, -tiny])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_exact_as_single_precision_allows(name: str) -> None:
    function, reference = FUNCTIONS[name]
    graph = record(function, points())
    assert not SLOW & {node.target for node in graph.graph.nodes}
    found, exact = reuse_memory(graph)(points()).double(), reference(points().double())
    # Cross-entropies are differences, and as exact as what is subtracted.
    size = exact.abs() + (points().double().abs() if "entropy of 1" in name else 0)
    assert ((found - exact).abs() <= 2 * torch.finfo(torch.float32).eps * size + 1e-37).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_that_are_not_finite(name: str) -> None:
    function, _ = FUNCTIONS[name]
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    if "entropy" in name:
        odd = odd[2:]  # an infinite logit times a target of 0 is NaN either way it is written
    torch.testing.assert_close(record(function, odd)(odd), function(odd), equal_nan=True)


def test_other_options_and_types_stay_as_they_are() -> None:
    functions = [
        lambda x: elu(x, 0.5),
        lambda x: softplus(x, beta=2.0),
        lambda x: binary_cross_entropy_with_logits(x, torch.ones_like(x)),
    ]
    for function in functions:
        assert SLOW & {node.target for node in record(function, points()).graph.nodes}
    assert SLOW & {node.target for node in record(lambda x: elu(x), points().double()).graph.nodes}
    assert SLOW & {node.target for node in record(lambda x: elu(x), points()[::2]).graph.nodes}
