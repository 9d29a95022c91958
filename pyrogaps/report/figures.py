"""The interactive figures, by Bokeh: the tree of gaps, the scatter of datapoints, traces."""

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
from bokeh.models import BoxZoomTool, ColumnDataSource, HoverTool, PanTool, Range1d, ResetTool, SaveTool, WheelZoomTool
from bokeh.plotting import figure
from matplotlib.colors import to_hex

from pyrogaps.gaps import GapLedger
from pyrogaps.gaps.table import family_name
from pyrogaps.gaps.terms import combined_error
from pyrogaps.plots.gaps import Bar, bars_of, pieces_of
from pyrogaps.plots.source import SHADES, families, values, with_error
from pyrogaps.plots.traces import ANNEALING

# The page's script puts the colours of the light or dark scheme in place of these.
INK, MUTED, FAINT, PAPER, ACCENT, WARNING = (f"#0102{number:02x}" for number in range(6))
# Patterns of matplotlib that Bokeh has too.
HATCHES = set("./\\x|-+o*")
DASHES = ["solid", "dashed", "dotted", "dashdot", "dotdash"]
MAX_LABEL = 30
MATHS = ("$$", "\\(", "\\[")


def tree_figure(ledger: GapLedger) -> Any:
    """The bars of `plot_gaps`, each with one standard error; None where no gap is finite."""
    bars = bars_of(ledger)
    if not bars:
        return None
    pieces = [(row, bar, piece) for row, bar in enumerate(bars) for piece in pieces_of(bar, bars)]
    ends = [(bar.start + bar.length, error_of(bar)) for bar in bars]
    low, high = min(0.0, *(end - error for end, error in ends)), max(0.0, *(end + error for end, error in ends))
    room = 0.04 * ((high - low) or 1.0)
    plot = new_figure(
        name="tree",
        height=74 + 34 * len(bars),
        x_range=Range1d(low - room * (low < 0), high + room),
        y_range=Range1d(len(bars) - 0.5, -0.5),
        x_axis_label="nats below log p(x)",
        output_backend="svg",
        toolbar_location=None,
    )
    source = ColumnDataSource(
        {
            "row": [row for row, _, _ in pieces],
            "left": [piece.start for _, _, piece in pieces],
            "right": [piece.start + piece.length for _, _, piece in pieces],
            "colour": [to_hex(piece.colour) for _, _, piece in pieces],
            "hatch": [_hatch(piece.hatch) for _, _, piece in pieces],
            "label": [bar.label.strip() for _, bar, _ in pieces],
            "size": [f"{with_error(bar.length, error_of(bar))} nats" for _, bar, _ in pieces],
        }
    )
    drawn = plot.hbar(
        y="row",
        left="left",
        right="right",
        height=0.62,
        source=source,
        fill_color="colour",
        line_color=MUTED,
        hatch_pattern="hatch",
        hatch_color="#333333",
        hatch_alpha=0.6,
        hatch_scale=8,
    )
    plot.add_tools(HoverTool(renderers=[drawn], tooltips=[("gap", "@label"), ("size", "@size")]))
    _whiskers(plot, ends)
    plot.segment(x0=[0], x1=[0], y0=[-0.5], y1=[len(bars) - 0.5], line_color=INK)
    rows = [*range(len(bars))]
    labels = {row: _label(bar) for row, bar in enumerate(bars)}
    plot.yaxis[0].update(ticker=rows, major_label_overrides=labels, axis_line_color=None, major_tick_line_color=None)
    plot.ygrid[0].update(grid_line_color=None)
    return plot


def error_of(bar: Bar) -> float:
    """The standard error over datapoints and draws together, nats; 0 where there is none."""
    return combined_error(bar.error, np.nan_to_num(bar.mcse))


