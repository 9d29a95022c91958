"""The plots, from fabricated ledgers: what they show, and that they cope with what is missing."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

import pyrogaps as pg
from pyrogaps.plots import plot_datapoints, plot_gaps, plot_ledger, plot_posteriors, plot_traces
from pyrogaps.plots.datapoints import image_shape
from pyrogaps.plots.ledger import page_size
from pyrogaps.plots.posteriors import SHARES

FAMILIES = ["own", "mean-field", "flow"]


def fabricate(*, amortization=1.5, conditioning=None, num_datapoints=40, x_shape=(64,), without=()):
    """A ledger's `DataTree`, its gaps scattered about 1.0 (approximation) and the means given."""
    rng = np.random.default_rng(0)
    rows = ("datapoint",)
    by_family = ("datapoint", "family")

    def scattered(mean):
        noise = rng.normal(0, 0.1, num_datapoints)
        return mean + noise - noise.mean()

    parts = {"approximation_gap": scattered(1.0), "amortization_gap": scattered(amortization)}
    if conditioning is not None:
        parts["conditioning_gap"] = scattered(conditioning)
    log_evidence = scattered(-20.0)
    total = sum(parts.values())
    refined = log_evidence[:, None] - parts["approximation_gap"][:, None] + np.array([0, -0.25, 0.5])
    variables = {name: (rows, gap) for name, gap in {**parts, "inference_gap": total}.items()}
    variables |= {
        "log_evidence": (rows, log_evidence),
        "elbo": (rows, log_evidence - total),
        "elbo_refined": (by_family, refined),
        "family_approximation_gap": (by_family, log_evidence[:, None] - refined),
    }
    variables |= {f"{name}_mcse": (dims, np.full(array.shape, 0.02)) for name, (dims, array) in variables.items()}
    variables["converged"] = (by_family, np.arange(num_datapoints * 3).reshape(num_datapoints, 3) % 7 > 0)
    steps = np.arange(0, 500, 10)
    climb = refined.mean(0)[:, None] - 30 * np.exp(-steps / 50)
    traces = {
        "refined_elbo": (("family", "refinement_step"), climb),
        "acceptance_by_temperature": ("temperature", np.full(20, 0.8)),
        "ess_by_temperature": ("temperature", np.linspace(1, 0.6, 20)),
        "inverse_temperature": ("temperature", np.linspace(0, 1, 20)),
    }
    coordinates = {"datapoint": np.arange(num_datapoints), "family": FAMILIES}
    groups = {
        "per_datapoint": xr.Dataset(variables, coordinates).drop_vars(without, errors="ignore"),
        "traces": xr.Dataset(traces, {"family": FAMILIES, "refinement_step": steps}).drop_vars(
            without, errors="ignore"
        ),
    }
    if x_shape is not None:
        x = rng.random((num_datapoints, *x_shape))
        groups["observed_data"] = xr.Dataset({"x": (("datapoint", *(f"x_dim_{i}" for i in range(len(x_shape)))), x)})
    return xr.DataTree.from_dict({name: group for name, group in groups.items() if name not in without})


def render(figure):
    """Draw everything, as saving does."""
    FigureCanvasAgg(figure)
    figure.canvas.draw()
    return figure


def labels(ax):
    return [label.get_text().strip() for label in ax.get_yticklabels()]


def bars(ax):
    """Spans (start, end) of the bars by row, the first row at the top."""
    spans = {}
    for patch in ax.patches:
        row = round(patch.get_y() + patch.get_height() / 2)
        spans.setdefault(row, []).append((patch.get_x(), patch.get_x() + patch.get_width()))
    return [spans[row] for row in sorted(spans)]


def texts(figure):
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def blank():
    return Figure(figsize=(8, 4), layout="constrained")


def test_gaps_stack_to_the_inference_gap():
    ax = plot_gaps(fabricate(), blank().add_subplot())
    assert labels(ax) == ["inference gap", "approximation", "amortization", "mean-field, refined", "flow, refined"]
    total, approximation, amortization, mean_field, flow = bars(ax)
    np.testing.assert_allclose(total, [(0, 1.0), (1.0, 2.5)], atol=1e-6)
    np.testing.assert_allclose([*approximation, *amortization], [(0, 1.0), (1.0, 2.5)], atol=1e-6)
    np.testing.assert_allclose([*mean_field, *flow], [(0, 1.25), (0, 0.5)], atol=1e-6)
    assert "2.50 ± 0.02" in [text.get_text() for text in ax.texts]
    assert "nats" in ax.get_xlabel()
    render(ax.figure)


