"""The path derivative of the ELBO (Roeder et al., 2017, arXiv:1703.09194): through Pyro, or from a record."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from pyrogaps.capture import BoundDensity
from pyrogaps.capture.graphs import record, reuse_memory
from pyrogaps.density.draws import BlockedGuide
from pyrogaps.density.runs import evaluating
from pyrogaps.errors import InputError
from pyrogaps.refine.local import Refinable
from pyrogaps.streams import BLOCK, Chunk, reseed

# Recording pays from here on: it takes as long as replaying saves in 100 steps of a flow, in 280 of a sequence of 80.
MIN_STEPS = 300

Gradients = tuple[Tensor | None, ...]
Step = tuple[Tensor | None, tuple[Tensor, ...]]


class PathGradient:
    """The gradient of a chunk's ELBO in the parameters of its guide, on the draws of one step after the other.

    A guide that is asked often enough is recorded: its draws, its log q and their gradients as tensor operations, to be
    replayed without Pyro. The first replay is compared with Pyro on the same draws; a guide that cannot be recorded, or
    whose record gives something else, goes through Pyro at every step.

    Args:
        num_steps: how many steps are to come with plain and with mirrored draws.
    """

    def __init__(
        self, refinable: Refinable, chunk: Chunk, num_particles: int, seed: int, num_steps: dict[bool, int]
    ) -> None:
        self.refinable, self.chunk, self.num_particles, self.seed = refinable, chunk, num_particles, seed
        self._recorded = {mirrored: steps >= MIN_STEPS for mirrored, steps in num_steps.items()}
        self._records: dict[bool, list[_Record]] = {}

    def __call__(self, density: BoundDensity, stream: str, step: int, *, measure: bool, mirrored: bool) -> Step:
        """The gradients and, if asked to `measure` it, the ELBO `(B,)`, on the draws of one step of a stream."""
        if not self._recorded[mirrored]:
            return self._eager(density, stream, step, measure, mirrored)
        if mirrored in self._records:
            return self._replayed(density, stream, step, measure, mirrored)
        expected = self._eager(density, stream, step, True, mirrored)
        if not self._record(density, stream, step, mirrored, expected):
            self._recorded[mirrored] = False
            self._records.pop(mirrored, None)
        return expected

    def _eager(self, density: BoundDensity, stream: str, step: int, measure: bool, mirrored: bool) -> Step:
        ascent = _Ascent(density, measure)
        with torch.enable_grad():  # which the caller may have switched off
            guide = BlockedGuide(self.refinable, self.chunk, self.chunk.start)
            draws, _ = guide.sample_extended(self.num_particles, self.seed, stream, step, antithetic=mirrored)
            log_q, gradients = _gradients(guide, draws, density.dim, ascent, self.refinable.parameters)
        return ascent.elbo(log_q), self._in_full(gradients)

    def _record(self, density: BoundDensity, stream: str, step: int, mirrored: bool, expected: Step) -> bool:
        """Record every block of the chunk; whether a replay agrees with Pyro."""
        try:
            self._records[mirrored] = [
                _Record(self.refinable, self.chunk.start, block, self.num_particles, density.dim, mirrored)
                for block in self.chunk.blocks()
            ]
            return _agree(self._replayed(density, stream, step, True, mirrored), expected)
        except Exception:  # a program that cannot be traced may fail in any way
            return False

    def _replayed(self, density: BoundDensity, stream: str, step: int, measure: bool, mirrored: bool) -> Step:
        records, drawn = self._records[mirrored], []
        with torch.no_grad():
            for block, each in zip(self.chunk.blocks(), records, strict=True):
                reseed(self.seed, stream, block.start // BLOCK, step)
                drawn.append(each.draw())
            ascent = _Ascent(density, measure)
            gradient = ascent(torch.cat([z for z, _, _ in drawn], 1))
            parts = [
                each.gradients(rows, held)
                for each, rows, (_, _, held) in zip(
                    records, gradient.split([z.shape[1] for z, _, _ in drawn], 1), drawn, strict=True
                )
            ]
        gradients = tuple(_added(of_blocks) for of_blocks in zip(*parts, strict=True))
        return ascent.elbo(torch.cat([log_q for _, log_q, _ in drawn], 1)), self._in_full(gradients)

    def _in_full(self, gradients: Gradients) -> tuple[Tensor, ...]:
        """Zero in parameters that no draw depends on."""
        pairs = zip(gradients, self.refinable.parameters, strict=True)
        return tuple(torch.zeros_like(value) if part is None else part for part, value in pairs)


class _Ascent:
    """The gradient of log p(x, z) at the draws of a step; where the ELBO is measured, its value too."""

    def __init__(self, density: BoundDensity, measure: bool) -> None:
        self.density, self.measure = density, measure
        self.log_joint: Tensor | None = None

    def __call__(self, z: Tensor) -> Tensor:
        if not self.measure:
            return self.density.gradients(z)[0]
        (self.log_joint,), (gradient,) = self.density(z)
        return gradient

    def elbo(self, log_q: Tensor) -> Tensor | None:
        return None if self.log_joint is None else (self.log_joint - log_q.detach()).mean(0)


def _gradients(
    guide: BlockedGuide, draws: Tensor, dim: int, ascent: Callable[[Tensor], Tensor], parameters: list[Tensor]
) -> tuple[Tensor, Gradients]:
    """log q of `draws`, and the path derivative in `parameters`, of which the guide may use some only.

    `ascent` gives the gradient of log p(x, z) at the draws' latents.
    """
    if not draws.requires_grad:
        raise InputError("family: its draws have no reparameterised gradient (rsample), so it cannot be refined")
    point = draws.detach().requires_grad_()
    log_q = guide.log_prob(point)
    (score,) = torch.autograd.grad(log_q.sum(), point)
    gradient = ascent(point.detach()[..., :dim].contiguous())
    gradient = torch.nn.functional.pad(gradient, (0, draws.shape[-1] - dim))
    path = torch.nan_to_num(gradient - score, nan=0.0, posinf=0.0, neginf=0.0)
    target = (path * draws).sum() / len(draws)
    # A reverse model's own parameters move no draw: they are fitted to the auxiliary variables by likelihood.
    log_reverse = guide.log_reverse(point.detach())
    if log_reverse is not None:
        target = target + log_reverse.sum() / len(draws)
    return log_q, torch.autograd.grad(target, parameters, allow_unused=True)


class _Record:
    """The guide's part of a step for one block, cut in two where the gradient of log p(x, z) comes in.

    Parameters are referred to, not copied: their values change in place. Draws come from torch's global generators.
    """

    def __init__(
        self, refinable: Refinable, offset: int, block: Chunk, num_particles: int, dim: int, mirrored: bool
    ) -> None:
        self._used: list[bool] = []

        def step(gradient: Tensor) -> tuple[Tensor, ...]:
            points: list[Tensor] = []

            def ascent(z: Tensor) -> Tensor:
                points.append(z)
                return gradient

            with torch.enable_grad():
                guide = BlockedGuide(refinable, block, offset)
                here = torch.zeros(())  # the stream is seeded between the guide's run and the draws
                draws, _ = guide.sample_extended(num_particles, 0, "record", antithetic=mirrored)
                log_q, gradients = _gradients(guide, draws, dim, ascent, refinable.parameters)
            self._used = [part is not None for part in gradients]
            return here, points[0], log_q.detach(), *(part for part in gradients if part is not None)

        like = refinable.parameters[0]
        # Pyro's validation would look at values, which a record cannot.
        with warnings.catch_warnings(), evaluating(), torch.no_grad():
            warnings.simplefilter("ignore")
            whole = record(step, like.new_zeros(num_particles, len(block), dim))
        _drop_draws_before_seeding(whole.graph)
        before, after = _halves(whole, num_early=2)
        self._before, self._after = reuse_memory(before), reuse_memory(after)

    def draw(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Draws of the latents, their log q, and what `gradients` needs of how they came about."""
        z, log_q, *held = self._before()
        return z, log_q, held

    def gradients(self, gradient: Tensor, held: list[Tensor]) -> Gradients:
        """The gradients in the parameters, for the `gradient` of log p(x, z) at the draws."""
        given = iter(self._after(gradient.contiguous(), *held))
        return tuple(next(given) if used else None for used in self._used)


