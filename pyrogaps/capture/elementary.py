"""Elementary functions that PyTorch computes in single precision by a slow `log1p` or `expm1`, by faster ones.

What stands for them is as exact, to an ulp or two, at every magnitude:

    log1p(t)  = log(u) + (t - (u - 1)) / u,  u = fl(1 + t)      (what rounding 1 + t left out, put back)
    expm1(x)  = tanh(x / 2) (exp(x) + 1)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

aten = torch.ops.aten


def faster_functions(graph: Graph) -> None:
    """Rewrite cross-entropies of logits, softplus and ELU of single-precision tensors on a CPU, with usual options."""
    for node in list(graph.nodes):
        write = FASTER.get((node.target, node.args[USUAL[node.target] :])) if _is_plain(node) else None
        if write is not None:
            with graph.inserting_before(node):
                result = write(_Writer(graph, node.args[0]), *node.args[1 : USUAL[node.target]])
            node.replace_all_uses_with(result)
            graph.erase_node(node)


def _is_plain(node: Node) -> bool:
    """Whether an operation that might be rewritten has contiguous operands of floats on a CPU, all of one shape."""
    if node.target not in USUAL or node.kwargs:
        return False
    values: list[Any] = [operand.meta.get("val") for operand in node.args[: USUAL[node.target]]]  # type: ignore[union-attr]
    return all(isinstance(value, Tensor) and _is_dense(value) and value.shape == values[0].shape for value in values)


def _is_dense(value: Tensor) -> bool:
    return value.dtype == torch.float32 and value.device.type == "cpu" and value.is_contiguous()


class _Writer:
    """Appends elementwise operations on `x` to a graph; every result is laid out as `x` is."""

    def __init__(self, graph: Graph, x: Any) -> None:
        self._graph, self.x = graph, x

    def __call__(self, operation: Any, *args: Any) -> Node:
        node = self._graph.call_function(operation, args)
        node.meta["val"] = self.x.meta["val"]
        return node


def _log1p(write: _Writer, t: Node) -> Node:
    above_one = write(aten.add.Tensor, t, 1.0)
    lost = write(aten.sub.Tensor, t, write(aten.sub.Tensor, above_one, 1.0))
    correction = write(aten.div.Tensor, lost, above_one)
    return write(aten.add.Tensor, write(aten.log.default, above_one), correction)


def _decay(write: _Writer) -> Node:
    """exp(-|x|)."""
    return write(aten.exp.default, write(aten.neg.default, write(aten.abs.default, write.x)))


def _cross_entropy(write: _Writer, target: Node) -> Node:
    """max(x, 0) - x target + log1p(exp(-|x|)), element by element."""
    linear = write(aten.sub.Tensor, write(aten.relu.default, write.x), write(aten.mul.Tensor, write.x, target))
    return write(aten.add.Tensor, linear, _log1p(write, _decay(write)))


def _softplus(write: _Writer) -> Node:
    """max(x, 0) + log1p(exp(-|x|))."""
    return write(aten.add.Tensor, write(aten.relu.default, write.x), _log1p(write, _decay(write)))


def _elu(write: _Writer) -> Node:
    """max(x, 0) + expm1(min(x, 0)), of which one is zero: cheaper than to choose."""
    below = write(aten.clamp_max.default, write.x, 0.0)
    half = write(aten.tanh.default, write(aten.mul.Tensor, below, 0.5))
    product = write(aten.mul.Tensor, half, write(aten.add.Tensor, write(aten.exp.default, below), 1.0))
    return write(aten.add.Tensor, product, write(aten.relu.default, write.x))


# How many operands an operation has before its options, and what is written for it, by those options.
USUAL = {
    aten.binary_cross_entropy_with_logits.default: 2,
    aten.softplus.default: 1,
    aten.elu.default: 1,
}
FASTER: dict[Any, Callable[..., Node]] = {
    (aten.binary_cross_entropy_with_logits.default, (None, None, 0)): _cross_entropy,
    (aten.softplus.default, ()): _softplus,
    (aten.elu.default, ()): _elu,
    (aten.elu.default, (1.0,)): _elu,
}