def test_parts_differ_in_grey():
    greys = [np.dot(to_rgba(colour)[:3], [0.299, 0.587, 0.114]) for colour in {term.colour for term in pg.TERMS}]
    assert min(np.diff(sorted(greys))) > 0.07


def test_conditioning_gap_lies_between_the_two():
    ax = plot_gaps(fabricate(conditioning=0.5), blank().add_subplot())
    assert labels(ax)[:4] == ["inference gap", "approximation", "conditioning", "amortization"]
    np.testing.assert_allclose(bars(ax)[0], [(0, 1.0), (1.0, 1.5), (1.5, 3.0)], atol=1e-6)
    np.testing.assert_allclose(bars(ax)[2], [(1.0, 1.5)], atol=1e-6)


def test_negative_part_runs_backwards_and_the_total_is_not_stacked():
    ax = plot_gaps(fabricate(amortization=-0.4), blank().add_subplot())
    total, _, amortization = bars(ax)[:3]
    np.testing.assert_allclose(total, [(0, 0.6)], atol=1e-6)
    np.testing.assert_allclose(amortization, [(1.0, 0.6)], atol=1e-6)
    assert any(text.get_text().startswith("−0.40") for text in ax.texts)


def test_error_bars_are_standard_errors_over_datapoints():
    tree = fabricate()
    ax = plot_gaps(tree, blank().add_subplot())
    (segment,) = ax.containers[-1].lines[2][0].get_segments()
    gap = tree["per_datapoint"]["family_approximation_gap"].sel(family="flow").values
    assert segment[1, 0] - segment[0, 0] == pytest.approx(2 * gap.std(ddof=1) / np.sqrt(40), rel=1e-6)


def test_one_datapoint_has_no_error_bar():
    ax = plot_gaps(fabricate(num_datapoints=1), blank().add_subplot())
    assert "2.50" in [text.get_text() for text in ax.texts]
    render(ax.figure)


@pytest.mark.parametrize("x_shape", [(64,), (784,), (28, 28), (1, 28, 28), (3, 32, 32), (32, 32, 3), (3072,)])
def test_worst_explained_inputs_are_shown(x_shape):
    tree = fabricate(x_shape=x_shape)
    figure = render(plot_datapoints(tree, blank(), num_images=5))
    scatter, *images = figure.axes
    assert len(images) == 5
    worst = np.argsort(-tree["per_datapoint"]["inference_gap"].values)[:5]
    assert [ax.get_title().split("\n")[0] for ax in images] == [f"{i}: #{n}" for i, n in enumerate(worst, 1)]
    first = np.asarray(images[0].images[0].get_array())
    assert first.shape[:2] == {64: (8, 8), 784: (28, 28), 1024: (32, 32), 3072: (32, 32)}[int(np.prod(x_shape))]
    assert all("nats" in label for label in (scatter.get_xlabel(), scatter.get_ylabel()))


def test_inputs_are_scaled_as_they_are():
    tree = fabricate(x_shape=(4, 5))
    worst = int(np.argmax(tree["per_datapoint"]["inference_gap"].values))
    shown = np.asarray(plot_datapoints(tree, blank(), num_images=1).axes[1].images[0].get_array())
    x = tree["observed_data"]["x"].values[worst]
    np.testing.assert_allclose(shown, (x - x.min()) / (x.max() - x.min()))


@pytest.mark.parametrize("x_shape", [None, (10,), (9,), (5, 5, 5), (2, 3)])
def test_inputs_that_are_no_images_leave_the_scatter_alone(x_shape):
    assert len(render(plot_datapoints(fabricate(x_shape=x_shape), blank())).axes) == 1


def test_image_shapes():
    assert image_shape((64,)) == (8, 8)
    assert image_shape((3072,)) == (3, 32, 32)
    assert image_shape((28, 28, 1)) == (28, 28)
    assert image_shape((48,)) == (3, 4, 4)
    assert image_shape((88,)) is None


def test_unconverged_datapoints_are_counted():
    (ax,) = plot_datapoints(fabricate(x_shape=None), blank()).axes
    unsettled = int((np.arange(120).reshape(40, 3)[:, 0] % 7 == 0).sum())
    assert f"refinement not converged ({unsettled})" in [text.get_text() for text in ax.get_legend().get_texts()]


