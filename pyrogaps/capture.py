"""Turning a model's density into a fast value-and-gradient function: Pyro runs once per shape, not once per gradient."""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyrogaps.density import JointDensity
from pyrogaps.density.runs import evaluating

Mode = Literal["eager", "captured", "compiled"]
Values = tuple[Tensor, ...]
Function = Callable[..., tuple[Values, Values]]


class GradientEvaluator:
    """Log densities of a model and their gradients, for many points of the same shape.

    "eager" goes through Pyro every time; "captured" records the tensor operations of one value-and-gradient once per
    shape (with data among the inputs, and parameters by reference) and replays them; "compiled" hands the record to
    `torch.compile`. Each new batch of data is checked against eager once; a model that cannot be captured (data-dependent
    control flow, recurrent networks) falls back to eager with a warning.

    Args:
        joint: the model's density.
        mode: as above.
        split: False evaluates log p(x, z); True both log p(z) and log p(x, z), as paths from the prior need.
    """

    def __init__(self, joint: JointDensity, mode: Mode = "captured", split: bool = False) -> None:
        self.joint, self.mode, self.split = joint, mode, split
        self.num_gradients = 0
        self._graphs: dict[Any, Function] = {}

    def bind(self, indices: Tensor, num_particles: int) -> Callable[[Tensor], tuple[Values, Values]]:
        """The function `z (S, B, dim)` to (log densities `(S, B)`, gradients `(S, B, dim)`), K of each, for `indices`."""
        joint, rows = self.joint, indices.repeat(num_particles)
        with evaluating(joint.model):
            leaves, tree = tree_flatten(joint.fetch(indices, num_particles))
        places = [position for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[position] for position in places]

        def densities(flat: Tensor, *inputs: Tensor) -> Values:
            arguments = list(leaves)
            for position, value in zip(places, inputs, strict=True):
                arguments[position] = value
            log_prior, log_likelihood = joint.score(flat, tree_unflatten(arguments, tree), rows)
            total = log_prior + log_likelihood
            return (log_prior, total) if self.split else (total,)

        function = self._function(densities, (num_particles, len(indices)), leaves, tensors)

        def evaluate(z: Tensor) -> tuple[Values, Values]:
            self.num_gradients += z.shape[0] * z.shape[1]
            with torch.no_grad():
                values, gradients = function(z.reshape(-1, joint.dim), *tensors)
            shape = z.shape[:2]
            return tuple(v.reshape(shape) for v in values), tuple(g.reshape(*shape, -1) for g in gradients)

        return evaluate

    def _function(self, densities: Any, shape: tuple[int, int], leaves: list[Any], tensors: list[Tensor]) -> Function:
        eager = _eager(densities, self.joint)
        if self.mode == "eager":
            return eager
        constants = tuple(repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor))
        key = (shape, constants, tuple((tuple(t.shape), t.dtype) for t in tensors))
        flat = 0.1 * torch.linspace(-1, 1, shape[0] * shape[1] * self.joint.dim, dtype=self.joint.dtype)
        flat = flat.reshape(-1, self.joint.dim).to(self.joint.device)
        try:
            if key not in self._graphs:
                with evaluating(self.joint.model):
                    densities(flat, *tensors)  # lets the model register its parameters before the recording
                    graph = make_fx(_value_and_gradients(densities))(flat, *tensors)
                graph.graph.eliminate_dead_code()
                graph.recompile()
                self._graphs[key] = torch.compile(graph) if self.mode == "compiled" else graph
            with torch.no_grad():
                _agree(self._graphs[key](flat, *tensors), eager(flat, *tensors))
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(f"the model cannot be {self.mode}, so it is run eagerly ({reason})", stacklevel=3)
            self.mode = "eager"
            return eager
        return self._graphs[key]


def _value_and_gradients(densities: Any) -> Function:
    """Each density and its gradient; recorded, what only the others' values need is dead code and is removed."""

    def value_and_gradients(flat: Tensor, *inputs: Tensor) -> tuple[Values, Values]:
        with torch.enable_grad():
            point = flat.detach().requires_grad_()
            values = densities(point, *inputs)
            last = len(values) - 1
            gradients = [torch.autograd.grad(v.sum(), point, retain_graph=k < last)[0] for k, v in enumerate(values)]
        return tuple(value.detach() for value in values), tuple(gradients)

    return value_and_gradients


def _eager(densities: Any, joint: JointDensity) -> Function:
    function = _value_and_gradients(densities)

    def value_and_gradients(flat: Tensor, *inputs: Tensor) -> tuple[Values, Values]:
        with evaluating(joint.model):
            return function(flat, *inputs)

    return value_and_gradients


def _agree(captured: tuple[Values, Values], eager: tuple[Values, Values]) -> None:
    for left, right in zip((*captured[0], *captured[1]), (*eager[0], *eager[1]), strict=True):
        tolerance = 1e-3 if left.dtype == torch.float32 else 1e-7
        spread = tolerance * (1 + right.abs().max())
        if not torch.allclose(left, right, rtol=tolerance, atol=float(spread), equal_nan=True):
            raise ValueError("its captured operations give other values on these data")
