"""Refinement from other starts, at datapoints whose posteriors have several modes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.bounds import chunk_log_weights
from pyrogaps.density import JointDensity
from pyrogaps.density.local import LocalGuide
from pyrogaps.gaussians import Gaussian
from pyrogaps.log_weights import mean_estimate
from pyrogaps.modes import Contested, Gain, Modes, examine
from pyrogaps.problem import Problem
from pyrogaps.refine.families import Start
from pyrogaps.refine.family_guide import JoinedGuide
from pyrogaps.refine.local import Refinable
from pyrogaps.refine.own import OwnFamily
from pyrogaps.refine.refiner import Refiner
from pyrogaps.run import Run
from pyrogaps.streams import Chunk

NUM_COMPARED = 1024  # draws on which two refined guides are compared


def starts_at(modes: Modes, *, own: bool) -> list[Start]:
    """The best factorised Gaussians at the modes: for one of precision H, the variances are 1 / H_ii.

    A guide's `own` family needs no start at the first mode, where it starts anyway.
    """
    return [_factorised(modes.ranked(rank)) for rank in range(int(own), modes.most)]


def can_be_taken(refiner: Refiner) -> bool:
    """Whether the family can be refined at some of the datapoints alone."""
    return not isinstance(refiner.family, OwnFamily) or refiner.family.on_other_data


@dataclass(frozen=True)
class Row:
    """The refined guide of one datapoint: that at `index` of `guide`, which is the guide of `chunk`."""

    guide: Refinable
    chunk: Chunk
    index: int


def refined_from_modes(
    problem: Problem, refiner: Refiner, run: Run, number: int, guides: Sequence[tuple[Chunk, Refinable]]
) -> tuple[Tensor, Gain]:
    """Examine `number` datapoints of a problem, and refine those with several modes from each; the refined guides of
    its chunks, `guides`, take the result where it is better. Returns the indices examined, `(n,)`, and the gain.
    """

    def measure(contested: Contested, run: Run) -> Gain:
        rows = []
        for index in contested.indices.tolist():
            chunk, guide = next(pair for pair in guides if pair[0].start <= index < pair[0].stop)
            rows.append(Row(guide, chunk, index))
        return _improved(contested, refiner.over(contested.problem), run, rows)

    indices, results = examine(problem, number, run, measure, alone=True)
    gains = [gain for _, gain in results]
    if not gains:
        return indices, Gain.none(len(indices))
    value, error = torch.cat([gain.value for gain in gains]), torch.cat([gain.error for gain in gains])
    return indices, Gain(value, error, len(indices))


def _improved(contested: Contested, refiner: Refiner, run: Run, rows: Sequence[Row]) -> Gain:
    """Refine the contested datapoints from all modes; where that raises the ELBO, set the guides at `rows` to the
    result. Returns the gain.
    """
    problem, chunk = contested.problem, Chunk(0, len(rows))
    starts = starts_at(contested.modes, own=isinstance(refiner.family, OwnFamily))
    other, _ = refiner.fit(problem, chunk, run, "other starts", None, starts)
    space = problem.density_of(other)
    density = problem.evaluator_of(space)
    new, old = (
        mean_estimate(chunk_log_weights(density, guide, chunk, NUM_COMPARED, run.stream(f"compared {name}")))
        for name, guide in (("new", other), ("old", _Rows(space, rows)))
    )
    for place in (new.value > old.value).nonzero()[:, 0].tolist():
        _take_row(rows[place], other, place, whole=problem.plate is None)
    return Gain((new.value - old.value).clamp(min=0).cpu(), new.mcse.hypot(old.mcse).cpu(), len(rows))


@dataclass(frozen=True)
class _Rows:
    """The refined guides at `rows` as a posterior."""

    joint: JointDensity
    rows: Sequence[Row]

    def at(self, indices: Tensor) -> LocalGuide:
        chosen = [self.rows[index] for index in indices.tolist()]
        guides = []
        for guide in {id(row.guide): row.guide for row in chosen}.values():
            place = torch.tensor([row.guide is guide for row in chosen]).nonzero()[:, 0]
            guides.append((guide.at(torch.tensor([chosen[k].index for k in place.tolist()])), place))
        return JoinedGuide(self.joint, indices, guides)


def _take_row(row: Row, source: Refinable, place: int, *, whole: bool) -> None:
    """Set the parameters of a datapoint to those of one of `source`; `whole`: to all there are."""
    with torch.no_grad():
        own = _entries(row.guide, row.index - row.chunk.start)
        for mine, others in zip(own, _entries(source, place), strict=True):
            (parameter, axis, at), (value, its_axis, its_at) = mine, others
            if whole:
                parameter.copy_(value)
            else:
                parameter.select(axis, at).copy_(value.select(its_axis, its_at))


def _factorised(gaussian: Gaussian) -> Start:
    return Start(gaussian.loc, gaussian.precision_diagonal.rsqrt(), fitted=False)


def _entries(guide: Refinable, row: int) -> list[tuple[Tensor, int, int]]:
    """The parameters that hold a datapoint, their axes of datapoints, and its place there."""
    places = zip(guide.parameters, guide.axes, guide.rows, strict=True)
    return [
        (parameter, axis, row - (rows.start or 0))
        for parameter, axis, rows in places
        if (rows.start or 0) <= row and (rows.stop is None or row < rows.stop)
    ]
