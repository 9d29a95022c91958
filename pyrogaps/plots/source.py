"""The data of the plots: named arrays of a ledger or its saved groups."""

from typing import Annotated, Any, TypeAlias

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase

from pyrogaps.gaps.terms import TERMS, Mean, standard_error
from pyrogaps.settings import Limit

OWN = "own"
LINES = ["-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1))]
SHADES = ["#2f5d8c", "#c8641e", "#4b7a2b", "#8b5a9f", "#444444"]


def group(source: Any, *names: str) -> xr.Dataset:
    """The first of the groups `names` that `source` has, as a Dataset; empty where it has none of them."""
    for name in names:
        node = getattr(source, name, None)
        if isinstance(node, xr.DataTree):
            node = node.to_dataset()
        if isinstance(node, xr.Dataset):
            return node
    return xr.Dataset()


def per_datapoint(source: Any) -> xr.Dataset:
    """The per-datapoint group."""
    return group(source, "per_datapoint")


# A GapLedger, or anything with its groups.
Ledger: TypeAlias = Annotated[
    Any,
    Limit(
        "a GapLedger or a DataTree of one",
        lambda source: per_datapoint(source).data_vars,
        "Pass what decompose returned, or open a saved ledger with xarray.open_datatree",
    ),
]


def values(dataset: xr.Dataset, name: str, family: str | None = None) -> np.ndarray | None:
    """Variable `name` as an array, of one `family` where it has that dimension; None where it is missing or all NaN."""
    if name not in dataset:
        return None
    variable = dataset[name]
    if "family" in variable.dims:
        label = own_family(dataset) if family is None else family
        if label not in families(dataset):
            return None
        variable = variable.sel(family=label)
    array = np.asarray(variable.values, dtype=float)
    return array if np.isfinite(array).any() else None


def families(dataset: xr.Dataset) -> list[str]:
    """Names of the families that `dataset` compares, the guide's own first."""
    return [str(name) for name in dataset["family"].values] if "family" in dataset.coords else []


def own_family(dataset: xr.Dataset) -> str | None:
    """The family of the guide itself: "own" if present, else the first."""
    names = families(dataset)
    return OWN if OWN in names else names[0] if names else None


def gap_tree(source: Ledger) -> xr.Dataset:
    """The tree of gaps, one row per gap along "gap", as in a ledger.

    For a source without it: the gaps that have values per datapoint, with means over the finite values.
    """
    stored = group(source, "gaps")
    if stored.data_vars:
        return stored.isel(gap=np.isfinite(stored["mean"].values))
    dataset = per_datapoint(source)
    measured = [(term, array) for term in TERMS if (array := values(dataset, term.id)) is not None]
    means = [Mean(*mean_and_error(array), float("nan")) for _, array in measured]
    variables = {name: ("gap", [getattr(mean, name) for mean in means]) for name in Mean._fields}
    columns = ("label", "parent", "colour", "hatch")
    variables |= {name: ("gap", [getattr(term, name) or "" for term, _ in measured]) for name in columns}
    return xr.Dataset(variables, {"gap": [term.id for term, _ in measured]})


def mean_and_error(array: np.ndarray) -> tuple[float, float]:
    """Mean over datapoints and its standard error, over the finite values; the error of one value is NaN."""
    finite = array[np.isfinite(array)]
    return float(finite.mean()), standard_error(finite)


def with_error(mean: float, error: float) -> str:
    """`1.34 ± 0.05`, with a third decimal where the error needs it; the mean alone where there is no error."""
    decimals = 2 if not error < 0.01 else 3
    text = f"{mean:.{decimals}f}" + (f" ± {error:.{decimals}f}" if np.isfinite(error) else "")
    return text.replace("-", "\N{MINUS SIGN}")


def new_figure(width: float, height: float) -> Figure:
    """A pyplot figure, so that notebooks and `plt.show()` display it."""
    from matplotlib import pyplot

    return pyplot.figure(figsize=(width, height), layout="constrained")


def figure_of(ax: Axes) -> FigureBase:
    """The figure or subfigure that holds `ax`."""
    figure = ax.figure
    assert figure is not None
    return figure


def note(ax: Axes, text: str) -> None:
    """Show only `text` in the panel."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, text, ha="center", va="center", color="0.45", transform=ax.transAxes, wrap=True)


def tidy(ax: Axes) -> None:
    """Remove the box, and draw ticks and grid lines behind the data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