def _whiskers(plot: Any, ends: Sequence[tuple[float, float]]) -> None:
    """The ends of the bars, each with its error, in a pale outline that shows on every colour."""
    at = [*range(len(ends))]
    low, high = [end - error for end, error in ends], [end + error for end, error in ends]
    for colour, width in (("#ffffff", 4), ("#111111", 1.5)):
        plot.segment(x0=low, x1=high, y0=at, y1=at, line_color=colour, line_width=width)
        for side in (low, high):
            heights = [row - 0.12 for row in at], [row + 0.12 for row in at]
            plot.segment(x0=side, x1=side, y0=heights[0], y1=heights[1], line_color=colour, line_width=width)


def _label(bar: Bar) -> str:
    """Of a row; parts are set in from the whole by spaces that do not collapse."""
    text = bar.label if len(bar.label) <= MAX_LABEL else f"{bar.label[: MAX_LABEL - 1]}…"
    return as_text(text.replace(" ", "\N{NO-BREAK SPACE}"))


def as_text(text: str) -> str:
    """`text` as it is, for a place where Bokeh would read TeX between $$ and the like, and fetch what draws it."""
    for start in MATHS:
        text = text.replace(start, f"{start[0]}\N{WORD JOINER}{start[1]}")
    return text


def _hatch(pattern: str) -> str:
    return pattern[0] if pattern and pattern[0] in HATCHES else " "


def scatter_figure(number: int) -> Any:
    """Two quantities of each of `number` datapoints, which the page's script fills in from the table."""
    opacity, size = float(np.clip(40 / np.sqrt(number), 0.2, 0.6)), 7 if number <= 2000 else 5
    zoom = BoxZoomTool()
    plot = new_figure(
        name="scatter",
        height=430,
        x_range=Range1d(0, 1, name="x"),
        y_range=Range1d(0, 1, name="y"),
        tools=[PanTool(), zoom, WheelZoomTool(), ResetTool(), SaveTool()],
        active_drag=zoom,
        toolbar_location="above",
    )
    errors = ColumnDataSource({"x0": [], "x1": [], "y0": [], "y1": []}, name="errors")
    plot.segment("x0", "y0", "x1", "y1", source=errors, line_color=FAINT, line_width=1)
    empty: dict[str, list[Any]] = {"x": [], "y": [], "tip": []}
    trusted, flagged = ColumnDataSource(empty, name="trusted"), ColumnDataSource(dict(empty), name="flagged")
    circles = plot.scatter("x", "y", source=trusted, size=size, color=ACCENT, alpha=opacity, line_color=None)
    crosses = plot.scatter(
        "x", "y", source=flagged, size=8, marker="x", line_color=WARNING, line_width=2, line_alpha=0.8
    )
    chosen = ColumnDataSource({"x": [], "y": []}, name="chosen")
    plot.scatter("x", "y", source=chosen, size=17, fill_color=None, line_color=INK, line_width=2)
    plot.add_tools(HoverTool(renderers=[circles, crosses], tooltips="@tip{safe}", limit=2, name="hover"))
    plot.xaxis[0].update(name="x-axis")
    plot.yaxis[0].update(name="y-axis")
    return plot


def refinement_figure(ledger: GapLedger) -> Any:
    """ELBO along the refinements of each family, between L[q] and log p(x); None where nothing was traced."""
    traces, data = ledger.traces, ledger.per_datapoint
    curves = {name: values(traces, "refined_elbo", name) for name in families(traces)}
    drawn = {name: curve for name, curve in curves.items() if curve is not None}
    if not drawn:
        return None
    plot = new_figure(
        name="refinement", height=300, x_axis_label="refinement step", y_axis_label="mean ELBO (nats)", **TRACED
    )
    steps = traces["refinement_step"].values
    for (name, curve), colour, dash in zip(drawn.items(), cycle(SHADES), cycle(DASHES), strict=False):
        add_line(plot, (steps, curve), family_name(name), colour, dash)
    levels = {label: values(data, name) for name, label in (("log_evidence", "log p(x)"), ("elbo", "L[q]"))}
    ends = [float(curve[np.isfinite(curve)][-1]) for curve in drawn.values()]
    for label, column in levels.items():
        if column is not None:
            height = float(column[np.isfinite(column)].mean())
            ends.append(height)
            flat = steps, np.full(len(steps), height)
            add_line(plot, flat, label, INK, "dotted" if label == "L[q]" else "solid")
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0
    plot.update(y_range=Range1d(low - 0.4 * span, high + 0.25 * span))
    return legend_above(plot)


