"""`GradientEvaluator`: log densities of a Pyro model and their gradients at many points of the same shape."""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyrogaps.capture.graphs import output_alone, record, reuse_memory
from pyrogaps.density import JointDensity
from pyrogaps.density.runs import evaluating

Mode = Literal["eager", "captured", "compiled"]
Values = tuple[Tensor, ...]
Densities = Callable[..., Values]


class GradientEvaluator:
    """Log densities of a model and their gradients, for many points of the same shape.

    "eager" goes through Pyro every time; "captured" records the tensor operations of one value-and-gradient once per
    shape (with data among the inputs, and parameters by reference) and replays them; "compiled" hands the record to
    `torch.compile`. Each new batch of data is checked against eager once; a model that cannot be captured
    (data-dependent control flow, recurrent networks) falls back to eager with a warning.

    `num_gradients` counts the points at which gradients were evaluated, `num_values` those where values alone were.

    Args:
        joint: the model's density.
        mode: as above.
        split: False evaluates log p(x, z); True both log p(z) and log p(x, z), as paths from the prior need.
    """

    def __init__(self, joint: JointDensity, mode: Mode = "captured", split: bool = False) -> None:
        self.joint, self.mode, self.split = joint, mode, split
        self.num_gradients = self.num_values = 0
        self._graphs: dict[Any, _Graph] = {}

    def bind(self, indices: Tensor, num_particles: int, *, checked: bool = False) -> "BoundDensity":
        """The K densities at `num_particles` points of each datapoint in `indices`, which may repeat.

        `checked`: these datapoints have been bound before in this shape, so the record need not be compared with Pyro
        on them again.
        """
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

        constants = tuple(repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor))
        key = (num_particles, len(indices), constants, tuple((tuple(t.shape), t.dtype) for t in tensors))
        return BoundDensity(self, self._programs(densities, key, len(rows), tensors, checked), tensors)

    def _programs(
        self, densities: Densities, key: Any, rows: int, tensors: list[Tensor], checked: bool
    ) -> "_Eager | _Graph":
        eager = _Eager(densities, self.joint)
        if self.mode == "eager":
            return eager
        if checked and key in self._graphs:
            return self._graphs[key]
        dim = self.joint.dim
        flat = 0.1 * torch.linspace(-1, 1, rows * dim, dtype=self.joint.dtype).reshape(rows, dim).to(self.joint.device)
        try:
            if key not in self._graphs:
                with evaluating(self.joint.model):
                    densities(flat, *tensors)  # lets the model register its parameters before the recording
                    self._graphs[key] = _Graph(densities, flat, tensors, compiled=self.mode == "compiled")
            with torch.no_grad():
                _check_agreement(self._graphs[key], eager, flat, tensors)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(f"the model cannot be {self.mode}, so it is run eagerly ({reason})", stacklevel=3)
            self.mode = "eager"
            return eager
        return self._graphs[key]


