"""`python -m benchmarks.mapa [DATA SETS]`: KL(p_GT || p) of models that MAPA, VAE and IWAE train on five curves.

Every method trains the same decoder on every draw of a data set from several starts, of which the one with the highest
log p(x) of validation data is taken; models trained by MAPA have their prior recovered first. `results/mapa.csv` has
means over draws, in nats, with their standard errors, and the passes and CPU seconds that training took;
`results/mapa.png` shows them. The paper's findings (arXiv:2403.08941) are judged from the table.

Three pictures need no training, and take half a minute:

- `results/mapa_intuition.png`: one datapoint's posterior over the others, by the true decoder and by a kernel on data;
- `results/mapa_posteriors.png`: true posteriors over z beside the empiricalized model's and MAPA's, and how far these
  are from each other in `results/mapa_posteriors.csv`;
- `results/mapa_decoders.png`: two decoders of the same data, under which MAPA's posterior is the same.

`--evaluate` holds the paper's estimate of log p(x), IWAE with a mixture of Gaussians, against quadrature, on one model
of each method: `results/mapa_evaluation.csv`. That takes about 20 seconds a model, the first time.

What is finished lies in `--runs`, a file for each training; a run that was stopped continues, several may share the
folder, and the table is of all that is finished.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from benchmarks.mapa import evaluation, picture, runs
from benchmarks.mapa.figures import figures, save
from benchmarks.mapa.findings import findings
from benchmarks.mapa.runs import COLUMNS, DATA_SETS, Options
from benchmarks.reporting import RESULTS, machine, report


def options_of(parser: argparse.ArgumentParser) -> tuple[list[str], bool, Options]:
    """The data sets to train on, whether to evaluate by IWAE too, and the rest of the command line."""
    parser.add_argument("data_sets", nargs="*", help=f"of {', '.join(DATA_SETS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny runs, to see that it works")
    parser.add_argument("--evaluate", action="store_true", help="hold IWAE's log p(x) against quadrature too")
    parser.add_argument("--runs", type=Path, default=Path("benchmarks/runs/mapa"))
    parser.add_argument("--draws", type=int, default=3, help="of each data set")
    parser.add_argument("--restarts", type=int, default=3, help="of each training")
    parser.add_argument("--num_steps", type=int, help="of a training (default: 4000 on spiral-dots, else 1200)")
    parser.add_argument("--num_train", type=int, default=500, help="datapoints, and as many to validate")
    parser.add_argument("--num_test", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    names, evaluate = arguments.pop("data_sets") or list(DATA_SETS), arguments.pop("evaluate")
    if unknown := sorted({*names} - {*DATA_SETS}):
        parser.error(f"no data set {unknown[0]}; there are {', '.join(DATA_SETS)}")
    for name in ("draws", "restarts", "num_steps", "num_train", "num_test"):
        if arguments[name] is not None and arguments[name] < 1:
            parser.error(f"--{name} must be at least 1, got {arguments[name]}")
    options = Options(**arguments)
    if options.quick:
        options = Options(options.runs / "quick", True, min(2, options.draws), 1, 20, 200, 50, options.seed)
    return names, evaluate, options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names, evaluate, options = options_of(parser)
    for name in names:
        data = {draw: runs.drawn(name, draw, options) for draw in range(options.draws)}
        for job in tqdm(list(runs.jobs(name, options)), desc=name, unit="training"):
            runs.measure(job, data[job.draw], options)
    best = runs.best_runs(options)
    table = runs.summary(best)
    rows = table.astype(object).where(table.notna(), None).to_numpy().tolist()
    report("mapa", "KL(p_GT || p) in nats, means over draws", COLUMNS, rows, quick=options.quick)
    folder = options.runs if options.quick else RESULTS
    width = 2.5 * table["data set"].nunique() + 0.6
    save(folder / "mapa.png", (width, 4.8), lambda figure: picture.draw(table, figure))
    print("", *findings(best, table), machine(), sep="\n")
    # Nothing is trained for these: all the data sets, unless this is to see that it works.
    figures(names if options.quick else DATA_SETS, options, folder)
    if evaluate:
        rows = list(tqdm(evaluation.evaluations(best, options), desc="evaluation", unit="model"))
        title = "Mean log p(x) of test data in nats, by quadrature and by IWAE"
        report("mapa_evaluation", title, evaluation.COLUMNS, rows, quick=options.quick)


if __name__ == "__main__":
    main()
