"""Draw the pictures and print the texts of the pages: `python docs/pictures.py` writes them to `docs/pictures/`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

import pyrogaps as pg

DOCS = Path(__file__).parent
COLOURS = {term.id: term.colour for term in pg.TERMS}


@dataclass(frozen=True)
class Box:
    """A gap in the picture of the tree: its place, what it is and whose fault."""

    id: str
    x: float
    y: float
    title: str
    formula: str
    fault: str


BOXES = (
    Box("data_set_gap", 0, 3.0, "inference gap of the data set", "log p(x) − ELBO", ""),
    Box(
        "global_gap",
        1,
        5.0,
        "global gap",
        "KL(q(θ) ‖ p(θ|x))",
        "the guide's shared latents\n(only where there are any)",
    ),
    Box("inference_gap", 1, 2.6, "inference gap of a datapoint", "log p(x) − L[q]", "given θ, where there is one"),
    Box("approximation_gap", 2, 4.2, "approximation gap", "log p(x) − L[q*]", "the family cannot hold\nthe posterior"),
    Box(
        "conditioning_gap",
        2,
        2.6,
        "conditioning gap",
        "L[q*] − L[q*_C]",
        "the guide is not shown all of x\n(0 for ordinary VAEs)",
    ),
    Box("amortization_gap", 2, 1.0, "amortization gap", "L[q*_C] − L[q]", "one network for all x"),
    Box("capacity_gap", 3, 2.6, "capacity gap", "A_train(φ̂)", "the network cannot\ndo better"),
    Box("optimization_gap", 3, 1.0, "optimization gap", "L_train[φ̂] − L_train[φ]", "it is not trained\nto its end"),
    Box("generalization_gap", 3, -0.6, "generalization gap", "A_eval(φ) − A_train(φ)", "it does worse on\nnew data"),
)
EDGES = ((0, 1), (0, 2), (2, 3), (2, 4), (2, 5), (5, 6), (5, 7), (5, 8))


def tree() -> Figure:
    """All gaps, parents left of their parts, in the colours of `plot_gaps`."""
    figure, ax = plt.subplots(figsize=(11, 5.2), layout="constrained")
    places = [(2.9 * box.x, box.y) for box in BOXES]
    for parent, child in EDGES:
        (x0, y0), (x1, y1) = places[parent], places[child]
        ax.plot([x0 + 2.3, x0 + 2.6, x0 + 2.6, x1], [y0, y0, y1, y1], color="0.5", lw=1, zorder=0)
    for box, (x, y) in zip(BOXES, places, strict=True):
        fill = COLOURS[box.id]
        style = FancyBboxPatch((x, y - 0.6), 2.3, 1.2, "round,pad=0,rounding_size=0.1", fc=fill, ec="0.3", lw=0.8)
        ax.add_patch(style)
        dark = box.id in ("approximation_gap", "capacity_gap", "global_gap")
        ink = {"color": "white" if dark else "black", "ha": "center"}
        ax.text(x + 1.15, y + 0.33, box.title, weight="bold", fontsize=8.5, va="center", **ink)
        ax.text(x + 1.15, y + 0.06, box.formula, fontsize=8.5, va="center", **ink)
        ax.text(x + 1.15, y - 0.33, box.fault, fontsize=7.5, va="center", **ink)
    ax.set(xlim=(-0.1, 11.1), ylim=(-1.3, 5.7))
    ax.set_axis_off()
    return figure


def shared_guide(weights: Any, means: Any, precisions: Any) -> tuple[float, float, float]:
    """Mean and variance of the best guide that is not told which of several Normals is the posterior, and its gap.

    It is the renormalised product prod_i N(m_i, 1 / L_i)^w_i; its gap is sum_i w_i KL(q || N(m_i, 1 / L_i)), nats.
    """
    w, m, precision = (np.asarray(values, float) for values in (weights, means, precisions))
    total = float(w @ precision)
    mean = float(w @ (precision * m)) / total
    gap = 0.5 * (w @ (precision * m**2) - total * mean**2 + np.log(total) - w @ np.log(precision))
    return mean, 1 / total, float(gap)


def conditioning() -> Figure:
    """The best guide that is shown C alone: of two posteriors, near and far, and of a linear-Gaussian model."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.1), layout="constrained")
    z = np.linspace(-4.5, 4.5, 800)
    for ax, means in zip(axes, ([-0.5, 0.5], [-2.0, 2.0]), strict=False):
        precisions = [1.0, 4.0]
        mean, variance, gap = shared_guide([0.5, 0.5], means, precisions)
        posteriors = [normal(z, m, 1 / precision) for m, precision in zip(means, precisions, strict=True)]
        _densities(ax, z, posteriors, sum(posteriors) / 2, normal(z, mean, variance))
        ax.set_title(f"two posteriors, means {means[0]} and {means[1]}\nconditioning gap {gap:.2f} nats", fontsize=9)
    # z ~ N(0, 1), C and Cbar given z ~ N(z, 1), C = 1: filter N(1/2, 1/2), posteriors N((1 + Cbar) / 3, 1/3).
    quantiles = 0.5 + np.sqrt(1.5) * np.array([-1.28, -0.52, 0.0, 0.52, 1.28])
    posteriors = [normal(z, (1 + cbar) / 3, 1 / 3) for cbar in quantiles]
    _densities(axes[2], z, posteriors, normal(z, 0.5, 0.5), normal(z, 0.5, 1 / 3))
    axes[2].set_title("a linear-Gaussian model, C = 1\nconditioning gap 0.25 nats", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def normal(z: Any, mean: float, variance: float) -> Any:
    """The density of a Normal."""
    return np.exp(-0.5 * (z - mean) ** 2 / variance) / np.sqrt(2 * np.pi * variance)


def _densities(ax: Axes, z: Any, posteriors: list[Any], mixture: Any, best: Any) -> None:
    for number, density in enumerate(posteriors):
        label = "p(z | C, C̄), for several C̄" if number == 0 else None
        ax.fill_between(z, density, color="0.6", alpha=0.3, lw=0.8, label=label)
    ax.plot(z, mixture, "--", color="#2f5d8c", label="p(z | C), their mixture")
    ax.plot(z, best, color="#7fa650", lw=2, label="q*_C, the best guide that is shown C: their product")
    ax.set(yticks=[], xlabel="z", xlim=(z[0], z[-1]), ylim=(0, None))
    ax.spines[["top", "right", "left"]].set_visible(False)


def start_texts() -> dict[str, str]:
    """What the program of the start page prints, and its guide compared with the same one trained longer."""
    import pyro

    pyro.set_rng_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "start.md").read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {"__name__": "start"}
    exec(blocks[0] + blocks[1].replace("test)", "test, progress=False)"), names)
    before, pair, test = names["ledger"], (names["model"], names["guide"]), names["test"]
    texts = {"start-ledger.txt": str(before), "start-ledger-full.txt": str(before.table("full"))}
    texts["start-diagnosis.txt"] = str(before.diagnose())
    pg.train(*pair, names["train"], freeze_model=True, num_epochs=100, progress=False)
    after = pg.decompose(*pair, test, seed=1, progress=False)
    return {**texts, "comparison.txt": str(pg.compare({"after": after, "before": before}))}


def main() -> None:
    folder = DOCS / "pictures"
    for name, figure in {"tree": tree(), "conditioning": conditioning()}.items():
        figure.savefig(folder / f"{name}.png", dpi=110)
    for name, text in start_texts().items():
        (folder / name).write_text(f"{text}\n", "utf-8")


if __name__ == "__main__":
    main()