class BoundDensity:
    """K log densities of some datapoints, as functions of S points of each: `z (S, B, dim)`.

    Called, it gives the values, K times `(S, B)`, and their gradients, K times `(S, B, dim)`; either costs less alone.
    """

    def __init__(self, evaluator: GradientEvaluator, programs: "_Eager | _Graph", tensors: list[Tensor]) -> None:
        self._evaluator, self._programs, self._tensors = evaluator, programs, tensors

    @property
    def dim(self) -> int:
        """The length of a point."""
        return self._evaluator.joint.dim

    def on(self, args: tuple[Any, ...]) -> "BoundDensity":
        """The same densities on other arguments of the same shapes, for the same datapoints; nothing is checked."""
        leaves, _ = tree_flatten(args)
        return BoundDensity(self._evaluator, self._programs, [leaf for leaf in leaves if isinstance(leaf, Tensor)])

    def at_step(self, step: int) -> "BoundDensity":
        """The density to use at a step of an optimisation: this one at every step, because it is known exactly."""
        return self

    def __call__(self, z: Tensor) -> tuple[Values, Values]:
        self._evaluator.num_gradients += z.shape[0] * z.shape[1]
        values, gradients = self._run(self._programs.both, z)
        return tuple(value.reshape(z.shape[:2]) for value in values), tuple(g.reshape(z.shape) for g in gradients)

    def gradients(self, z: Tensor) -> Values:
        """The gradients alone: for a likelihood whose normaliser is dear, much less work."""
        self._evaluator.num_gradients += z.shape[0] * z.shape[1]
        return tuple(gradient.reshape(z.shape) for gradient in self._run(self._programs.gradients, z))

    def values(self, z: Tensor) -> Values:
        """The log densities alone."""
        self._evaluator.num_values += z.shape[0] * z.shape[1]
        return tuple(value.reshape(z.shape[:2]) for value in self._run(self._programs.values, z))

    def _run(self, program: Callable[..., Any], z: Tensor) -> Any:
        with torch.no_grad():
            return program(z.reshape(-1, z.shape[-1]), *self._tensors)


class _Eager:
    """Through Pyro every time."""

    def __init__(self, densities: Densities, joint: JointDensity) -> None:
        self._densities, self._model = densities, joint.model

    def both(self, flat: Tensor, *inputs: Tensor) -> tuple[Values, Values]:
        with evaluating(self._model):
            return _value_and_gradients(self._densities, flat, *inputs)

    def gradients(self, flat: Tensor, *inputs: Tensor) -> Values:
        return self.both(flat, *inputs)[1]

    def values(self, flat: Tensor, *inputs: Tensor) -> Values:
        with evaluating(self._model):
            return self._densities(flat, *inputs)


class _Graph:
    """The operations of one value-and-gradient, and what remains of them where values or gradients alone are wanted."""

    def __init__(self, densities: Densities, flat: Tensor, tensors: list[Tensor], *, compiled: bool) -> None:
        def both(flat: Tensor, *inputs: Tensor) -> tuple[Values, Values]:
            return _value_and_gradients(densities, flat, *inputs)

        whole = record(both, flat, *tensors)
        finish: Callable[[Any], Callable[..., Any]] = torch.compile if compiled else reuse_memory
        self.both, self.values, self.gradients = map(finish, (whole, output_alone(whole, 0), output_alone(whole, 1)))


def _value_and_gradients(densities: Densities, flat: Tensor, *inputs: Tensor) -> tuple[Values, Values]:
    with torch.enable_grad():
        point = flat.detach().requires_grad_()
        values = densities(point, *inputs)
        # Constants, not ones_like(values): recorded, gradients then do not hang on the values.
        ones = [torch.ones(value.shape, dtype=value.dtype, device=value.device) for value in values]
        last = len(values) - 1
        gradients = [
            torch.autograd.grad(value, point, one, retain_graph=k < last)[0]
            for k, (value, one) in enumerate(zip(values, ones, strict=True))
        ]
    return tuple(value.detach() for value in values), tuple(gradients)


def _check_agreement(graph: _Graph, eager: _Eager, flat: Tensor, tensors: list[Tensor]) -> None:
    """Raise `ValueError` where a replay gives other values or gradients than Pyro on these data."""
    values, gradients = graph.both(flat, *tensors)
    expected_values, expected_gradients = eager.both(flat, *tensors)
    pairs = [
        *zip(values, expected_values, strict=True),
        *zip(gradients, expected_gradients, strict=True),
        *zip(graph.gradients(flat, *tensors), expected_gradients, strict=True),
    ]
    for left, right in pairs:
        tolerance = 1e-3 if left.dtype == torch.float32 else 1e-7
        spread = tolerance * (1 + right.abs().max())
        if not torch.allclose(left, right, rtol=tolerance, atol=float(spread), equal_nan=True):
            raise ValueError("its captured operations give other values on these data")
