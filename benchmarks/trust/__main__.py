"""`python -m benchmarks.trust`: is the library ever confidently wrong?

Each problem of `problems.py` has an exact log p(x) and, where closed forms or quadrature give them, L[q], L[q*] and
L[q*_C]. `decompose` and `log_evidence` measure them with default settings; `judge.py` compares means and datapoints
with the truth. A value off by more than both 4 stated errors and 0.03 nats, without a flag, is confidently wrong.
Problems, easy marks and seeds were fixed before the first run. `results/trust.csv` has a row for each quantity of each
run; `results/trust.md` is the page made from it.

With `--problem` the page is printed, and no file is written. `--runs` stores finished runs in a folder and continues
from there. Give a new folder, or none, after the library has changed.
"""

import argparse
import json
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import pyrogaps as pg
from benchmarks import reporting
from benchmarks.reporting import machine, write
from benchmarks.trust import judge
from benchmarks.trust.page import page, rows_in_words
from benchmarks.trust.problem import Instance, Problem
from benchmarks.trust.problems import PROBLEMS

SEEDS = (0, 1, 2)
BRIEF = pg.Refinement(num_steps=20)
QUICK = "two-modes-unequal", "conditioned-1", "schools-known-scale"


def drawn(problem: Problem, number: int, seed: int) -> Instance:
    return problem.make(number, torch.Generator().manual_seed(seed))


def measured(problem: Problem, seed: int, *, quick: bool) -> list[dict[str, Any]]:
    """A row for each quantity; data and draws come from the same seed."""
    instance = drawn(problem, 8 if quick else problem.number, seed)
    settings: dict[str, Any] = {"seed": seed} if instance.plate is None else {"seed": seed, "plate": instance.plate}
    few = {"refinement": BRIEF, "conditioning": pg.Conditioning(4, 4), "num_particles": 100} if quick else {}
    begin = time.perf_counter()
    ledger = pg.decompose(instance.model, instance.guide, instance.data, progress=False, **few, **settings)
    seconds = time.perf_counter() - begin
    judgements = [*judge.of_ledger(ledger, instance.log_evidence, instance.bounds(), easy=problem.easy)]
    more = instance if quick else drawn(problem, problem.number_of_evidence, seed)
    estimate = pg.log_evidence(more.model, more.guide, more.data, **settings)
    judgements.append(judge.of_estimate(estimate, more.log_evidence))
    facts = {"problem": problem.name, "easy": problem.easy, "seed": seed, "seconds": round(seconds, 2)}
    words = " | ".join(ledger.diagnose().warnings)
    return [facts | asdict(judgement) | {"warnings": words} for judgement in judgements]


def finished(problem: Problem, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a run, measured where `--runs` does not hold them."""
    path = None if options.runs is None else options.runs / f"{problem.name}-{seed}.json"
    if path is not None and path.exists():
        rows: list[dict[str, Any]] = json.loads(path.read_text())
        return rows
    rows = measured(problem, seed, quick=options.quick)
    if path is not None:
        write(path, json.dumps(rows, indent=1).encode())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", nargs="*", help=f"names among {', '.join(PROBLEMS)} (default: all)")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--quick", action="store_true", help="three problems, 8 datapoints, one seed: does it run?")
    parser.add_argument("--runs", type=Path, help="folder that stores finished runs, to continue from")
    options = parser.parse_args()
    names = options.problem or (QUICK if options.quick else list(PROBLEMS))
    if unknown := sorted({*names} - {*PROBLEMS}):
        parser.error(f"no problem {unknown[0]}; choose from {', '.join(PROBLEMS)}")
    seeds = options.seeds[:1] if options.quick else options.seeds
    if options.runs is not None:
        options.runs.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for seed in seeds:
        for name in names:
            found = finished(PROBLEMS[name], seed, options)
            rows += found
            print(*rows_in_words(found), sep="\n", flush=True)
    table = pd.DataFrame(rows).assign(machine=machine())
    if options.quick or list(names) == list(PROBLEMS):
        keep(table, "trust-quick" if options.quick else "trust")
    else:
        print(page(table))


def keep(table: pd.DataFrame, name: str) -> None:
    """Write the table and its page."""
    reporting.RESULTS.mkdir(exist_ok=True)
    write(reporting.RESULTS / f"{name}.csv", table.to_csv(index=False).encode())
    write(reporting.RESULTS / f"{name}.md", page(table).encode())


if __name__ == "__main__":
    main()
