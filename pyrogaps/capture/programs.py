"""A value-and-gradient of K densities at rows of points: through Pyro, or from a record of its operations."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyrogaps.capture.graphs import fusible_elements, output_alone, record, reuse_memory
from pyrogaps.density import JointDensity
from pyrogaps.density.runs import evaluating

Values = tuple[Tensor, ...]
Densities = Callable[..., Values]
FEW = 8


class Eager:
    """Through Pyro every time."""

    def __init__(self, densities: Densities, joint: JointDensity) -> None:
        self._densities, self._model = densities, joint.model

    def both(self, flat: Tensor, *inputs: Tensor) -> tuple[Values, Values]:
        with evaluating(self._model):
            return value_and_gradients(self._densities, flat, *inputs)

    def gradients(self, flat: Tensor, *inputs: Tensor) -> Values:
        return self.both(flat, *inputs)[1]

    def values(self, flat: Tensor, *inputs: Tensor) -> Values:
        with evaluating(self._model):
            return self._densities(flat, *inputs)


class Captured:
    """The operations of one value-and-gradient, and what remains of them where values or gradients alone are wanted."""

    def __init__(self, densities: Densities, flat: Tensor, tensors: list[Tensor], *, compiled: bool) -> None:
        def both(flat: Tensor, *inputs: Tensor) -> tuple[Values, Values]:
            return value_and_gradients(densities, flat, *inputs)

        if compiled:  # torch looks for a GPU, and says so where there is none
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        whole = record(both, flat, *tensors)
        finish: Callable[[Any], Callable[..., Any]] = torch.compile if compiled else reuse_memory
        self.both, self.values, self.gradients = map(finish, (whole, output_alone(whole, 0), output_alone(whole, 1)))


def elementwise_elements(joint: JointDensity) -> int:
    """How many elements, a point, the operations of a value-and-gradient make that could be fused; 0 without a record.

    Matrix products and convolutions are not among them.
    """
    few = 1 if joint.plate is None else FEW
    indices = torch.zeros(few, dtype=torch.long)
    try:
        with evaluating(joint.model):
            args = joint.fetch(indices)
            flat = joint.zeros(few)
            joint.score(flat, args, indices)  # lets the model register its parameters before the recording

            def density(point: Tensor) -> Values:
                return (torch.stack(joint.score(point, args, indices)).sum(0),)

            module = record(lambda point: value_and_gradients(density, point), flat)
    except Exception:  # it will be run eagerly
        return 0
    return sum(fusible_elements(node) for node in module.graph.nodes) // few


def value_and_gradients(densities: Densities, flat: Tensor, *inputs: Tensor) -> tuple[Values, Values]:
    """K log densities `(R,)` of rows `flat` `(R, dim)`, and their gradients `(R, dim)`."""
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


def check_agreement(graph: Captured, expected: tuple[Values, Values], flat: Tensor, tensors: list[Tensor]) -> None:
    """Raise `ValueError` where a replay gives other values or gradients than Pyro did on these data."""
    values, gradients = graph.both(flat, *tensors)
    expected_values, expected_gradients = expected
    pairs = [
        *zip(values, expected_values, strict=True),
        *zip(gradients, expected_gradients, strict=True),
        *zip(graph.gradients(flat, *tensors), expected_gradients, strict=True),
        *zip(graph.values(flat, *tensors), expected_values, strict=True),
    ]
    for left, right in pairs:
        tolerance = 1e-3 if left.dtype == torch.float32 else 1e-7
        spread = tolerance * (1 + torch.where(torch.isfinite(right), right, torch.zeros_like(right)).abs().max())
        if not torch.allclose(left, right, rtol=tolerance, atol=float(spread), equal_nan=True):
            raise ValueError("its captured operations give other values on these data")