def test_traces_show_every_family_and_the_levels():
    left, right = render(plot_traces(fabricate(), blank())).axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == FAMILIES
    assert {text.get_text() for text in left.texts} == {"log p(x)", "L[q]"}
    bottom, top = left.get_ylim()
    assert -35.0 < bottom < -22.5 < -20.0 < top
    assert right.get_xlim() == (0, 1)


@pytest.mark.parametrize(
    ("without", "remark"),
    [
        (("traces",), "no refinement was traced"),
        (("refined_elbo",), "no refinement was traced"),
        (("amortization_gap",), "needs both the approximation\nand the amortization gap"),
    ],
)
def test_missing_variables_leave_a_note(without, remark):
    figure = render(plot_ledger(fabricate(without=without), Figure(figsize=(10, 10), layout="constrained")))
    assert remark in texts(figure)


def test_without_annealing_there_is_no_panel_for_it():
    """As of the ladder, the default."""
    (left,) = render(plot_traces(fabricate(without=("acceptance_by_temperature", "ess_by_temperature")), blank())).axes
    assert left.get_title(loc="left") == "Refinement"


def test_nothing_but_a_bound():
    tree = xr.DataTree.from_dict({"per_datapoint": xr.Dataset({"elbo": ("datapoint", [-1.0, -2.0])})})
    assert "no gaps were measured" in texts(render(plot_ledger(tree, Figure(figsize=page_size(tree)))))


def test_all_nan_counts_as_missing():
    tree = fabricate()
    dataset = tree["per_datapoint"].to_dataset()
    dataset["amortization_gap"] = dataset["amortization_gap"] * np.nan
    ax = plot_gaps(SimpleNamespace(per_datapoint=dataset), blank().add_subplot())
    assert "amortization" not in labels(ax)


def test_some_nan_is_left_out_of_means():
    dataset = fabricate()["per_datapoint"].to_dataset()
    dataset["approximation_gap"][3] = np.nan
    ledger = SimpleNamespace(per_datapoint=dataset, traces=xr.Dataset(), observed=xr.Dataset())
    figure = render(plot_ledger(ledger, Figure(figsize=(10, 10), layout="constrained")))
    assert not any("nan" in text for text in texts(figure))


def test_ledger_and_tree_give_one_picture():
    tree = fabricate()
    ledger = SimpleNamespace(
        per_datapoint=tree["per_datapoint"].to_dataset(),
        traces=tree["traces"].to_dataset(),
        observed=tree["observed_data"].to_dataset(),
    )
    pictures = []
    for source in (tree, ledger):
        # A constrained layout is solved anew each time, not always to the same pixel.
        figure = render(plot_ledger(source, Figure(figsize=(10, 10))))
        pictures.append(np.asarray(figure.canvas.buffer_rgba()))
    np.testing.assert_array_equal(*pictures)


def fabricate_grid(*, columns=3, x_shape=(28, 28), without=(), offset=1.0):
    """Normals on a grid: the true posteriors at 0 with scale 1, the guides `offset` away with scale 0.5."""
    axis = np.linspace(-6, 6, 121)

    def normal(loc, scale):
        return np.exp(-0.5 * ((axis - loc) / scale) ** 2) / (scale * np.sqrt(2 * np.pi))

    panels = [np.outer(normal(0, 1), normal(0, 1)), np.outer(normal(offset, 0.5), normal(0, 0.5))]
    density = np.stack([np.stack([*panels, panels[1]])] * columns)
    gap = np.tile([0.0, 1.234, np.nan], (columns, 1))
    variables = {
        "density": (("datapoint", "posterior", "z_1", "z_2"), density),
        "grid_1": (("datapoint", "z_1"), np.stack([10 * n + axis for n in range(columns)])),
        "grid_2": (("datapoint", "z_2"), np.stack([axis] * columns)),
        "log_evidence": ("datapoint", np.full(columns, -88.04)),
        "gap": (("datapoint", "posterior"), gap),
        "gap_mcse": (("datapoint", "posterior"), np.full((columns, 3), 0.056)),
        "label": ("datapoint", [f"case {n}" for n in range(columns)]),
    }
    if x_shape is not None:
        x = np.random.default_rng(0).random((columns, *x_shape))
        variables["x"] = (("datapoint", *(f"x_dim_{k}" for k in range(len(x_shape)))), x)
    coordinates = {"datapoint": 5 + np.arange(columns), "posterior": ["true posterior", "amortized", "flow"]}
    grid = xr.Dataset(variables, coordinates).drop_vars(without, errors="ignore")
    return grid.set_coords([name for name in ("grid_1", "grid_2", "label") if name in grid])


