"""Where nearly all datapoints fail the checks of log p(x), none that passes is called reliable."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import pyrogaps as pg
from pyrogaps.evidence.reliability import by_chance
from tests.references import WrongEncoder, anisotropic, draws_of

NUMBER = 40


@pytest.mark.parametrize(("passes", "expected"), [(0, 0), (1, 1), (2, 0), (40, 0)])
def test_fewer_than_one_in_twenty_pass_by_chance(passes: int, expected: int) -> None:
    reliable = torch.arange(NUMBER) < passes
    assert int(by_chance(reliable).sum()) == expected
    assert int(by_chance(reliable.numpy()).sum()) == expected


@dataclass(frozen=True)
class Passing(pg.Ladder):
    """The ladder, by whose checks only the first `number` datapoints pass: the others' weights have no upper bound."""

    number: int = 1

    def prepare(self, problem: Any, run: Any, refine: Any = None) -> Any:
        measurement = super().prepare(problem, run, refine)

        class Some(type(measurement)):  # type: ignore[misc]
            def measure(self, chunk: Any, refined: Any = None) -> pg.Measured:
                measured = super().measure(chunk, refined)
                fails = chunk.indices >= self.evidence.number
                upper = torch.where(fails, torch.inf, measured.columns["log_evidence_upper"])
                reliable = measured.columns["log_evidence_reliable"] & ~fails
                columns = {"log_evidence_upper": upper, "log_evidence_reliable": reliable}
                return measured._replace(columns=measured.columns | columns)

        return Some(measurement.evidence, measurement.problem, measurement.run)


@pytest.mark.parametrize(("number", "expected"), [(1, 0), (3, 3)])
@pytest.mark.parametrize("batch_size", [8, 64])
def test_trust_is_withdrawn_over_all_chunks(number: int, expected: int, batch_size: int) -> None:
    model = anisotropic(4, 2)
    x, _ = draws_of(model, NUMBER)
    guide, evidence = WrongEncoder(model), Passing(number=number)
    options: dict[str, Any] = {"evidence": evidence, "batch_size": batch_size, "referee": False}
    estimate = pg.log_evidence(model, guide, x, **options)
    assert int(estimate.reliable.sum()) == expected
    ledger = pg.decompose(
        model, guide, x, refinement=pg.Refinement(num_steps=20), num_particles=50, progress=False, **options
    )
    assert int(ledger.per_datapoint["log_evidence_reliable"].sum()) == expected
    assert any(f"cannot be trusted for {NUMBER - expected}" in words for words in ledger.diagnose().warnings)
