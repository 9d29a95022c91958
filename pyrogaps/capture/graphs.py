"""Recording tensor operations as a graph, and rewriting it for faster replay."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from pyrogaps.capture.arithmetic import rewrite, value_of
from pyrogaps.capture.products import inline_products, products_by_onednn

aten = torch.ops.aten
VIEWS = {aten.alias.default, aten.view.default, aten.expand.default, aten.permute.default, aten.unsqueeze.default}
NEUTRAL = {aten.add.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Tensor: 1, aten.div.Tensor: 1}
IN_PLACE = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
    aten.neg.default: aten.neg_.default,
    aten.exp.default: aten.exp_.default,
    aten.log.default: aten.log_.default,
    aten.abs.default: aten.abs_.default,
    aten.relu.default: aten.relu_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.tanh.default: aten.tanh_.default,
}
# Operations whose methods take the same arguments in the same order.
METHODS = {
    *("add", "sub", "mul", "div", "neg", "exp", "log", "abs", "relu", "sigmoid", "tanh", "pow", "gt", "mm", "addmm"),
    *("add_", "sub_", "mul_", "div_", "neg_", "exp_", "log_", "abs_", "relu_", "sigmoid_", "tanh_"),
    *("t", "view", "expand", "unsqueeze", "select", "sum"),
}


def record(function: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    """Record the tensor operations of `function(*inputs)`; other tensors, such as parameters, stay by reference."""
    # One mode for the shapes of all nodes: otherwise each makes its own, which takes longer than recording it.
    with tracing(TracingContext(FakeTensorMode())):
        module = make_fx(function)(*inputs)
    graph = module.graph
    graph.eliminate_dead_code()
    rewrite(graph)
    _drop_identities(graph)
    _constants_to_numbers(graph)
    _merge_equal(graph)
    products_by_onednn(graph)
    graph.eliminate_dead_code()
    module.recompile()
    return module


def output_alone(module: GraphModule, position: int) -> GraphModule:
    """The part of `module` that computes one of its outputs."""
    part = Graph()
    outputs: Any = part.graph_copy(module.graph, {})
    part.output(outputs[position])
    part.eliminate_dead_code()
    return GraphModule(module, part)


def descendants(graph: Graph, origins: Iterable[Node]) -> set[Node]:
    """`origins` and all nodes that are computed from them, without the output."""
    found = set(origins)
    for node in graph.nodes:
        if node.op != "output" and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def makers_of_written(node: Node) -> list[Node]:
    """The nodes that made the memory which a node writes to, such as `empty` for `empty(3).normal_()`."""
    if not isinstance(node.target, OpOverload):
        return []
    return [_maker(operand) for operand in written(node.target, node.args, node.kwargs) if isinstance(operand, Node)]


def _rewritten(graph: Graph) -> set[Node]:
    """The nodes whose results are written to later."""
    return {maker for node in graph.nodes for maker in makers_of_written(node)}


def written(function: OpOverload, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that an operation writes to."""
    arguments = function._schema.arguments
    given = {**dict(zip([each.name for each in arguments], args, strict=False)), **kwargs}
    return [given[each.name] for each in arguments if each.is_write and each.name in given]


def _maker(node: Any) -> Node:
    """The node that made the memory of a node's result."""
    while node.op == "call_function" and not _owns_memory(node):
        node = node.args[0]
    return node  # type: ignore[no-any-return]


def own_outputs(module: GraphModule) -> GraphModule:
    """Give every output its own contiguous memory: no output is a view or returned twice."""
    graph = module.graph
    taken: set[Node] = set()
    output = graph.output_node()

    def owned(result: Node) -> Node:
        if result not in taken and _owns_memory(result) and value_of(result).is_contiguous():
            taken.add(result)
            return result
        with graph.inserting_before(output):
            return graph.call_function(aten.clone.default, (result,), {"memory_format": torch.contiguous_format})

    output.args = (torch.fx.map_arg(output.args[0], owned),)
    module.recompile()
    return module


