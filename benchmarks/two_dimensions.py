"""Posteriors in a two-dimensional latent space, the picture of Cremer, Li and Duvenaud (arXiv:1801.03558), anew.

`python -m benchmarks.two_dimensions` trains the recipe mnist-2d, takes the inference gap of its test images apart,
chooses four of them by their gaps (no picture was looked at), and draws for each the true posterior, the amortized
guide, the best mean-field guide and the best flow: `results/two_dimensions.png`, with the numbers in
`results/two_dimensions.csv`. In two dimensions log p(x) is known by quadrature, so AIS is held against it. A run that
was stopped continues from what lies in `--runs`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from scipy.optimize import minimize
from torch import Tensor

import pyrogaps as pg
from benchmarks.inference_suboptimality import column_recipe, decomposed, trained
from benchmarks.reporting import RESULTS, kept_ledger, machine, report
from pyrogaps.cli.building import build_families
from pyrogaps.cli.recipe import Recipe
from pyrogaps.density.runs import Program
from pyrogaps.problem import Problem
from pyrogaps.refine import RefinedGuide, Refiner, own_family
from pyrogaps.refine.own import start_of
from pyrogaps.run import Run
from pyrogaps.streams import Chunk

AMORTIZED, MEAN_FIELD, FLOW = "amortized FFG", "optimal FFG", "optimal flow"
WORST_AMORTIZED, WORST_APPROXIMATED, TYPICAL = "largest amortization gap", "largest approximation gap", "typical"


def best_mean_field(cell: xr.Dataset, num_starts: int = 12) -> float:
    """The least KL(q || p(z|x)) of any Normal with independent coordinates, nats: the exact approximation gap.

    By quadrature on the grid and from several starts, so that the optimum of refinement, a local one, can be judged.
    """
    axes = (cell["grid_1"].values, cell["grid_2"].values)
    density = cell["density"].isel(posterior=0).values
    log_p = np.log(np.maximum(density, 1e-300))
    spacing = np.array([axis[1] - axis[0] for axis in axes])
    extent = np.array([axis[-1] - axis[0] for axis in axes])

    def loss(parameters: np.ndarray) -> float:
        scale = np.clip(np.exp(np.minimum(parameters[2:], 50.0)), spacing, extent)  # beyond, the grid is blind
        first, second = (
            np.exp(-0.5 * ((axis - loc) / s) ** 2) + 1e-300
            for axis, loc, s in zip(axes, parameters[:2], scale, strict=True)
        )
        energy = (first / first.sum()) @ log_p @ (second / second.sum())
        return float(-energy - np.log(2 * np.pi * np.e) - np.log(scale).sum())

    weights = density.ravel() / density.sum()
    draws = np.random.default_rng(0).choice(len(weights), num_starts, p=weights)
    starts = np.stack([axis[k] for axis, k in zip(axes, np.unravel_index(draws, density.shape), strict=True)], 1)
    log_scale = np.log(starts.std(0) + spacing) - 1
    return min(
        float(minimize(loss, [*start, *log_scale], method="Nelder-Mead", options={"xatol": 1e-3, "fatol": 1e-4}).fun)
        for start in starts
    )


def chosen(model: Program, x: Tensor, ledger: pg.GapLedger) -> dict[int, str]:
    """Four datapoints and why: the two worst, and the two nearest to the median of both gaps.

    Refinement climbs to a local optimum, so a large approximation gap can be the optimizer's and not the family's: the
    largest is taken among images where it is, by quadrature, the best mean-field guide that was found.
    """
    gaps = ledger.per_datapoint
    amortization, approximation = gaps["amortization_gap"].values, gaps["approximation_gap"].values
    settled = gaps["converged"].values.all(1)
    worst = int(np.argmax(np.where(settled, amortization, -np.inf)))
    choice = {worst: WORST_AMORTIZED}
    order = [int(n) for n in np.argsort(np.where(settled, -approximation, np.inf)) if n != worst]
    choice[_largest_of_the_family(model, x, ledger, order)] = WORST_APPROXIMATED
    both = np.stack([amortization, approximation])
    median = np.median(both[:, settled], 1, keepdims=True)
    deviation = np.median(np.abs(both[:, settled] - median), 1, keepdims=True)
    distance = (((both - median) / deviation) ** 2).sum(0)
    typical = [n for n in np.argsort(np.where(settled, distance, np.inf)) if n not in choice]
    return choice | {int(n): TYPICAL for n in typical[:2]}


def _largest_of_the_family(model: Program, x: Tensor, ledger: pg.GapLedger, order: list[int], number: int = 40) -> int:
    """Of the first datapoints of `order`, the one whose approximation gap is the largest by quadrature.

    Where a mean-field guide exists that is better by a tenth of a nat, the gap is not the family's: it is passed over.
    """
    elbo = ledger.per_datapoint["elbo_refined"].sel(family="own").values
    candidates = order[:number]
    grid = pg.posterior_grid(model, {}, x, datapoints=candidates, num_points=100)
    found = grid["log_evidence"].values - elbo[candidates]
    exact = np.array([best_mean_field(grid.isel(datapoint=position)) for position in range(len(candidates))])
    best = found - exact < 0.1
    print(f"of {len(candidates)} candidates, {int((~best).sum())} have a better mean-field guide and are passed over")
    if not best.any():
        raise SystemExit("no refined guide is the best of its family")
    return candidates[int(np.argmax(np.where(best, found, -np.inf)))]


def refined(recipe: Recipe, model: Program, guide: Program, x: Tensor) -> dict[str, RefinedGuide]:
    """The best mean-field guide and the best flow of every image, found as `decompose` finds them."""
    problem = Problem.of(model, guide, x)
    joint, chunk, run = problem.joint, Chunk(0, len(x)), Run(recipe.seed)
    of_own = Refiner(own_family(problem.guide_density()), recipe.refinement)
    own, own_progress = of_own(problem.evaluator, chunk, run)
    of_flow = Refiner(build_families(recipe)["flow"], recipe.refinement)
    flow, flow_progress = of_flow(problem.evaluator, chunk, run, "flow", start_of(own, chunk, run))
    return {
        MEAN_FIELD: RefinedGuide(joint, [chunk], [own], [own_progress]),
        FLOW: RefinedGuide(joint, [chunk], [flow], [flow_progress]),
    }


def with_ledger(grid: xr.Dataset, ledger: pg.GapLedger, choice: dict[int, str]) -> xr.Dataset:
    """The grid under the test set's own indices, its gaps those of the ledger."""
    gaps = ledger.per_datapoint.sel(datapoint=list(choice))
    flow = gaps.sel(family="flow")
    columns = {
        "gap": (gaps["inference_gap"], gaps["approximation_gap"], flow["family_approximation_gap"]),
        "gap_mcse": (gaps["inference_gap_mcse"], gaps["approximation_gap_mcse"], flow["family_approximation_gap_mcse"]),
    }
    exact = np.full(len(choice), np.nan)
    variables = {
        name: (("datapoint", "posterior"), np.stack([exact, *(c.values for c in column)], 1))
        for name, column in columns.items()
    }
    return grid.assign(variables).assign_coords(
        datapoint=list(choice), label=("datapoint", [_sentence(n, why, grid) for n, why in enumerate(choice.values())])
    )


