"""A check of log p(x) from other starts: has the estimator missed modes?"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.evidence.climb import Climbed
from pyrogaps.evidence.components import climbed_from_parts
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
        climbed = climbed_from_parts if self.problem.joint.enumerated else climbed_by_parts
        return [climbed(self.problem.evaluator, self.modes, self.evidence, self.run)]


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
    if not measured:
        return parts, torch.zeros(problem.num_datapoints, dtype=torch.bool)
    contested, results = torch.cat([places for places, _ in measured]), [result for _, result in measured]
    after = joined(results)
    old, new = ((columns["log_evidence"], columns["log_evidence_mcse"]) for columns in (before, after))
    gain = Gain.between((old[0][contested], old[1][contested]), new, len(indices))
    included = isinstance(measurement.evidence, Ladder)
    doubted = doubted_by(gain, indices, contested, problem.num_datapoints, included=included)
    if not included:
        return parts, doubted
    kept = gain.accepted.nonzero()[:, 0]
    draws = [column for part in parts for column in part.log_weights or ()]
    others = [column for result in results for column in result.log_weights or ()]
    for place in kept.tolist():
        draws[int(contested[place])] = others[place]
    columns = {name: _with(column, contested[kept], after[name][kept]) for name, column in before.items()}
    return [Measured(columns, tuple(draws))], doubted


def doubted_by(gain: Gain, indices: Tensor, contested: Tensor, total: int, *, included: bool) -> Tensor:
    """Where a gain casts doubt on log p(x), `(total,)`: at all that were not examined, and unless what was found is
    `included`, at the contested that gain.
    """
    doubted = torch.zeros(total, dtype=torch.bool)
    if gain.count:
        doubted[:] = True
        doubted[indices] = False
    if not included:
        doubted[contested] = gain.found
    return doubted


def _with(column: Tensor, places: Tensor, values: Tensor) -> Tensor:
    column = column.clone()
    column[places] = values.to(column.dtype)
    return column
