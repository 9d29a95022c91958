"""`GradientEvaluator`: log densities of a Pyro model and their gradients at many points of the same shape."""

import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyrogaps.capture.footprint import points_within
from pyrogaps.capture.programs import Captured, Densities, Eager, Values, check_agreement, value_and_gradients
from pyrogaps.density import JointDensity
from pyrogaps.density.runs import evaluating

Mode = Literal["eager", "captured", "compiled"]


# Points at a time: enough that calls cost little beside arithmetic, few enough that intermediate results stay in cache.
# It is fixed, because results depend on it in their last digits.
ROWS = {"cpu": 1 << 10}
MANY_ROWS = 1 << 16  # elsewhere
FRACTION = 8


class GradientEvaluator:
    """Log densities of a model and their gradients, for many points of the same shape.

    "eager" goes through Pyro every time; "captured" records the tensor operations of one value-and-gradient once per
    shape (with data among the inputs, and parameters by reference) and replays them; "compiled" hands the record to
    `torch.compile`. Each new batch of data is checked against eager once; a model that cannot be captured
    (data-dependent control flow, recurrent networks) falls back to eager with a warning.

    Many points are evaluated in pieces of one shape, which fits the working set (`pyrogaps.memory`), the last of them
    padded: the memory that takes does not grow with their number, and one record serves all.

    `num_gradients` counts the points at which gradients were evaluated, `num_values` those where values alone were,
    padding left out.

    Args:
        joint: the model's density.
        mode: as above.
        split: False evaluates log p(x, z); True both log p(z) and log p(x, z), as paths from the prior need.
        quiet: to fall back without a warning, where nobody asked for a record.
    """

    def __init__(
        self, joint: JointDensity, mode: Mode = "captured", split: bool = False, *, quiet: bool = False
    ) -> None:
        self.joint, self.mode, self.split, self.quiet = joint, mode, split, quiet
        self.rows = points_within(joint, ROWS.get(joint.device.type, MANY_ROWS))
        self.num_gradients = self.num_values = 0
        self._graphs: dict[Any, Captured] = {}
        self._indices: Tensor | None = None
        self._bound: dict[Any, BoundDensity] = {}

    def bind(
        self, indices: Tensor, num_particles: int, *, checked: bool = False, whole: bool = False
    ) -> "BoundDensity":
        """The K densities at `num_particles` points of each datapoint in `indices`, which may repeat.

        `checked`: these datapoints have been bound before in this shape, so the record need not be compared with Pyro
        on them again. `whole`: all points in one piece, so that `BoundDensity.on` can be used.
        """
        if self._indices is None or not torch.equal(indices, self._indices):
            self._indices, self._bound = indices, {}
        width, particles = self._shape(len(indices), num_particles, whole)
        key = width, particles
        if key not in self._bound:
            padding = -len(indices) % width
            groups = torch.cat([indices, indices[-1:].expand(padding)]).split(width)
            pieces = [self._piece(group, particles, checked) for group in groups]
            self._bound[key] = BoundDensity(self, pieces, particles)
        return self._bound[key]

    def __call__(self, z: Tensor, indices: Tensor) -> Tensor:
        """log p(x, z), `(S, B)` in nats, at `z (S, B, dim)` of the datapoints `indices`, as `JointDensity` gives it."""
        return self.bind(indices, len(z)).values(z)[-1]

    def count(self, *, gradients: int = 0, values: int = 0) -> None:
        """Add to `num_gradients` and `num_values`."""
        self.num_gradients += gradients
        self.num_values += values

    def _shape(self, number: int, num_particles: int, whole: bool) -> tuple[int, int]:
        """Datapoints and points of each in a piece."""
        if self.joint.plate is None:
            return 1, num_particles if whole else min(num_particles, self.rows)
        if whole or number * num_particles <= self.rows:
            return number, num_particles
        width = min(self.rows, number)
        return width, self.rows // width

    def _piece(self, indices: Tensor, num_particles: int, checked: bool) -> "_Piece":
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
        return _Piece(self._programs(densities, key, len(rows), tensors, checked), tensors, len(indices))

    def _programs(
        self, densities: Densities, key: Any, rows: int, tensors: list[Tensor], checked: bool
    ) -> Eager | Captured:
        eager = Eager(densities, self.joint)
        if self.mode == "eager":
            return eager
        if checked and key in self._graphs:
            return self._graphs[key]
        dim = self.joint.dim
        flat = 0.1 * torch.linspace(-1, 1, rows * dim, dtype=self.joint.dtype).reshape(rows, dim).to(self.joint.device)
        try:
            if key not in self._graphs:
                # Compiling takes longer than a small piece, the last of a data set, ever will.
                compiled = self.mode == "compiled" and FRACTION * rows >= self.rows
                with evaluating(self.joint.model):
                    # First, because the model registers its parameters in it.
                    expected = value_and_gradients(densities, flat, *tensors)
                    self._graphs[key] = Captured(densities, flat, tensors, compiled=compiled)
            else:
                expected = eager.both(flat, *tensors)
            with torch.no_grad():
                check_agreement(self._graphs[key], expected, flat, tensors)
        except Exception as error:
            instead: Mode = "captured" if self.mode == "compiled" else "eager"
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            how = "run eagerly" if instead == "eager" else "replayed without a compiler"
            if not self.quiet:
                warnings.warn(f"the model cannot be {self.mode}, so it is {how} ({reason})", stacklevel=5)
            self.mode, self._graphs = instead, {}
            return self._programs(densities, key, rows, tensors, checked)
        return self._graphs[key]


