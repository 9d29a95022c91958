"""A recorded function cut in two, at the inputs that are known only after its first results have been seen."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from pyrogaps.capture.graphs import descendants, is_view, makers_of_written
from pyrogaps.capture.reasons import WrongRecord

aten = torch.ops.aten


def halves(module: GraphModule, late_inputs: slice, num_results: int) -> tuple[GraphModule, GraphModule]:
    """A record of inputs $(a, b)$ and results $(f(a), g(a, b))$ as two, which share what both compute.

    The first maps a to f(a) and further tensors; the second maps b and those tensors to g(a, b), in memory of its own.
    Parameters, and views of them, are read anew by the second.

    Args:
        module: the record.
        late_inputs: which of the record's inputs b is.
        num_results: number of tensors in f(a).

    Raises `WrongRecord` where the second would write to what the first has made.
    """
    nodes: list[Node] = [*module.graph.nodes]
    unknown = [node for node in nodes if node.op == "placeholder"][late_inputs]
    late = descendants(module.graph, unknown)
    if any(maker not in late for node in late for maker in makers_of_written(node)):
        raise WrongRecord
    results: Any = module.graph.output_node().args[0]
    first, second = results[:num_results], results[num_results:]
    leaves = tree_leaves(second)
    read = [*leaves, *(operand for node in nodes if node in late for operand in node.all_input_nodes)]
    again = _views_again(read, late)
    read += [operand for node in again for operand in node.all_input_nodes]
    kept = [node for node in dict.fromkeys(read) if node not in late | again and node.op != "get_attr"]
    steps = [node for node in nodes if node.op not in ("placeholder", "output")]

    early_part, copies = Graph(), dict[Node, Node]()
    for node in nodes:
        if node not in late and node.op != "output":
            copies[node] = early_part.node_copy(node, copies.__getitem__)
    early_part.output(tuple(copies[node] for node in [*first, *kept]))

    late_part, copies = Graph(), dict[Node, Node]()
    for node in [*unknown, *kept]:
        copies[node] = late_part.placeholder(node.name)
        copies[node].meta.update(node.meta)
    for node in steps:
        if node in late | again or node.op == "get_attr":
            copies[node] = late_part.node_copy(node, copies.__getitem__)
    for node in leaves:
        if node not in late:  # one result that the first has made once, and a caller may write to
            copies[node] = late_part.call_function(aten.clone.default, (copies[node],))
    late_part.output(torch.fx.map_arg(second, copies.__getitem__))
    for part in (early_part, late_part):
        part.eliminate_dead_code()
    return GraphModule(module, early_part), GraphModule(module, late_part)


def _views_again(read: list[Node], late: set[Node]) -> set[Node]:
    """The views among the nodes `read`, and those that they are views of in turn, which are not `late`."""
    views, left = set[Node](), [*read]
    while left:
        node = left.pop()
        if node not in late | views and is_view(node):
            views.add(node)
            left += node.all_input_nodes
    return views


def constants_of(module: GraphModule) -> list[Tensor]:
    """The parameters, buffers and other tensors that a record reads."""
    return [getattr(module, str(node.target)) for node in module.graph.nodes if node.op == "get_attr"]
