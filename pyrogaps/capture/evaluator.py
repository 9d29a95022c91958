"""`GradientEvaluator`: log densities and gradients of a Pyro model at many points of the same shape."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyrogaps.capture.footprint import MAX_POINTS, points_within
from pyrogaps.capture.programs import (
    Captured,
    Densities,
    Eager,
    Inputs,
    Values,
    check_agreement,
    value_and_gradients,
)
from pyrogaps.capture.reasons import warn_of
from pyrogaps.density import JointDensity
from pyrogaps.density.runs import evaluating

Mode = Literal["eager", "captured", "compiled"]

# Largest number of points per call: call overhead is negligible, and on a CPU intermediate results fit in cache. It is
# fixed, because the last digits of results depend on it.
MAX_ROWS_CPU, MAX_ROWS_GPU = 1 << 10, MAX_POINTS
# Bytes of a call's intermediate results on a CPU: few of them are alive at once, and these stay in its cache. A point
# takes 1.4 times as long with four times as many, for a decoder of 2,000 genes.
MAX_BYTES_CPU = 64 << 20
# A piece is compiled only if it has at least this share of the points per call.
MIN_COMPILED_SHARE = 1 / 8
FALLBACK = "fallback"


class GradientEvaluator:
    """Log densities of a model and their gradients, for many points of the same shape.

    Mode "eager" runs Pyro every time. Mode "captured" records the tensor operations of one value-and-gradient once per
    shape (data are inputs, parameters are held by reference) and replays them. Mode "compiled" compiles the record with
    `torch.compile`. Each new batch of data is checked against eager once. A model that cannot be captured
    (data-dependent control flow, recurrent networks) is evaluated eagerly, with a warning.

    Many points are evaluated in pieces of one shape that fits the working set (`pyrogaps.memory`), the last one padded.
    Memory use therefore does not grow with the number of points, and one record serves all pieces.

    `num_gradients` counts the points at which gradients were evaluated, `num_values` those at which only values were,
    both without padding.

    Args:
        joint: the model's density.
        mode: as above.
        split: False evaluates log p(x, z); True both log p(z) and log p(x, z), as paths from the prior need.
        quiet: fall back without a warning, for callers that chose the mode by default.
        graphs: records of the same model at other data, and the mode that they fell back to; new ones are added.
    """

    def __init__(
        self,
        joint: JointDensity,
        mode: Mode = "captured",
        split: bool = False,
        *,
        quiet: bool = False,
        graphs: dict[Any, Any] | None = None,
    ) -> None:
        self.joint, self.mode, self.split, self.quiet = joint, mode, split, quiet
        on_cpu = joint.device.type == "cpu"
        self.rows = points_within(joint, *((MAX_ROWS_CPU, MAX_BYTES_CPU) if on_cpu else (MAX_ROWS_GPU,)))
        self.num_gradients = self.num_values = 0
        self._graphs: dict[Any, Any] = {} if graphs is None else graphs
        self._indices: Tensor | None = None
        self._bound: dict[Any, BoundDensity] = {}

    def over(self, joint: JointDensity) -> "GradientEvaluator":
        """An evaluator of the same model's density over other data, with the records of this one."""
        return GradientEvaluator(joint, self.mode, self.split, quiet=self.quiet, graphs=self._graphs)

    def bind(
        self, indices: Tensor, num_particles: int, *, checked: bool = False, whole: bool = False
    ) -> "BoundDensity":
        """The K densities at `num_particles` points of each datapoint in `indices`, which may repeat.

        `checked` skips the comparison with Pyro, for datapoints that were bound before in this shape. `whole` puts all
        points in one piece, as `BoundDensity.on` requires.
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
        return self._bound[key].anew()

    def __call__(self, z: Tensor, indices: Tensor) -> Tensor:
        """log p(x, z), `(S, B)` in nats, at `z (S, B, dim)` of the datapoints `indices`, as in `JointDensity`."""
        return self.bind(indices, len(z)).values(z)[-1]

    def count(self, *, gradients: int = 0, values: int = 0) -> None:
        """Add to `num_gradients` and `num_values`."""
        self.num_gradients += gradients
        self.num_values += values

    def _shape(self, number: int, num_particles: int, whole: bool) -> tuple[int, int]:
        """Number of datapoints in a piece, and of points for each."""
        if self.joint.plate is None and self.joint.structure.particles == "one by one":
            return 1, 1  # the record of one particle's run is replayed for each
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
        positions = [position for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        # A model that holds its data, or parameters of datapoints, selects them by their indices: inputs too.
        selecting = [rows.to(joint.device)] if joint.structure.bound else []
        only_states = _only_states(joint)
        tensors = [*(leaves[position] for position in positions), *selecting]

        def densities(flat: Tensor, *inputs: Tensor) -> Values:
            arguments = list(leaves)
            for position, value in zip(positions, inputs, strict=False):
                arguments[position] = value
            chosen = inputs[-1] if selecting else rows
            args = tree_unflatten(arguments, tree)
            if not self.split:
                total = joint.total(flat, args, chosen)
                # Numbers of states select terms: the gradient with respect to them is zero, and there must be one.
                return (total + 0.0 * flat.sum(-1) if only_states else total,)
            log_prior, log_likelihood = joint.score(flat, args, chosen)
            return log_prior, log_prior + log_likelihood

        constants = tuple(repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor))
        key = (num_particles, len(indices), constants, tuple((tuple(t.shape), t.dtype) for t in tensors))
        programs = self._programs(densities, key, len(rows), tensors, checked)
        return _Piece(programs, programs.inputs(tensors), len(indices))

    def _programs(
        self, densities: Densities, key: Any, rows: int, tensors: list[Tensor], checked: bool
    ) -> Eager | Captured:
        eager = Eager(densities, self.joint)
        self.mode = self._graphs.get(FALLBACK, self.mode)
        if self.mode == "eager" or _only_states(self.joint):  # no gradient to record
            return eager
        if checked and key in self._graphs:
            return self._recorded(key)
        dim = self.joint.dim
        flat = 0.1 * torch.linspace(-1, 1, rows * dim, dtype=self.joint.dtype).reshape(rows, dim).to(self.joint.device)
        # Compared at other points than those of the recording, whose values could have become constants.
        recorded_at = 0.05 - 0.7 * flat
        try:
            if key not in self._graphs:
                # A small piece, such as the last of a data set, never makes up for the time of compiling.
                compiled = self.mode == "compiled" and rows >= MIN_COMPILED_SHARE * self.rows
                with evaluating(self.joint.model):
                    # Before the recording, because this run registers the model's parameters.
                    expected = value_and_gradients(densities, flat, *tensors)
                    self._graphs[key] = Captured(densities, recorded_at, tensors, compiled=compiled)
            else:
                expected = eager.both(flat, *tensors)
            with torch.no_grad():
                check_agreement(self._graphs[key], expected, flat, tensors)
        except Exception as error:
            fallback: Mode = "captured" if self.mode == "compiled" else "eager"
            if not self.quiet:
                warn_of(error, self.mode, eager=fallback == "eager")
            self._graphs.clear()
            self._graphs[FALLBACK] = fallback
            return self._programs(densities, key, rows, tensors, checked)
        return self._recorded(key)

    def _recorded(self, key: Any) -> Captured:
        graph: Captured = self._graphs[key]
        return graph


@dataclass(frozen=True)
class _Piece:
    """The densities of a subset of datapoints, on data repeated for the points of each."""

    programs: Eager | Captured
    inputs: Inputs
    width: int


class BoundDensity:
    """K log densities of B datapoints, as functions of S points for each: `z (S, B, dim)`.

    A call returns the values, K times `(S, B)`, and the gradients, K times `(S, B, dim)`. `values` and `gradients`
    compute only one of them, which is cheaper.
    """

    def __init__(self, evaluator: GradientEvaluator, pieces: list[_Piece], num_particles: int) -> None:
        self._evaluator, self._pieces, self._num_particles = evaluator, pieces, num_particles

    @property
    def dim(self) -> int:
        """The length of a point."""
        return self._evaluator.joint.dim

    def on(self, args: tuple[Any, ...]) -> "BoundDensity":
        """The same densities with other arguments of the same shapes, for the same datapoints, unchecked.

        Requires a density that was bound in one piece.
        """
        (piece,) = self._pieces
        leaves, _ = tree_flatten(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        other = replace(piece, inputs=piece.inputs.of(tensors))
        return BoundDensity(self._evaluator, [other], self._num_particles)

    def anew(self) -> "BoundDensity":
        """The same densities, with the parameters as they are now."""
        pieces = [replace(piece, inputs=piece.inputs.anew()) for piece in self._pieces]
        return BoundDensity(self._evaluator, pieces, self._num_particles)

    def at_step(self, step: int) -> "BoundDensity":
        """The density for an optimisation step: always this one, because it is exact."""
        return self

    def __call__(self, z: Tensor) -> tuple[Values, Values]:
        self._evaluator.count(gradients=z.shape[0] * z.shape[1])
        results = self._run("both", z)
        half = len(results) // 2
        return results[:half], results[half:]

    def gradients(self, z: Tensor) -> Values:
        """Only the gradients; much cheaper if the likelihood has an expensive normaliser."""
        self._evaluator.count(gradients=z.shape[0] * z.shape[1])
        return self._run("gradients", z)

    def values(self, z: Tensor) -> Values:
        """Only the log densities."""
        self._evaluator.count(values=z.shape[0] * z.shape[1])
        return self._run("values", z)

    def _run(self, program: str, z: Tensor) -> Values:
        """The results of a program at all points, computed piece by piece, each of shape `(S, B, *)`."""
        with torch.no_grad():
            columns = [
                self._column(piece, program, part) for piece, part in zip(self._pieces, self._split(z), strict=True)
            ]
            results: Values = tuple(_joined(parts, 1)[:, : z.shape[1]] for parts in zip(*columns, strict=True))
        return results

    def _split(self, z: Tensor) -> tuple[Tensor, ...]:
        width = self._pieces[0].width
        missing = width * len(self._pieces) - z.shape[1]
        padded = torch.cat([z, z[:, -1:].expand(-1, missing, -1)], 1) if missing else z
        parts: tuple[Tensor, ...] = padded.split(width, 1)
        return parts

    def _column(self, piece: _Piece, program: str, z: Tensor) -> Values:
        missing = -len(z) % self._num_particles
        padded = torch.cat([z, z[-1:].expand(missing, -1, -1)]) if missing else z
        results = [self._at(piece, program, part) for part in padded.split(self._num_particles)]
        return tuple(_joined(parts, 0)[: len(z)] for parts in zip(*results, strict=True))

    def _at(self, piece: _Piece, program: str, z: Tensor) -> Values:
        flat: Any = getattr(piece.programs, program)(z.flatten(0, 1), *piece.inputs())
        values: Values = (*flat[0], *flat[1]) if program == "both" else flat
        return tuple(value.reshape(*z.shape[:2], *value.shape[1:]) for value in values)


def _joined(parts: tuple[Tensor, ...], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _only_states(joint: JointDensity) -> bool:
    """Whether all latents in z are numbers of states."""
    sites = joint.sites.values()
    return bool(sites) and all(site.num_states for site in sites)