def _sentence(position: int, why: str, grid: xr.Dataset) -> str:
    number = int(grid["num_modes"].isel(datapoint=position, posterior=0))
    return why if number == 1 else f"{why}, {number} modes"


def table(grid: xr.Dataset, ledger: pg.GapLedger, choice: dict[int, str]) -> tuple[list[str], list[list[object]]]:
    """What is known of the four images: `grid` as `posterior_grid` made it."""
    rows = []
    for position, (index, why) in enumerate(choice.items()):
        gaps, cell = ledger.per_datapoint.sel(datapoint=index), grid.isel(datapoint=position)
        exact, ais, error = (float(v) for v in (cell["log_evidence"], gaps["log_evidence"], gaps["log_evidence_mcse"]))
        row: list[object] = [why, index, int(cell["num_modes"].isel(posterior=0)), exact, ais, error]
        row.append((ais - exact) / error)
        measured = [gaps["approximation_gap"], gaps["amortization_gap"], gaps["inference_gap"]]
        errors = [gaps["approximation_gap_mcse"], gaps["amortization_gap_mcse"], gaps["inference_gap_mcse"]]
        measured.append(gaps["family_approximation_gap"].sel(family="flow"))
        errors.append(gaps["family_approximation_gap_mcse"].sel(family="flow"))
        for value, mcse in zip(measured, errors, strict=True):
            row += [float(value), float(mcse)]
        row += [*(float(gap) for gap in cell["gap"].values[1:]), best_mean_field(cell)]
        rows.append(row)
    named = [
        f"{name}{suffix}" for name in ("approximation", "amortization", "inference", "flow") for suffix in ("", " mcse")
    ]
    columns = ["chosen for", "image", "modes", "log p, quadrature", "AIS", "AIS mcse", "difference / mcse", *named]
    quadrature = [f"{name}, quadrature" for name in (AMORTIZED, MEAN_FIELD, FLOW, "best mean-field")]
    return [*columns, *quadrature], rows


