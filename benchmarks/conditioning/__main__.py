"""`python -m benchmarks.conditioning [EXPERIMENTS]`: the table `results/conditioning.csv`, a row a quantity, in nats;
and the gap against the lookahead, `results/conditioning.png`.

What is finished lies in `--runs`; a run that was stopped continues, and the table is of all that is finished.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.conditioning import chain, chorales, images, ledgers, pendulum, picture
from benchmarks.conditioning.rows import Options, Row
from benchmarks.reporting import RESULTS, machine, report, write

# Another experiment is another file, and a line here.
EXPERIMENTS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "chain": chain.rows,
    "pendulum": pendulum.rows,
    "images": images.rows,
    "chorales": chorales.rows,
    "ledgers": ledgers.rows,
}
COLUMNS = ("experiment", "setting", "guide", "quantity", "nats", "standard error", "known")


def finished(name: str, options: Options) -> list[Row] | None:
    """The rows of an experiment that is done."""
    path = options.runs / f"{name}.json"
    return [Row(**row) for row in json.loads(path.read_text())] if path.exists() else None


def measured(name: str, options: Options) -> list[Row]:
    """The rows of an experiment, made where they are not there yet."""
    rows = finished(name, options)
    if rows is None:
        rows = list(EXPERIMENTS[name](options))
        text = json.dumps([asdict(row) for row in rows], indent=1)
        write(options.runs / f"{name}.json", text.encode())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", help=f"of {', '.join(EXPERIMENTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny runs, to see that it works")
    parser.add_argument("--runs", type=Path, default=Path("benchmarks/runs/conditioning"))
    parser.add_argument("--num_epochs", type=int, default=100, help="of 50 minibatches, for guides of simulated data")
    parser.add_argument("--num_test", type=int, default=2000, help="simulated datapoints that are measured")
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    names = arguments.pop("experiments") or list(EXPERIMENTS)
    if unknown := sorted({*names} - {*EXPERIMENTS}):
        parser.error(f"no experiment {unknown[0]}; there are {', '.join(EXPERIMENTS)}")
    options = Options(**arguments)
    if options.quick:
        options = Options(options.runs / "quick", True, 1, 16, options.seed)
    options.runs.mkdir(parents=True, exist_ok=True)
    for name in names:
        measured(name, options)
    rows = [row for name in EXPERIMENTS for row in finished(name, options) or []]
    report(
        "conditioning", "Conditioning gaps", COLUMNS, [list(asdict(row).values()) for row in rows], quick=options.quick
    )
    if any(row.quantity == picture.MEASURED for row in rows):
        figure = Figure(
            layout="constrained", figsize=(9, 3.6) if "pendulum" in {row.experiment for row in rows} else (5, 3.6)
        )
        picture.draw(rows, figure)
        figure.savefig((options.runs if options.quick else RESULTS) / "conditioning.png", dpi=200)
    print(machine())


if __name__ == "__main__":
    main()
