"""Matrix products of a recorded graph by PyTorch or, for large products on a CPU, by oneDNN."""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from pyrogaps.capture.arithmetic import value_of

aten = torch.ops.aten

# oneDNN's product with a transposed right factor; None if PyTorch was built without it.
LINEAR: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
# Below this many multiplications PyTorch's own product is at least as fast, because a call to oneDNN costs more.
MIN_MULTIPLICATIONS = 8_000_000
# oneDNN is not used if it takes more than this many times as long as PyTorch: for some layouts its reference code is
# several hundred times slower. The ratio is large, so that noise cannot change the choice, and so the last digits.
MAX_SLOWDOWN = 4.0

Layout = tuple[tuple[int, ...], tuple[int, ...]]


def _product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """`left @ right + bias` by oneDNN, as a custom operation: `torch.compile` treats oneDNN's own as constants."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
    return result


def _product_shape(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


library = torch.library.Library("pyrogaps", "DEF")
library.define("product(Tensor left, Tensor right, Tensor? bias) -> Tensor")
library.impl("product", _product, "CPU")
library.impl("product", _product_shape, "Meta")


def products_by_onednn(graph: Graph) -> None:
    """Compute large single-precision CPU products by oneDNN, unless a trial shows that it is much slower.

    PyTorch uses MKL, which uses only half the vector width on processors not made by Intel.
    """
    if LINEAR is None or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return
    for node in list(graph.nodes):
        operands = _plain_product(node)
        if operands is not None and not onednn_is_much_slower(*map(_layout, operands[:2]), torch.get_num_threads()):
            with graph.inserting_before(node):
                product = graph.call_function(torch.ops.pyrogaps.product.default, operands)
            product.meta = dict(node.meta)
            node.replace_all_uses_with(product)
            graph.erase_node(node)


def inline_products(graph: Graph) -> None:
    """Call oneDNN directly, because a custom operation in Python costs as much as a small product."""
    for node in list(graph.nodes):
        if node.target is torch.ops.pyrogaps.product.default:
            left, right, bias = node.args
            with graph.inserting_before(node):
                transposed = (
                    right.args[0] if right.target is aten.t.default else graph.call_function(aten.t.default, (right,))
                )
                call = graph.call_function(LINEAR, (left, transposed, bias, "none", [], ""))
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            graph.erase_node(node)
    graph.eliminate_dead_code()


@cache
def onednn_is_much_slower(left: Layout, right: Layout, num_threads: int) -> bool:
    """Whether oneDNN is much slower than PyTorch for factors of these shapes and strides; timed once for each."""
    a, b = (torch.empty_strided(*layout).fill_(1.0) for layout in (left, right))
    limit = MAX_SLOWDOWN * _shortest(lambda: torch.mm(a, b))
    return _shortest(lambda: _product(a, b, None), enough=limit) > limit


def _shortest(call: Callable[[], Tensor], *, enough: float = 0.0) -> float:
    """Shortest time of up to five calls after a warm-up call, in seconds; stops early below `enough`."""
    call()
    shortest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        call()
        shortest = min(shortest, time.perf_counter() - start)
        if shortest < enough:
            break
    return shortest


def _layout(operand: Node) -> Layout:
    value = value_of(operand)
    return tuple(value.shape), tuple(value.stride())


def _plain_product(node: Node) -> tuple[Any, Any, Any] | None:
    """Factors and bias of a large single-precision matrix product on a CPU; None for other operations."""
    if node.target is aten.addmm.default and len(node.args) == 3 and not node.kwargs:
        bias, left, right = node.args
    elif node.target is aten.mm.default:
        (left, right), bias = node.args, None
    else:
        return None
    values = [value_of(operand) for operand in (left, right, bias) if operand is not None]
    if any(not isinstance(v, Tensor) or v.dtype != torch.float32 or v.device.type != "cpu" for v in values):
        return None
    size = values[0].numel() * values[1].shape[1]
    if size < MIN_MULTIPLICATIONS or (bias is not None and values[2].shape != values[1].shape[1:]):
        return None
    return left, right, bias
