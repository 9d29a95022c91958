"""Vectorised CPU versions of elementwise functions that torch computes one element at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import pad

aten = torch.ops.aten

# A product of this many numbers in [1/2, 1] does not underflow, even in single precision.
MAX_FACTORS = 64


def elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0) -> Tensor:
    """ELU without `expm1`: accurate in absolute terms, which suffices for hidden units."""
    negative = torch.exp(torch.clamp(x, max=0.0)) - 1.0
    if alpha == scale == 1.0:
        return torch.maximum(x, negative)
    return scale * (torch.clamp(x, min=0.0) + alpha * negative)


def softplus(x: Tensor) -> Tensor:
    r"""$\max(x, 0) + \log(1 + t)$, $t = e^{-|x|}$, to a few units in the last place even for tiny results.

    A correction removes the error of rounding 1 + t to u: $\log(1 + t) = \log u + (t - (u - 1)) / u$.
    """
    t = torch.exp(-torch.abs(x))
    u = 1.0 + t
    return torch.relu(x) + (torch.log(u) + (t - (u - 1.0)) / u)


def bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    r"""The cross-entropy $\max(l, 0) - l x - \log \sigma(|l|)$ of every element."""
    return torch.relu(logits) - logits * x - torch.log(torch.sigmoid(torch.abs(logits)))


def summed_bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    r"""`bernoulli` summed over the last axis, with fewer logarithms: $\sum \log \sigma = \log \prod \sigma$."""
    linear = torch.sum(torch.relu(logits) - logits * x, -1)
    product = torch.sigmoid(torch.abs(logits))
    if short := -product.shape[-1] % 16:
        product = pad(product, (0, short), value=1.0)
    factors = 1
    while factors < MAX_FACTORS and product.shape[-1] % 2 == 0:
        half = product.shape[-1] // 2
        product, factors = product[..., :half] * product[..., half:], 2 * factors
    return linear - torch.sum(torch.log(product), -1)


def rewrite(graph: Graph) -> None:
    """Replace torch's ELU, softplus and cross-entropy in a record; results agree up to rounding."""
    for node in list(graph.nodes):
        if node.target is aten.elu.default and _is_real(node) and len(node.args) <= 3:
            _replace(graph, node, elu, *node.args)
        elif node.target is aten.softplus.default and _is_real(node) and len(node.args) == 1:
            _replace(graph, node, softplus, *node.args)
        elif node.target is aten.binary_cross_entropy_with_logits.default and _is_plain(node):
            _replace_cross_entropy(graph, node)
    graph.eliminate_dead_code()


def _replace_cross_entropy(graph: Graph, node: Node) -> None:
    logits, x = node.args[:2]
    summed = _summed(node)
    if summed is None:
        _replace(graph, node, bernoulli, logits, x)
        return
    _replace(graph, summed, _ByRow(tuple(value_of(summed).shape), summed.meta["negative"]), logits, x)


@dataclass(frozen=True)
class _ByRow:
    """The cross-entropy summed over all but the axes of `rows`, or its negative."""

    rows: tuple[int, ...]
    negative: bool

    def __call__(self, logits: Tensor, x: Tensor) -> Tensor:
        total = summed_bernoulli(logits.reshape(*self.rows, -1), x.reshape(*self.rows, -1))
        return -total if self.negative else total


def _summed(node: Node) -> Node | None:
    """The sum over all trailing axes that is the only use of `node`, possibly after negation; None if there is none.

    `meta["negative"]` of the sum is True if the values are negated first.
    """
    start, negative = value_of(node).shape, False
    while len(node.users) == 1:
        (node,) = node.users
        if node.target is aten.neg.default:
            negative = not negative
        elif node.target is aten.sum.dim_IntList and len(node.args) == 2 and not node.kwargs:
            rows = value_of(node).shape
            node.meta["negative"] = negative
            return node if _sums_the_rest(node) and start[: len(rows)] == rows else None
        elif node.target not in (aten.view.default, aten._unsafe_view.default):
            return None
    return None


def _sums_the_rest(node: Node) -> bool:
    """Whether a sum covers the last axes of its operand."""
    operand: Any = node.args[0]
    number, dims = value_of(operand).dim(), sorted(d % value_of(operand).dim() for d in node.args[1])  # type: ignore[union-attr]
    return dims == list(range(number - len(dims), number))


def _is_plain(node: Node) -> bool:
    """Whether a cross-entropy is elementwise, unweighted and without broadcasting."""
    logits, x, *rest = node.args
    plain = all(value in (None, 0) for value in rest) and not node.kwargs
    return plain and _is_real(node) and value_of(logits).shape == value_of(x).shape


def _is_real(node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float64)


def _replace(graph: Graph, node: Node, function: Callable[..., Tensor], *operands: Any) -> None:
    """Replace `node` by the operations of `function(*operands)`; tensors come before numbers."""
    tensors = [operand for operand in operands if isinstance(operand, Node)]
    values = [value_of(operand) for operand in tensors]
    layouts = tuple((tuple(v.shape), v.stride(), v.dtype, v.device) for v in values)
    part = _part(function, layouts, operands[len(tensors) :])
    inputs = [inner for inner in part.nodes if inner.op == "placeholder"]
    with graph.inserting_before(node):
        result: Any = graph.graph_copy(part, dict(zip(inputs, tensors, strict=True)))
    node.replace_all_uses_with(result)
    graph.erase_node(node)


@lru_cache(maxsize=64)
def _part(function: Callable[..., Tensor], layouts: tuple[Any, ...], numbers: tuple[Any, ...]) -> Graph:
    """The operations of `function` of tensors and numbers. Models with many steps have many of the same."""
    # The examples have the real strides, because views of other strides may not be possible.
    examples = [
        torch.empty_strided(shape, stride, dtype=dtype, device=device).zero_()
        for shape, stride, dtype, device in layouts
    ]

    def of_tensors(*values: Tensor) -> Tensor:
        return function(*values, *numbers)

    return make_fx(of_tensors)(*examples).graph


def value_of(operand: Any) -> Any:
    """The recorded shape and dtype of a node, as a fake tensor; None if `operand` is not a node."""
    return operand.meta.get("val") if isinstance(operand, Node) else None