@dataclass(frozen=True)
class _Piece:
    """The densities of some datapoints, on data repeated for the points of each."""

    programs: Eager | Captured
    tensors: list[Tensor]
    width: int


class BoundDensity:
    """K log densities of some datapoints, as functions of S points of each: `z (S, B, dim)`.

    Called, it gives the values, K times `(S, B)`, and their gradients, K times `(S, B, dim)`; either costs less alone.
    """

    def __init__(self, evaluator: GradientEvaluator, pieces: list[_Piece], num_particles: int) -> None:
        self._evaluator, self._pieces, self._num_particles = evaluator, pieces, num_particles

    @property
    def dim(self) -> int:
        """The length of a point."""
        return self._evaluator.joint.dim

    def on(self, args: tuple[Any, ...]) -> "BoundDensity":
        """The same densities on other arguments of the same shapes, for the same datapoints; nothing is checked.

        It must have been bound in one piece.
        """
        (piece,) = self._pieces
        leaves, _ = tree_flatten(args)
        other = replace(piece, tensors=[leaf for leaf in leaves if isinstance(leaf, Tensor)])
        return BoundDensity(self._evaluator, [other], self._num_particles)

    def at_step(self, step: int) -> "BoundDensity":
        """The density to use at a step of an optimisation: this one at every step, because it is known exactly."""
        return self

    def __call__(self, z: Tensor) -> tuple[Values, Values]:
        self._evaluator.count(gradients=z.shape[0] * z.shape[1])
        found = self._run("both", z)
        half = len(found) // 2
        return found[:half], found[half:]

    def gradients(self, z: Tensor) -> Values:
        """The gradients alone: for a likelihood whose normaliser is dear, much less work."""
        self._evaluator.count(gradients=z.shape[0] * z.shape[1])
        return self._run("gradients", z)

    def values(self, z: Tensor) -> Values:
        """The log densities alone."""
        self._evaluator.count(values=z.shape[0] * z.shape[1])
        return self._run("values", z)

    def _run(self, program: str, z: Tensor) -> Values:
        """The results of a program at all points, piece by piece, each in the shape of its points `(S, B, *)`."""
        with torch.no_grad():
            columns = [
                self._column(piece, program, part) for piece, part in zip(self._pieces, self._split(z), strict=True)
            ]
            found: Values = tuple(_joined(parts, 1)[:, : z.shape[1]] for parts in zip(*columns, strict=True))
        return found

    def _split(self, z: Tensor) -> tuple[Tensor, ...]:
        width = self._pieces[0].width
        short = width * len(self._pieces) - z.shape[1]
        padded = torch.cat([z, z[:, -1:].expand(-1, short, -1)], 1) if short else z
        parts: tuple[Tensor, ...] = padded.split(width, 1)
        return parts

    def _column(self, piece: _Piece, program: str, z: Tensor) -> Values:
        short = -len(z) % self._num_particles
        padded = torch.cat([z, z[-1:].expand(short, -1, -1)]) if short else z
        found = [self._at(piece, program, part) for part in padded.split(self._num_particles)]
        return tuple(_joined(parts, 0)[: len(z)] for parts in zip(*found, strict=True))

    def _at(self, piece: _Piece, program: str, z: Tensor) -> Values:
        flat: Any = getattr(piece.programs, program)(z.reshape(-1, z.shape[-1]), *piece.tensors)
        values: Values = (*flat[0], *flat[1]) if program == "both" else flat
        return tuple(value.reshape(*z.shape[:2], *value.shape[1:]) for value in values)


def _joined(parts: tuple[Tensor, ...], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
