"""`python -m benchmarks.mapa_costs [MEASUREMENTS]`: what MAPA costs, and what draws without replacement gain.

`building`: the posterior of 60,000 binarised MNIST images, against 5 minutes and 4 GiB: `results/mapa_building.csv`.
`steps`: training steps against IWAE's: `results/mapa_steps.csv`.
`replacement`: the inner estimate's variance with and without replacement: `results/mapa_replacement.csv`.

All on one thread. `steps` reads the file of distances that `building` writes to `--runs`.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.mapa_costs import building, replacement, steps
from benchmarks.mapa_costs.settings import Settings
from benchmarks.reporting import machine, report

# Another measurement is another file, with `rows`, `COLUMNS` and `TITLE`, and a line here. The first is measured while
# this process is small: a child's peak of memory begins at its parent's.
MEASUREMENTS: dict[str, Any] = {"building": building, "steps": steps, "replacement": replacement}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurements", nargs="*", help=f"of {', '.join(MEASUREMENTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny runs on digits, to see that it works")
    parser.add_argument("--runs", type=Path, default=Path("benchmarks/runs/mapa_costs"))
    parser.add_argument("--num_rounds", type=int, default=40, help="of timed steps")
    parser.add_argument("--num_draws", type=int, default=100, help="of explanations with and without replacement")
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    names = arguments.pop("measurements") or list(MEASUREMENTS)
    if unknown := sorted({*names} - {*MEASUREMENTS}):
        parser.error(f"no measurement {unknown[0]}; there are {', '.join(MEASUREMENTS)}")
    settings = Settings(**arguments)
    if settings.quick:
        settings = Settings(settings.runs / "quick", True, 2, 3, settings.seed)
    settings.runs.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name, part in MEASUREMENTS.items():
        if name in names:
            report(f"mapa_{name}", part.TITLE, part.COLUMNS, list(part.rows(settings)), quick=settings.quick)
    print(machine())


if __name__ == "__main__":
    main()
