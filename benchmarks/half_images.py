"""Posteriors of half-seen images: what the lower half might be, and the best posterior for all that it might be.

`python -m benchmarks.half_images` takes the model of the recipe mnist-2d, trained by `benchmarks.two_dimensions`, and
an encoder that is shown the upper half of an image; takes the inference gap of 200 test images apart; chooses four of
them by their conditioning gaps (no picture was looked at), and draws for each its completions by the model, p(z|x), the
best Normal for x, q*_C, the best Normal of a guide that sees the upper half, and what the encoder made of it:
`results/half_images.png`, with the numbers in `results/half_images.csv`. A run that was stopped continues.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

import pyrogaps as pg
from benchmarks.conditioning.images import half_guide
from benchmarks.conditioning.rows import Options
from benchmarks.inference_suboptimality import column_recipe, trained
from benchmarks.reporting import RESULTS, kept_ledger, machine, report
from pyrogaps.conditioning.posterior import SharedPosterior

MODEL, NUM_IMAGES, NUM_SHOWN = "mnist-2d", 200, 6
FULL, SHARED, AMORTIZED = "best Normal for x", "best Normal for C", "amortized, sees C"
GAPS = ("inference_gap", "approximation_gap", "conditioning_gap", "amortization_gap")


def chosen(ledger: pg.GapLedger) -> dict[int, str]:
    """Four datapoints and why: the largest conditioning gap, the upper quartile, the median and the least."""
    gap = ledger.per_datapoint["conditioning_gap"].values
    order, last = np.argsort(gap), len(gap) - 1
    places = {"largest gap": last, "upper quartile": 3 * last // 4, "median": last // 2, "least gap": 0}
    return {int(order[place]): why for why, place in places.items()}


def draw_completions(figure: SubFigure, x: Tensor, shared: SharedPosterior, shown: Tensor, headings: list[str]) -> None:
    """A row for each image: the image, and completions of its upper half, the lower half in another colour."""
    axes = figure.subplots(len(x), NUM_SHOWN + 1, squeeze=False)
    for number, row in enumerate(axes):
        (drawn, *_), _ = shared.completions(number)
        for place, (ax, image) in enumerate(zip(row, [x[number], *drawn[:NUM_SHOWN]], strict=True)):
            grey = 1 - image.double().numpy()
            colour = np.stack([grey] * 3, -1)
            if place:
                colour[~shown.numpy()] = 1 - (1 - grey[~shown.numpy(), None]) * (1 - np.array([0.18, 0.4, 0.66]))
            ax.imshow(colour, interpolation="nearest")
            ax.axhline(shown.shape[0] / 2 - 0.5, color="#c8641e", lw=0.8)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_color("0.7")
        row[0].set_ylabel(headings[number], fontsize=8)
    axes[0, 0].set_title("x", fontsize=9)
    axes[0, 1].set_title("completions by the model", fontsize=9, loc="left")


def table(ledger: pg.GapLedger, grid: xr.Dataset, choice: dict[int, str]) -> tuple[list[str], list[list[object]]]:
    """The gaps of the four images by the ledger, and the two that the grid knows without noise."""
    rows: list[list[object]] = []
    for position, (index, why) in enumerate(choice.items()):
        gaps, cell = ledger.per_datapoint.sel(datapoint=index), grid.isel(datapoint=position)
        exact = {name: float(cell["gap"].sel(posterior=name)) for name in (FULL, SHARED, AMORTIZED)}
        measured = [float(gaps[f"{gap}{suffix}"]) for gap in GAPS for suffix in ("", "_mcse")]
        known = [exact[AMORTIZED], exact[FULL], exact[SHARED] - exact[FULL], exact[AMORTIZED] - exact[SHARED]]
        rows.append([why, index, int(cell["num_modes"].isel(posterior=0)), *measured, *known])
    names = [f"{gap}{suffix}" for gap in GAPS for suffix in ("", " mcse")]
    return ["chosen for", "image", "modes", *names, *(f"{gap}, quadrature" for gap in GAPS)], rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--runs", type=Path, default=Path("benchmarks/runs/half_images"))
    parser.add_argument("--model", type=Path, default=Path("benchmarks/runs/two_dimensions"), help="its run")
    options = parser.parse_args()
    number, settings = NUM_IMAGES, pg.Conditioning(tolerance=0.5)
    if options.quick:
        options.runs, number, settings = options.runs / "quick", 8, pg.Conditioning(16, 16)
        options.model = options.runs / "model"
    recipe = column_recipe(MODEL, 1 if options.quick else None)
    model, _, data = trained(recipe, options.model, progress=True)
    guide = half_guide(recipe, model, data, options.runs, Options(options.runs, options.quick, 1, number, 0))
    assert isinstance(data.evaluated, Tensor)
    x = data.evaluated[:number]
    how = {"evidence": recipe.evidence, "refinement": recipe.refinement, "num_particles": recipe.num_particles}
    ledger = kept_ledger(
        options.runs / f"ledger-{number}.nc",
        lambda: pg.decompose(model, guide, x, conditioning=settings, cache=options.runs / "parts", **how),
    )
    print(ledger)

    choice = chosen(ledger)
    some = x[torch.tensor(list(choice))]
    shared = pg.shared_posterior(model, guide, some, settings=settings, **how)
    full = pg.refine(model, guide, some, settings=recipe.refinement)
    grid = pg.posterior_grid(model, {FULL: full, SHARED: shared.guides[0], AMORTIZED: guide}, some)
    columns, rows = table(ledger, grid, choice)
    report("half_images", "Four half-seen test images (nats)", columns, rows, quick=options.quick)
    figure = Figure(layout="constrained", figsize=(8.6, 12.5))
    above, below = figure.subfigures(2, 1, height_ratios=[4.5, 8])
    draw_completions(above, some, shared, guide.conditions(some), [f"#{n}\n{why}" for n, why in choice.items()])
    pg.plot_posteriors(grid.assign_coords(datapoint=list(choice), label=("datapoint", list(choice.values()))), below)
    figure.savefig((options.runs if options.quick else RESULTS) / "half_images.png", dpi=160)
    print(machine())


if __name__ == "__main__":
    main()
