"""A sample of datapoints, measured from other starts too: what the ledger's own starts have missed."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pyrogaps.chunk_cache import Arrays
from pyrogaps.errors import counted
from pyrogaps.evidence import Ladder
from pyrogaps.evidence.referee import by_modes, doubted_by
from pyrogaps.evidence.reliability import DOUBTED, RELIABLE
from pyrogaps.gaps.measure import OWN, Measure, as_arrays
from pyrogaps.modes import Contested, Gain, examine
from pyrogaps.refine import OwnFamily
from pyrogaps.refine.examined import can_be_taken, starts_at
from pyrogaps.run import Run
from pyrogaps.streams import Chunk

EXAMINED = "examined"
REFINED = ("elbo_refined", "elbo_refined_mcse", "khat_refined", "ess_refined", "converged", "kept_start")
CONFIDENCE, EVIDENCE = 0.95, "log p(x)"
NOTEWORTHY = 0.005  # nats; less is printed as 0.00
Results = list[tuple[Chunk, Arrays]]


def with_other_starts(results: Results, measure: Measure, number: int, run: Run) -> tuple[Results, dict[str, Any]]:
    """The results of chunks after `number` datapoints were examined, and what that showed, as plain values.

    Where an examined posterior has several modes, log p(x) is measured by all of them, and every family is refined from
    each. Their columns take the place of those before. If log p(x) had been too low there, those that were not examined
    are no longer reliable.
    """
    indices, parts = examine(measure.problem, number, run, lambda contested, run: _measured(measure, contested, run))
    results = [(chunk, dict(arrays)) for chunk, arrays in results]
    for chunk, arrays in results:
        arrays[EXAMINED] = np.isin(np.arange(chunk.start, chunk.stop), indices.numpy())
    ladder = measure.evidence is not None and isinstance(measure.evidence.evidence, Ladder)
    summary: dict[str, Any] = {"number": len(indices), "total": measure.problem.num_datapoints, "included": ladder}
    if not parts:
        return results, {**summary, "contested": 0, "log_evidence": None, "refined": {}}
    contested = torch.cat([places for places, _ in parts])
    places = contested.numpy()
    known = {*results[0][1]} & {*parts[0][1]}
    after = {name: np.concatenate([arrays[name] for _, arrays in parts]) for name in known}
    before = {name: np.concatenate([arrays[name] for _, arrays in results])[places] for name in known}
    evidence = _gain("log_evidence", before, after, len(indices))
    refined = _gain("elbo_refined", before, after, len(indices)) if "elbo_refined" in after else None
    doubted = doubted_by(evidence, indices, contested, summary["total"], included=ladder).numpy()
    for chunk, arrays in results:
        rows = ((chunk.start <= places) & (places < chunk.stop)).nonzero()[0]
        for name in known if ladder else known & {*REFINED}:
            gain = refined if name in REFINED else evidence
            assert gain is not None
            accepted = gain.accepted.numpy()[rows]
            old = arrays[name][places[rows] - chunk.start]
            arrays[name] = arrays[name].copy()
            arrays[name][places[rows] - chunk.start] = np.where(accepted, after[name][rows], old)
        if evidence.count:
            arrays[DOUBTED] = doubted[chunk.start : chunk.stop]
            if RELIABLE in arrays:
                arrays[RELIABLE] = arrays[RELIABLE] & ~arrays[DOUBTED]
    families = {} if refined is None else dict(zip((OWN, *measure.families), refined.by_column, strict=True))
    found = {"contested": len(places), "log_evidence": _plain(evidence)}
    return results, {**summary, **found, "refined": {name: _plain(gain) for name, gain in families.items()}}


def _measured(measure: Measure, contested: Contested, run: Run) -> Arrays:
    """The columns of contested datapoints, from all their modes."""
    problem, columns = contested.problem, {}
    if can_be_taken(measure.refiner):
        there = replace(measure, problem=problem, refiner=measure.refiner.over(problem))
        starts = {own: starts_at(contested.modes, own=own) for own in (True, False)}
        chunk = Chunk(0, problem.num_datapoints)
        refined, _ = there.refined(chunk, run.quiet(), lambda refiner: starts[isinstance(refiner.family, OwnFamily)])
        columns = {name: refined[name] for name in REFINED}
    assert measure.evidence is not None
    return as_arrays(columns | by_modes(measure.evidence, contested, run).columns)


def _gain(name: str, before: Arrays, after: Arrays, number: int) -> Gain:
    old, new = (
        (torch.as_tensor(columns[name]), torch.as_tensor(columns[f"{name}_mcse"])) for columns in (before, after)
    )
    return Gain.between(old, new, number)


def _plain(gain: Gain) -> dict[str, Any]:
    return {"count": gain.count, "mean": gain.mean}


def lines_on(provenance: Mapping[str, Any]) -> list[str]:
    """`lines_of` a ledger; none where all latents are discrete: log p(x) sums over their states, and has no modes."""
    return lines_of(provenance.get("examined")) if provenance["dim"] else []


def lines_of(examined: Mapping[str, Any] | None) -> list[str]:
    """Lines below a ledger's table: how many datapoints were examined, and what other starts found."""
    if examined is None:
        return ["modes: no datapoint was examined from other starts (referee=False); modes may be missed"]
    number, total = examined["number"], examined["total"]
    if not number:
        return ["modes: no datapoint could be examined from other starts; modes may be missed"]
    of = f"{number:,} of {counted(total, 'datapoint')}"
    if number == total:
        of = "the datapoint" if total == 1 else f"all {counted(total, 'datapoint')}"
    missed = [f"{name} at {gain['count']:,}" for name, gain in _found(examined)]
    if missed:
        raised = f"modes: {of} examined from other starts, which raised {' and '.join(missed)}"
        left_out = not examined["included"] and missed[0].startswith(EVIDENCE)
        return [f"{raised}. The table {'leaves out the higher log p(x)' if left_out else 'has the higher values'}"]
    bound = 1 - (1 - CONFIDENCE) ** (1 / number)
    rest = f". At most {bound:.0%} of all have one that chains from the prior would find ({CONFIDENCE:.0%} confidence)"
    rest = "" if number == total else rest
    return [f"modes: {of} examined from other starts, no missed mode found{rest}"]


def cautions_of(examined: Mapping[str, Any]) -> list[str]:
    """Reasons not to trust the datapoints that were not examined."""
    number, total, cautions = examined["number"], examined["total"], []
    for name, gain in _found(examined):
        where = f"{name} is too low: other starts raise it at {gain['count']:,} of {number:,} examined datapoints"
        if name == EVIDENCE and not examined["included"]:
            cautions.append(f"{where}, by {gain['mean']:.2f} nats on average. Use evidence=Ladder(), referee={total}")
        elif number < total and (name == EVIDENCE or gain["mean"] >= NOTEWORTHY):
            cautions.append(
                f"{where} (included). The other {total - number:,} are low by about {gain['mean']:.2f} nats on "
                f"average. Pass referee={total} to examine all"
            )
    return cautions


def _found(examined: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The quantities that other starts raised, by name, and by how much."""
    gains = {EVIDENCE: examined["log_evidence"] or {"count": 0}}
    for family, gain in examined["refined"].items():
        gains[f"L[q*] of the {'own family' if family == OWN else f'family {family}'}"] = gain
    return [(name, gain) for name, gain in gains.items() if gain["count"]]
