"""The figures of the paper that need no training, and the table of how far posteriors lie from each other."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.mapa import decoders, intuition, runs, trends
from benchmarks.mapa.posteriors import COLUMNS, distances
from benchmarks.mapa.runs import Options
from benchmarks.reporting import report


def figures(data_sets: Sequence[str], options: Options, folder: Path) -> None:
    """Draw them into `folder`, from the training data of the first draw; the trends and the table of `data_sets`."""
    crossing, folded = (runs.drawn(name, 0, options) for name in ("figure-8", "absolute-value"))
    save(folder / "mapa_intuition.png", (8.4, 4.6), lambda figure: intuition.draw(crossing, figure))
    save(folder / "mapa_decoders.png", (8.6, 6.2), lambda figure: decoders.draw(folded, figure))
    shown = {name: runs.drawn(name, 0, options) for name in data_sets}
    width = 2.1 * len(shown) + 0.6
    save(folder / "mapa_posteriors.png", (width, 4.6), lambda figure: trends.draw(shown, figure))
    rows = [row for name in shown for row in distances(name, shown[name])]
    title = "Total variation between posteriors over z, means over datapoints"
    report("mapa_posteriors", title, COLUMNS, rows, quick=options.quick)


def save(path: Path, size: tuple[float, float], draw: Callable[[Figure], None]) -> None:
    """A figure of `size` inches, drawn by `draw`, in the file `path`."""
    figure = Figure(layout="constrained", figsize=size)
    draw(figure)
    figure.savefig(path, dpi=200, bbox_inches="tight", pad_inches=0.05)
