"""`python -m benchmarks.mapa [DATA SETS]`: KL(p_GT || p) of models that MAPA, VAE and IWAE train on five curves.

Every method trains the same decoder on every draw of a data set from several starts, of which the one with the highest
log p(x) of validation data is taken; models trained by MAPA have their prior recovered first. `results/mapa.csv` has
means over draws, in nats, with their standard errors, and the passes and CPU seconds that training took;
`results/mapa.png` shows them. The paper's findings (arXiv:2403.08941) are judged from the table.

What is finished lies in `--runs`, a file for each training; a run that was stopped continues, several may share the
folder, and the table is of all that is finished.
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.mapa import picture, runs
from benchmarks.mapa.findings import findings
from benchmarks.mapa.runs import COLUMNS, DATA_SETS, Options
from benchmarks.reporting import RESULTS, machine, report


def options_of(parser: argparse.ArgumentParser) -> tuple[list[str], Options]:
    """The data sets to train on, and the rest of the command line."""
    parser.add_argument("data_sets", nargs="*", help=f"of {', '.join(DATA_SETS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny runs, to see that it works")
    parser.add_argument("--runs", type=Path, default=Path("benchmarks/runs/mapa"))
    parser.add_argument("--draws", type=int, default=3, help="of each data set")
    parser.add_argument("--restarts", type=int, default=3, help="of each training")
    parser.add_argument("--num_steps", type=int, default=1200, help="of a training, on minibatches of 100")
    parser.add_argument("--num_train", type=int, default=500, help="datapoints, and as many to validate")
    parser.add_argument("--num_test", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    names = arguments.pop("data_sets") or list(DATA_SETS)
    if unknown := sorted({*names} - {*DATA_SETS}):
        parser.error(f"no data set {unknown[0]}; there are {', '.join(DATA_SETS)}")
    for name in ("draws", "restarts", "num_steps", "num_train", "num_test"):
        if arguments[name] < 1:
            parser.error(f"--{name} must be at least 1, got {arguments[name]}")
    options = Options(**arguments)
    if options.quick:
        options = Options(options.runs / "quick", True, min(2, options.draws), 1, 20, 200, 50, options.seed)
    return names, options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names, options = options_of(parser)
    for name in names:
        data = {draw: runs.drawn(name, draw, options) for draw in range(options.draws)}
        for job in tqdm(list(runs.jobs(name, options)), desc=name, unit="training"):
            runs.measure(job, data[job.draw], options)
    best = runs.best_runs(options)
    table = runs.summary(best)
    rows = table.astype(object).where(table.notna(), None).to_numpy().tolist()
    report("mapa", "KL(p_GT || p) in nats, means over draws", COLUMNS, rows, quick=options.quick)
    figure = Figure(layout="constrained", figsize=(2.5 * table["data set"].nunique() + 0.6, 4.8))
    picture.draw(table, figure)
    figure.savefig((options.runs if options.quick else RESULTS) / "mapa.png", dpi=200)
    print("", *findings(best, table), machine(), sep="\n")


if __name__ == "__main__":
    main()
