"""`python -m benchmarks.mapa_images`: models of digits trained by VAE, IWAE, MAPA and MAPA with its entropy.

Every method trains the same decoder and encoder for the same CPU time, that of MAPA's posterior included, on
scikit-learn's digits and on MNIST, in latent spaces of two and ten dimensions. MAPA alone ends without a guide and
without a prior: its prior is recovered, and a guide trained afterwards, for as long again. Every model is then taken
apart on test images, with the amortized Normal that it ends with: log p(x) by AIS (in two dimensions by quadrature as
well), and which gaps such a guide pays. `results/mapa_images.csv` has means over images in nats.

What is finished lies in `--runs`; a run that was stopped continues.
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import pyrogaps as pg
from benchmarks.mapa_images.training import METHODS, Cost, Task, trained
from benchmarks.reporting import kept_ledger, machine, report
from pyrogaps.datasets import MNIST, Digits
from pyrogaps.log_weights import mcse_of_mean

GAPS = ("inference_gap", "approximation_gap", "amortization_gap")
COLUMNS = (
    *("data set", "latent dim", "method", "log p(x)", "s.e.", "MCSE", "log p(x) by quadrature", "minus VAE's", "s.e. "),
    *(name for gap in ("inference", "approximation", "amortization") for name in (f"{gap} gap", f"{gap} MCSE")),
    *("steps", "epochs", "decoded per datapoint and step"),
)


@dataclass(frozen=True)
class Options:
    """Where runs lie, how long trainings last and how many images are evaluated."""

    runs: Path
    quick: bool
    minutes: float
    num_images: int
    latents: tuple[int, ...] | None
    seed: int


def tasks(name: str, options: Options) -> tuple[Tensor, list[Task]]:
    """The test images of a data set, and what is trained on it."""
    if name == "digits":
        data = Digits(num_train=200 if options.quick else None)
        seconds, dims, hidden = 60.0 * min(1.0, options.minutes), (2, 8), (128,)
    else:
        data = MNIST(binarisation="stochastic", num_train=500 if options.quick else None)
        seconds, dims, hidden = 60.0 * options.minutes, (2, 10), (200, 200)
    images = data.train.flatten(1)
    found = [Task(images, dim, hidden, seconds) for dim in options.latents or dims]
    return data.test.flatten(1)[: options.num_images], found


def ledger_of(model: nn.Module, guide: nn.Module, x: Tensor, path: Path, options: Options) -> pg.GapLedger:
    """The gaps of the guide on `x`."""
    evidence = pg.AIS(num_chains=16, num_temperatures=60, num_leapfrog=5)
    refinement = pg.Refinement(num_steps=300, num_starts=4)
    if options.quick:
        evidence, refinement = pg.AIS(2, 4, 2), pg.Refinement(num_steps=5)
    return kept_ledger(
        path, lambda: pg.decompose(model, guide, x, evidence=evidence, refinement=refinement, num_particles=500)
    )


def exact_evidence(model: nn.Module, guide: nn.Module, x: Tensor, options: Options) -> Tensor:
    """log p(x) `(N,)` by quadrature over two latent dimensions, nats."""
    grid = pg.posterior_grid(model, {"guide": guide}, x, num_points=30 if options.quick else 200, progress=False)
    return torch.from_numpy(grid["log_evidence"].values)


def row(ledger: pg.GapLedger, exact: Tensor | None, against: Tensor, cost: Cost) -> list[object]:
    """A line of the table, but for its first cells."""
    datapoints = ledger.per_datapoint
    evidence = torch.from_numpy(datapoints["log_evidence"].values)
    summary = ledger.summary()
    compared = evidence if exact is None else exact
    margin = compared - against
    return [
        *(summary.loc["log_evidence", name] for name in ("mean", "standard_error", "mcse")),
        None if exact is None else float(exact.mean()),
        *(float(margin.mean()), float(mcse_of_mean(margin))),
        *(summary.loc[gap, name] for gap in GAPS for name in ("mean", "mcse")),
        *(cost.steps, cost.epochs, cost.decoder_passes),
    ]


def rows_of(name: str, options: Options) -> list[list[object]]:
    """Train and take apart every model of a data set."""
    x, chosen = tasks(name, options)
    rows = []
    for task in chosen:
        vae: Tensor | None = None
        for method in METHODS:
            folder = options.runs / f"{name}-{task.latent_dim}-{options.minutes:g}-minutes-seed-{options.seed}"
            model, guide, cost = trained(method, task, folder / f"{method}.pt", options.seed)
            ledger = ledger_of(model, guide, x, folder / f"{method}-{len(x)}.nc", options)
            exact = None
            if task.latent_dim == 2:
                exact = exact_evidence(model, guide, x, options)
            found = torch.from_numpy(ledger.per_datapoint["log_evidence"].values) if exact is None else exact
            vae = found if vae is None else vae
            rows.append([name, task.latent_dim, method, *row(ledger, exact, vae, cost)])
            print(name, task.latent_dim, method, f"log p(x) {float(found.mean()):.2f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_sets", nargs="*", help="of digits, mnist (default: both)")
    parser.add_argument("--quick", action="store_true", help="tiny runs, to see that it works")
    parser.add_argument("--runs", type=Path, default=Path("benchmarks/runs/mapa_images"))
    parser.add_argument(
        "--minutes", type=float, default=3.0, help="CPU time of a training on MNIST; on digits 1 at most"
    )
    parser.add_argument("--latents", type=int, nargs="+", help="dimensions (default: 2, and 8 or 10)")
    parser.add_argument("--num_images", type=int, default=200, help="test images that are evaluated")
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    names = arguments.pop("data_sets") or ["digits", "mnist"]
    if unknown := sorted({*names} - {"digits", "mnist"}):
        parser.error(f"no data set {unknown[0]}; there are digits and mnist")
    options = Options(**arguments)
    if options.quick:
        options = replace(options, runs=options.runs / "quick", minutes=0.003, num_images=4)
    rows = [line for name in names for line in rows_of(name, options)]
    report(
        "mapa_images", "Models of digits after the same CPU time, nats per image", COLUMNS, rows, quick=options.quick
    )
    print(machine())


if __name__ == "__main__":
    main()
