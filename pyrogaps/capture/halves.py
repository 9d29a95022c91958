"""A recorded function cut in two, at the inputs that are known only after its first results have been seen."""

from typing import Any

from torch.fx import Graph, GraphModule, Node

from pyrogaps.capture.graphs import descendants, makers_of_written
from pyrogaps.capture.reasons import WrongRecord


def halves(module: GraphModule, num_inputs: int, num_results: int) -> tuple[GraphModule, GraphModule]:
    """A record of inputs $(a, b)$ and results $(f(a), g(a, b))$ as two, which share what both compute.

    The first maps a to f(a) and further tensors; the second maps b and those tensors to g(a, b).

    Args:
        module: the record.
        num_inputs: number of tensors in a.
        num_results: number of tensors in f(a).

    Raises `WrongRecord` where the second would write to what the first has made.
    """
    nodes: list[Node] = [*module.graph.nodes]
    late_inputs = [node for node in nodes if node.op == "placeholder"][num_inputs:]
    late = descendants(module.graph, late_inputs)
    if any(maker not in late for node in late for maker in makers_of_written(node)):
        raise WrongRecord
    results: Any = module.graph.output_node().args[0]
    first, second = results[:num_results], results[num_results:]
    read = [*second, *(operand for node in nodes if node in late for operand in node.all_input_nodes)]
    kept = [node for node in dict.fromkeys(read) if node not in late and node.op != "get_attr"]
    steps = [node for node in nodes if node.op not in ("placeholder", "output")]

    early_part, copies = Graph(), dict[Node, Node]()
    for node in nodes:
        if node not in late and node.op != "output":
            copies[node] = early_part.node_copy(node, copies.__getitem__)
    early_part.output(tuple(copies[node] for node in [*first, *kept]))

    late_part, copies = Graph(), dict[Node, Node]()
    for node in [*late_inputs, *kept]:
        copies[node] = late_part.placeholder(node.name)
        copies[node].meta.update(node.meta)
    for node in steps:
        if node in late or node.op == "get_attr":
            copies[node] = late_part.node_copy(node, copies.__getitem__)
    late_part.output(tuple(copies[node] for node in second))
    for part in (early_part, late_part):
        part.eliminate_dead_code()
    return GraphModule(module, early_part), GraphModule(module, late_part)