def _halves(module: GraphModule, num_early: int) -> tuple[GraphModule, GraphModule]:
    """What of a graph does not depend on its one input, and what does.

    The first half gives the first `num_early` outputs, and what the second takes besides the input; that one gives the
    other outputs.
    """
    late: set[Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder" or any(operand in late for operand in node.all_input_nodes):
            late.add(node)
    output = module.graph.output_node()
    results: Any = output.args[0]
    wanted = [operand for node in late - {output} for operand in node.all_input_nodes]
    handed = list(dict.fromkeys(n for n in (*wanted, *results[num_early:]) if n not in late and n.op != "get_attr"))
    before, after = Graph(), Graph()
    early: dict[Node, Node] = {}
    rest: dict[Node, Node] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            early[node], rest[node] = before.node_copy(node), after.node_copy(node)
        elif node.op == "placeholder":
            rest[node] = after.node_copy(node)
            rest.update({other: after.placeholder(f"held_{k}") for k, other in enumerate(handed)})
        elif node.op != "output":
            graph, copies = (after, rest) if node in late else (before, early)
            copies[node] = graph.node_copy(node, lambda operand, copies=copies: copies[operand])  # type: ignore[misc]
    for node in handed:
        rest[node].meta = dict(node.meta)
    before.output(tuple(early[node] for node in (*results[:num_early], *handed)))
    after.output(tuple(rest[node] for node in results[num_early:]))
    for graph in (before, after):
        graph.eliminate_dead_code()
    return GraphModule(module, before), GraphModule(module, after)


def _drop_draws_before_seeding(graph: Graph) -> None:
    """Leave out the draws of the run that gave the guide's distributions, and the first output, which stands behind it.

    They were made before the stream was seeded: replayed, they would take numbers from it.
    """
    output = graph.output_node()
    results: Any = output.args[0]
    seeding, output.args = results[0], (results[1:],)
    nodes = list(graph.nodes)
    for node in reversed(nodes[: nodes.index(seeding)]):
        tags = node.target.tags if isinstance(node.target, OpOverload) else ()
        if not node.users and torch.Tag.nondeterministic_seeded in tags:
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _added(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    """The sum of what the blocks contribute to a gradient."""
    there = [part for part in parts if part is not None]
    return sum(there[1:], start=there[0]) if there else None


def _agree(found: Step, expected: Step) -> bool:
    """Whether two outcomes of one step are the same but for rounding."""
    pairs = zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True)
    return all(_close(left, right) for left, right in pairs if left is not None and right is not None)


def _close(left: Tensor, right: Tensor) -> bool:
    tolerance = 1e-7 if right.dtype == torch.float64 else 1e-3
    finite = right[torch.isfinite(right)]
    spread = float(finite.abs().max()) if len(finite) else 0.0
    return torch.allclose(left, right, rtol=tolerance, atol=tolerance * spread, equal_nan=True)
