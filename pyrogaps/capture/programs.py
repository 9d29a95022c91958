"""Values and gradients of K densities at rows of points: through Pyro, or from a record of its operations."""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyrogaps.capture.graphs import fusible_elements, output_alone, record, reuse_memory
from pyrogaps.capture.halves import constants_of, halves
from pyrogaps.capture.reasons import WrongRecord
from pyrogaps.density import JointDensity
from pyrogaps.density.runs import evaluating

Values = tuple[Tensor, ...]
Densities = Callable[..., Values]
NUM_POINTS = 8  # of the recording that counts elements


class Eager:
    """Values and gradients through Pyro."""

    def __init__(self, densities: Densities, joint: JointDensity) -> None:
        self._densities, self._model = densities, joint.model

    def inputs(self, tensors: list[Tensor]) -> "Inputs":
        """What the programs take beside the points, for these data."""
        return Inputs(tensors)

    def both(self, flat: Tensor, *inputs: Tensor) -> tuple[Values, Values]:
        with evaluating(self._model):
            return value_and_gradients(self._densities, flat, *inputs)

    def gradients(self, flat: Tensor, *inputs: Tensor) -> Values:
        return self.both(flat, *inputs)[1]

    def values(self, flat: Tensor, *inputs: Tensor) -> Values:
        with evaluating(self._model):
            return self._densities(flat, *inputs)


class Captured:
    """Recorded operations of one value-and-gradient, and their parts that compute only values or only gradients.

    What depends on data and parameters alone, such as normalisers of counts, is computed once for many points: it is
    among their `inputs`.
    """

    def __init__(self, densities: Densities, flat: Tensor, tensors: list[Tensor], *, compiled: bool) -> None:
        def both(flat: Tensor, *inputs: Tensor) -> tuple[Values, Values]:
            return value_and_gradients(densities, flat, *inputs)

        if compiled:  # torch logs a warning if there is no GPU
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        whole = record(both, flat, *tensors)
        self._of_data: GraphModule | None = None
        with suppress(WrongRecord):  # raised where results at points are written into what is made of data
            of_data, whole = halves(whole, slice(1), 0)
            self._of_data = reuse_memory(of_data)
        finish: Callable[[Any], Callable[..., Any]] = torch.compile if compiled else reuse_memory
        self.both, self.values, self.gradients = map(finish, (whole, output_alone(whole, 0), output_alone(whole, 1)))

    def inputs(self, tensors: list[Tensor]) -> "Inputs":
        """What the programs take beside the points, for these data."""
        return Inputs(tensors, self._of_data)


class Inputs:
    """What recorded programs take beside the points: data, and what is computed of them and of parameters.

    The latter is computed when it is first asked for, and again when a parameter was changed in place.
    """

    def __init__(self, tensors: list[Tensor], of_data: GraphModule | None = None) -> None:
        self._tensors, self._of_data = tensors, of_data
        self._read = [] if of_data is None else constants_of(of_data)
        self._versions: list[int] | None = None
        self._inputs: tuple[Tensor, ...] = ()

    def __call__(self) -> tuple[Tensor, ...]:
        if self._of_data is None:
            return (*self._tensors,)
        versions = [0 if tensor.is_inference() else tensor._version for tensor in self._read]
        if versions != self._versions:
            with torch.no_grad():
                self._inputs = self._of_data(*self._tensors)
            self._versions = versions
        return self._inputs

    def anew(self) -> "Inputs":
        """The same, to be computed again: a parameter may have been changed in a way that does not show."""
        return Inputs(self._tensors, self._of_data)

    def of(self, tensors: list[Tensor]) -> "Inputs":
        """Those of other data, which take the place of the first ones of these."""
        return Inputs([*tensors, *self._tensors[len(tensors) :]], self._of_data)


def elementwise_elements(joint: JointDensity) -> int:
    """Elements per point of the fusible operations of a value-and-gradient; 0 if the model cannot be recorded.

    Matrix products and convolutions are not fusible.
    """
    number = 1 if joint.plate is None else NUM_POINTS
    indices = torch.zeros(number, dtype=torch.long)
    try:
        with evaluating(joint.model):
            args = joint.fetch(indices)
            flat = joint.zeros(number)
            joint.total(flat, args, indices)  # the model registers its parameters before the recording

            def density(point: Tensor) -> Values:
                return (joint.total(point, args, indices),)

            module = record(lambda point: value_and_gradients(density, point), flat)
    except Exception:  # the model will run eagerly
        return 0
    return sum(fusible_elements(node) for node in module.graph.nodes) // number


def value_and_gradients(densities: Densities, flat: Tensor, *inputs: Tensor) -> tuple[Values, Values]:
    """K log densities `(R,)` of rows `flat` `(R, dim)`, and their gradients `(R, dim)`."""
    with torch.enable_grad():
        point = flat.detach().requires_grad_()
        values = densities(point, *inputs)
        # Constants, not ones_like(values), so that the record of the gradients does not depend on the values.
        weights = [torch.ones(value.shape, dtype=value.dtype, device=value.device) for value in values]
        if not point.shape[-1]:  # without latents there is no gradient
            return tuple(value.detach() for value in values), tuple(torch.zeros_like(point) for _ in values)
        last = len(values) - 1
        gradients = [
            torch.autograd.grad(value, point, weight, retain_graph=k < last)[0]
            for k, (value, weight) in enumerate(zip(values, weights, strict=True))
        ]
    return tuple(value.detach() for value in values), tuple(gradients)


def check_agreement(graph: Captured, expected: tuple[Values, Values], flat: Tensor, tensors: list[Tensor]) -> None:
    """Raise `WrongRecord` if the replayed values or gradients differ from Pyro's on these data."""
    inputs = graph.inputs(tensors)()
    values, gradients = graph.both(flat, *inputs)
    expected_values, expected_gradients = expected
    pairs = [
        *zip(values, expected_values, strict=True),
        *zip(gradients, expected_gradients, strict=True),
        *zip(graph.gradients(flat, *inputs), expected_gradients, strict=True),
        *zip(graph.values(flat, *inputs), expected_values, strict=True),
    ]
    if not all(same_values(left, right) for left, right in pairs):
        raise WrongRecord


def same_values(left: Tensor, right: Tensor) -> bool:
    """Whether two results are equal up to rounding, in units of the largest."""
    if not right.numel():  # gradients without latents
        return True
    tolerance = 1e-3 if left.dtype == torch.float32 else 1e-7
    spread = tolerance * (1 + torch.where(torch.isfinite(right), right, torch.zeros_like(right)).abs().max())
    return torch.allclose(left, right, rtol=tolerance, atol=float(spread), equal_nan=True)