def check(model: Program, x: Tensor, ledger: pg.GapLedger) -> None:
    """Print how the ledger's log p(x) and approximation gap compare with quadrature on the images `x`, its first."""
    grid, gaps = pg.posterior_grid(model, {}, x, num_points=100), ledger.per_datapoint.isel(datapoint=slice(len(x)))
    difference = gaps["log_evidence"].values - grid["log_evidence"].values
    errors = difference / gaps["log_evidence_mcse"].values
    several = grid["num_modes"].values[:, 0] > 1
    print(f"\nAIS - quadrature on {len(x)} images, {several.sum()} of them with several modes")
    for name, some in (("one mode", ~several), ("several modes", several)):
        if some.any():
            print(
                f"  {name}: mean {difference[some].mean():.4f} nats, root mean square "
                f"{np.sqrt((difference[some] ** 2).mean()):.4f}; in its own standard errors root mean square "
                f"{np.sqrt((errors[some] ** 2).mean()):.2f}, beyond four of them {(np.abs(errors[some]) > 4).sum()}"
            )
    worst = np.argsort(-np.abs(errors))[:3]
    print("  worst images: " + ", ".join(f"#{n} {difference[n]:.3f} ({errors[n]:.1f})" for n in worst))
    exact = np.array([best_mean_field(grid.isel(datapoint=n)) for n in range(len(x))])
    found = grid["log_evidence"].values - gaps["elbo_refined"].sel(family="own").values
    short = found - exact
    print(
        f"approximation gap of the mean-field family: {found.mean():.3f} nats by refinement, {exact.mean():.3f} by "
        f"quadrature from many starts; refinement is more than 0.2 nats short on {(short > 0.2).sum()} images"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--runs", type=Path, default=Path("benchmarks/runs/two_dimensions"))
    parser.add_argument("--num_epochs", type=int, help="in place of the recipe's own")
    parser.add_argument("--images", type=int, default=1000, help="test images to choose from")
    parser.add_argument("--checked", type=int, default=100, help="images on which AIS is held against quadrature")
    options = parser.parse_args()
    if options.quick:
        options.runs, options.num_epochs, options.images, options.checked = options.runs / "quick", 1, 64, 8
    recipe = column_recipe("mnist-2d", options.num_epochs)
    model, guide, data = trained(recipe, options.runs, progress=True)
    assert isinstance(data.evaluated, Tensor)
    x = data.evaluated[: options.images]
    ledger = kept_ledger(
        options.runs / f"ledger-{len(x)}.nc",
        lambda: decomposed(recipe, model, guide, x, cache=options.runs / f"parts-{len(x)}"),
    )
    print(ledger)

    choice = chosen(model, x, ledger)
    some = x[torch.tensor(list(choice))]
    grid = pg.posterior_grid(model, {AMORTIZED: guide, **refined(recipe, model, guide, some)}, some)
    columns, rows = table(grid, ledger, choice)
    report("two_dimensions", "Four test images (nats)", columns, rows, quick=options.quick)
    figure = Figure(layout="constrained", figsize=(8.2, 9.3))
    pg.plot_posteriors(with_ledger(grid, ledger, choice), figure)
    figure.savefig((options.runs if options.quick else RESULTS) / "two_dimensions.png", dpi=200)

    check(model, x[: options.checked], ledger)
    print(machine())


if __name__ == "__main__":
    main()