def annealing_figure(ledger: GapLedger) -> Any:
    """Acceptance and effective sample size along the paths of AIS; None where nothing was annealed."""
    curves = {label: values(ledger.traces, name) for name, label in ANNEALING.items()}
    drawn = {label: curve for label, curve in curves.items() if curve is not None}
    if not drawn:
        return None
    schedule = values(ledger.traces, "inverse_temperature")
    plot = new_figure(name="annealing", height=300, x_axis_label="inverse temperature", y_axis_label="share", **TRACED)
    plot.update(x_range=Range1d(0, 1), y_range=Range1d(0, 1.03))
    for (label, curve), colour, dash in zip(drawn.items(), SHADES, DASHES, strict=False):
        across = np.linspace(0, 1, len(curve)) if schedule is None else schedule
        add_line(plot, (across, curve), label, colour, dash)
    return legend_above(plot)


TRACED: dict[str, Any] = {"output_backend": "svg", "toolbar_location": None}


def add_line(plot: Any, curve: tuple[Any, Any], label: str, colour: str, dash: str, name: str = "") -> None:
    """A line with a place in the legend; `name` is what it is called when pointed at, by default its `label`."""
    x, y = curve
    source = ColumnDataSource({"x": x, "y": y, "of": [name or label] * len(x)})
    shown = as_text(label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…")
    drawn = plot.line("x", "y", source=source, legend_label=shown, color=colour, line_dash=dash, line_width=2)
    hover = HoverTool(renderers=[drawn], tooltips=[("", "@of"), ("at", "@x{0.[000]}"), ("value", "@y{0.000}")])
    plot.add_tools(hover)


def legend_above(plot: Any) -> Any:
    """The legend, where it covers no curve."""
    (legend,) = plot.legend
    plot.add_layout(legend, "above")
    legend.update(
        orientation="horizontal",
        ncols=3,
        spacing=14,
        border_line_color=None,
        background_fill_color=None,
        label_text_color=INK,
        label_text_font_size="12px",
        padding=2,
        margin=0,
    )
    return plot


def new_figure(**settings: Any) -> Any:
    """A figure as wide as the page, in the colours of the scheme, that draws nothing outside itself."""
    plot = figure(sizing_mode="stretch_width", min_width=200, **{"tools": [], **settings})
    plot.toolbar.update(logo=None)
    plot.update(background_fill_color=PAPER, border_fill_color=PAPER, outline_line_color=None)
    for axis in plot.axis:
        axis.update(
            axis_line_color=MUTED,
            major_tick_line_color=MUTED,
            minor_tick_line_color=None,
            major_label_text_color=INK,
            major_label_text_font_size="12px",
            axis_label_text_color=INK,
            axis_label_text_font_style="normal",
            axis_label_text_font_size="13px",
        )
    for grid in plot.grid:
        grid.update(grid_line_color=FAINT)
    return plot


def numbered(item: Any) -> Any:
    """Bokeh's JSON of a figure, with identifiers that are the same each time it is made."""
    known: dict[str, str] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [walk(part) for part in value]
        if not isinstance(value, dict):
            return value
        return {
            key: known.setdefault(part, f"m{len(known)}") if key in IDS and isinstance(part, str) else walk(part)
            for key, part in value.items()
        }

    return walk(item)


IDS = {"id", "root_id"}
