"""`python -m benchmarks.control`: what models learned with a filter, a lookahead and a smoother cost in control.

Linear-quadratic-Gaussian control, exact: from the same trajectories under random actions, linear-Gaussian models are
learned with guides of lookahead 0, 1, 3 and infinity, by the bound of the best such guide; the Kalman filter and the
Riccati gain of each run on the true system. Writes `results/control.csv`, a row a model, `control.png` and
`control.md`. A setting that is finished lies in `--runs`; a run that was stopped continues.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure

from benchmarks.control import page, picture
from benchmarks.control.learning import Row, rows
from benchmarks.control.settings import SETTINGS, Setting
from benchmarks.reporting import RESULTS, machine, write


def path_of(setting: Setting, options: argparse.Namespace) -> Path:
    """Where the rows of a setting lie when it is finished."""
    name = f"{setting.name.replace(' ', '-')}-{options.sets}-{options.steps}-{options.seed}.json"
    folder: Path = options.runs
    return folder / name


def measure(setting: Setting, options: argparse.Namespace) -> None:
    """Make the rows of a setting where they are not there yet."""
    if not path_of(setting, options).exists():
        found = rows(setting, options.sets, options.steps, options.seed)
        text = json.dumps({"machine": machine(), "rows": [asdict(row) for row in found]}, indent=1)
        write(path_of(setting, options), text.encode())


def finished(options: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """The rows of all settings that are finished, and the machines that they were made on, by setting."""
    found: list[Row] = []
    machines = {}
    for setting in SETTINGS:
        if (path := path_of(setting, options)).exists():
            kept = json.loads(path.read_text())
            machines[setting.name] = kept["machine"]
            found += [Row(**row) for row in kept["rows"]]
    return found, machines


def table(found: list[Row], machines: dict[str, str]) -> bytes:
    """All rows as CSV, the machine in the last column."""
    rows = pd.DataFrame([{**asdict(row), "machine": machines[row.setting]} for row in found])
    text: str = rows.to_csv(index=False, float_format="%.6g")
    return text.encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="by name (default: all); the page is of all that are finished")
    parser.add_argument("--quick", action="store_true", help="tiny runs, to see that it works")
    parser.add_argument("--runs", type=Path, default=Path("benchmarks/runs/control"))
    parser.add_argument("--sets", type=int, default=20, help="data sets of each setting")
    parser.add_argument("--steps", type=int, default=120, help="of BFGS, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    known = {setting.name: setting for setting in SETTINGS}
    if unknown := sorted({*options.settings} - {*known}):
        parser.error(f"no setting {unknown[0]!r}; there are {', '.join(known)}")
    torch.set_num_threads(1)
    folder = RESULTS
    if options.quick:
        options.sets, options.steps = 2, 3
        folder = options.runs = options.runs / "quick"
    options.runs.mkdir(parents=True, exist_ok=True)
    for name in options.settings or known:
        measure(known[name], options)
        print(page.lines_of(name, finished(options)[0]), flush=True)
    found, machines = finished(options)
    figure = Figure(layout="constrained", figsize=(10, 5.5))
    picture.draw(found, figure)
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / "control.png", dpi=160)
    write(folder / "control.csv", table(found, machines))
    write(folder / "control.md", page.text(found, machines, options).encode())
    print(machine())


if __name__ == "__main__":
    main()
