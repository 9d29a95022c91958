"""Which matrix products of a record are given to oneDNN."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from pyrogaps.capture import products
from pyrogaps.capture.graphs import record, reuse_memory

needs_onednn = pytest.mark.skipif(products.LINEAR is None, reason="this PyTorch has no oneDNN")
LEFT, RIGHT = torch.randn(1000, 200), torch.randn(200, 100)


@pytest.fixture(autouse=True)
def _timed_anew() -> None:
    products.onednn_is_much_slower.cache_clear()


def products_by_onednn(left: Tensor, right: Tensor) -> int:
    nodes = record(torch.mm, left, right).graph.nodes
    return sum(node.target is torch.ops.pyrogaps.product.default for node in nodes)


@needs_onednn
def test_large_products_are_onednns_and_small_ones_pytorchs() -> None:
    assert products_by_onednn(LEFT, RIGHT) == 1
    assert products_by_onednn(LEFT[:100], RIGHT) == 0


@needs_onednn
def test_a_layout_that_onednn_is_slow_for_stays_with_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary, tried = products._product, []

    def slow_for_slices(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        tried.append(right.stride())
        time.sleep(0.0 if right.is_contiguous() else 0.05)
        return ordinary(left, right, bias)

    monkeypatch.setattr(products, "_product", slow_for_slices)
    assert products_by_onednn(LEFT, RIGHT[:, :50].contiguous()) == 1
    assert products_by_onednn(LEFT, RIGHT[:, :50]) == 0
    number = len(tried)
    assert products_by_onednn(LEFT, RIGHT[:, :50]) == 0
    assert len(tried) == number, "a layout is timed once"


@pytest.mark.parametrize("columns", [slice(0, 50), slice(0, 100, 2), slice(0, 100)])
def test_products_of_any_layout_are_right(columns: Any) -> None:
    right = RIGHT[:, columns]
    for left in (LEFT, LEFT.T.contiguous().T, torch.randn(1000, 300)[:, :200]):
        found = reuse_memory(record(torch.mm, left, right))(left, right)
        torch.testing.assert_close(found, left @ right, rtol=1e-4, atol=1e-3)