def test_posteriors_are_rows_and_datapoints_columns():
    figure = render(plot_posteriors(fabricate_grid(), Figure(figsize=(7, 8), layout="constrained")))
    assert [text for text in texts(figure) if text] == ["true posterior", "amortized", "flow"]
    names, columns = figure.axes[:3], [figure.axes[3 + 4 * n : 7 + 4 * n] for n in range(3)]
    assert all(not ax.axison for ax in names)
    for number, (image, true, amortized, flow) in enumerate(columns):
        assert image.get_title() == f"case {number}\n#{5 + number}: log p(x) = −88.0"
        assert np.asarray(image.images[0].get_array()).shape == (28, 28)
        assert [ax.get_title() for ax in (true, amortized, flow)] == ["", "1.23 ± 0.06 nats", ""]
        assert true.get_xlim() == amortized.get_xlim() == flow.get_xlim()
        left, right = true.get_xlim()
        bottom, top = true.get_ylim()
        assert right - left == pytest.approx(top - bottom)
        assert 10 * number - 4.5 < left < 10 * number - 2.8 and 10 * number + 2.8 < right < 10 * number + 4.5
    assert [ax.get_xlabel() for ax in columns[0]] == ["", "", "", "$z_1$"]


def test_contours_enclose_their_shares_of_the_mass():
    figure = plot_posteriors(fabricate_grid(columns=1, x_shape=None), blank())
    (filled,) = figure.axes[3].collections
    # A standard Normal's region of mass s in the plane ends where its density is (1 - s) / 2 pi.
    np.testing.assert_allclose(filled.levels[:-1], (1 - np.array(SHARES)) / (2 * np.pi), rtol=0.03)
    _, outline = figure.axes[4].collections
    np.testing.assert_allclose(outline.levels, (1 - np.array([0.95, 0.4])) / (2 * np.pi), rtol=0.03)


def test_window_widens_for_a_guide_that_misses():
    near, far = (plot_posteriors(fabricate_grid(columns=1, offset=o), blank()).axes[4].get_xlim() for o in (0.5, 4.0))
    assert far[1] > 5 > near[1]


@pytest.mark.parametrize("without", [("x",), ("gap",), ("gap_mcse",), ("label",), ("x", "gap", "gap_mcse", "label")])
def test_posteriors_cope_with_what_is_missing(without):
    figure = render(plot_posteriors(fabricate_grid(without=without), blank()))
    assert len(figure.axes) == 3 + 3 * (4 - ("x" in without))
    titles = [ax.get_title() for ax in figure.axes]
    assert any("#5" in title for title in titles)
    assert any("nats" in title for title in titles) == ("gap" not in without)
    assert any("±" in title for title in titles) == ("gap" not in without and "gap_mcse" not in without)


def test_labels_of_posteriors_do_not_overlap():
    figure = render(plot_posteriors(fabricate_grid(), Figure(figsize=(8, 9), layout="constrained")))
    drawn = [text for ax in figure.axes for text in (*ax.texts, ax.title, ax.xaxis.label, ax.yaxis.label)]
    boxes = [text.get_window_extent() for text in drawn if text.get_text()]
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


def test_a_density_that_underflowed_leaves_its_panel_empty():
    grid = fabricate_grid(columns=1)
    grid["density"][0, 2] = 0.0
    figure = render(plot_posteriors(grid, blank()))
    assert len(figure.axes[-1].collections) == 1


def test_something_else_is_refused():
    with pytest.raises(pg.InputError, match="ledger: must be a GapLedger"):
        plot_gaps(SimpleNamespace(posterior=1))
    with pytest.raises(pg.InputError, match="posterior_grid"):
        plot_posteriors(xr.Dataset())


def test_own_figures_are_pyplot_figures(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"backend": "agg"}):
        for plot in (plot_datapoints, plot_traces, plot_ledger):
            assert plot(fabricate()).number in pyplot.get_fignums()
        pyplot.close("all")
        plot_gaps(fabricate())
        plot_posteriors(fabricate_grid())
        assert len(pyplot.get_fignums()) == 2
        pyplot.close("all")


def test_drawing_into_a_figure_leaves_pyplot_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    render(plot_ledger(fabricate(), Figure(figsize=(10, 10), layout="constrained")))
    render(plot_posteriors(fabricate_grid(), Figure(figsize=(8, 8), layout="constrained")))
