"""A check of log p(x) from other starts: has the estimator missed modes?"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.evidence.climb import Climbed
from pyrogaps.evidence.ladder import Ladder, LadderMeasurement
from pyrogaps.evidence.parts import climbed_by_parts
from pyrogaps.evidence.protocol import Measured, Measurement, joined
from pyrogaps.modes import Contested, Gain, Modes, examine
from pyrogaps.run import Run
from pyrogaps.streams import Chunk


@dataclass(frozen=True)
class ByModes(LadderMeasurement):
    """log p(x_n) of a few datapoints by the ladder, for every one of their `modes`."""

    modes: Modes

    def _climbed(self, chunk: Chunk) -> list[Climbed]:
        return [climbed_by_parts(self.problem.evaluator, self.modes, self.evidence, self.run)]


def by_modes(measurement: Measurement, contested: Contested, run: Run) -> Measured:
    """log p(x_n) of contested datapoints, all their modes included, by the ladder of `measurement`, or else one with
    default settings.
    """
    ladder = measurement.evidence if isinstance(measurement.evidence, Ladder) else Ladder()
    return ByModes(ladder, contested.problem, run, contested.modes).measure(Chunk(0, len(contested.indices)))


def refereed(measurement: Measurement, parts: list[Measured], number: int, run: Run) -> tuple[list[Measured], Tensor]:
    """Measurements of a whole data set, those of examined datapoints with several modes replaced; and where log p(x) is
    doubted, `(N,)`: at all datapoints that were not examined, if any examined one was too low.
    """
    problem, before = measurement.problem, joined(parts)
    indices, measured = examine(problem, number, run, lambda contested, run: by_modes(measurement, contested, run))
    doubted = torch.zeros(problem.num_datapoints, dtype=torch.bool)
    if not measured:
        return parts, doubted
    contested, results = torch.cat([places for places, _ in measured]), [result for _, result in measured]
    after = joined(results)
    gain = gain_of(before, after, contested, len(indices))
    if gain.count:
        doubted[:] = True
        doubted[indices] = False
    if not isinstance(measurement.evidence, Ladder):
        doubted[contested] = gain.found
        return parts, doubted
    kept = gain.accepted.nonzero()[:, 0]
    draws = [column for part in parts for column in part.log_weights or ()]
    others = [column for result in results for column in result.log_weights or ()]
    for place in kept.tolist():
        draws[int(contested[place])] = others[place]
    columns = {name: _with(column, contested[kept], after[name][kept]) for name, column in before.items()}
    return [Measured(columns, tuple(draws))], doubted


def gain_of(before: Mapping[str, Tensor], after: Mapping[str, Tensor], contested: Tensor, number: int) -> Gain:
    """What all modes add to log p(x) at the contested datapoints."""
    value = after["log_evidence"] - before["log_evidence"][contested]
    error = after["log_evidence_mcse"].hypot(before["log_evidence_mcse"][contested])
    return Gain(value.double(), error.double(), number)


def _with(column: Tensor, places: Tensor, values: Tensor) -> Tensor:
    column = column.clone()
    column[places] = values.to(column.dtype)
    return column