def reuse_memory(module: GraphModule) -> GraphModule:
    """Compute elementwise operations in place if nothing else reads the operand.

    Allocating memory costs more than the arithmetic. The result is only for replay, not for `torch.compile`: products
    are replaced by oneDNN's own operations.
    """
    inline_products(module.graph)
    fresh: set[Node] = set()
    for node in module.graph.nodes:
        operand = node.args[0] if node.args else None
        if node.target in IN_PLACE and _last_read(operand, node) and operand in fresh:
            node.target = IN_PLACE[node.target]
            fresh.add(node)
        elif _owns_memory(node):
            fresh.add(node)
    _call_methods(module.graph)
    module.recompile()
    return module


def _call_methods(graph: Graph) -> None:
    """Call methods of tensors, which are the same operations: for small tensors a call through `torch.ops` takes twice
    as long.
    """
    for node in graph.nodes:
        if isinstance(node.target, OpOverload) and node.args and isinstance(node.args[0], Node) and not node.kwargs:
            name = node.target._schema.name.removeprefix("aten::")
            if name in METHODS:
                node.op, node.target = "call_method", name


def _last_read(operand: Any, node: Node) -> bool:
    """Whether `node` is the only reader of `operand`, reads it once, and has a result of the same layout."""
    only_reader = isinstance(operand, Node) and list(operand.users) == [node] and node.args.count(operand) == 1
    return only_reader and _same_layout(operand, node)


def _owns_memory(node: Node) -> bool:
    """Whether a node's result shares no memory with its operands."""
    if not isinstance(node.target, OpOverload) or node.target is aten._unsafe_view.default:
        return False
    return all(result.alias_info is None for result in node.target._schema.returns)


def is_view(node: Node) -> bool:
    """Whether a node's result is another view of its operand, and nothing is written."""
    if not isinstance(node.target, OpOverload) or _owns_memory(node):
        return False
    schema = node.target._schema
    return len(schema.returns) == 1 and not any(argument.is_write for argument in schema.arguments)


def _same_layout(left: Any, right: Any) -> bool:
    a, b = value_of(left), value_of(right)
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def _drop_identities(graph: Graph) -> None:
    """Remove views and sums and products with numbers that change nothing, and pairs of transpositions."""
    rewritten = _rewritten(graph)
    for node in list(graph.nodes):
        unchanged = len(node.args) == 2 and node.args[1] == NEUTRAL.get(node.target) and node not in rewritten
        same = node.args[0] if node.target in VIEWS or unchanged else None
        if node.target is aten.t.default and node.args[0].target is aten.t.default:
            same = node.args[0].args[0]
        if same is not None and _same_layout(same, node):
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def _constants_to_numbers(graph: Graph) -> None:
    """Replace factors that are constant tensors by numbers."""
    constant: dict[Node, float] = {}
    for node in list(graph.nodes):
        if node.target is aten.ones.default:
            constant[node] = 1.0
        elif node.target in VIEWS and node.args[0] in constant:
            constant[node] = constant[node.args[0]]
        elif node.target is aten.neg.default and node.args[0] in constant:
            constant[node] = -constant[node.args[0]]
        elif node.target is aten.mul.Tensor:
            for factor, other in (node.args, reversed(node.args)):
                if factor in constant and other not in constant and _same_layout(other, node):
                    node.args = (other, constant[factor])
                    break


def _merge_equal(graph: Graph) -> None:
    """Compute once what is computed twice from the same operands."""
    rewritten, first = _rewritten(graph), dict[Any, Node]()
    for node in list(graph.nodes):
        operands = node.all_input_nodes
        pure = node.op == "call_function" and operands and not node.is_impure()
        if node.op == "get_attr" or (pure and rewritten.isdisjoint([node, *map(_maker, operands)])):
            key = node.op, node.target, repr(node.args), repr(node.kwargs)
            if (same := first.setdefault(key, node)) is not node:
                node.replace_all_uses_with(same)
                graph.erase_node(node)


def fusible_elements(node: Node) -> int:
    """Number of elements of an elementwise operation's result; 0 for other operations."""
    value = value_of(node)
    return value.numel() if isinstance(value, Tensor) and _has_tag(node, torch.Tag.pointwise) else 0


def _has_tag(node: Node, tag: torch.Tag) -> bool:
    return isinstance(node.target, OpOverload) and tag in node.target.tags
