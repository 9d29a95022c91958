"""Arguments that fit no public function: one line with what was meant and what there is. Signatures are short."""

import inspect

import pytest
import torch
import xarray as xr

import pyrogaps as pg
from pyrogaps.guides.amortized import AmortizedNormal
from pyrogaps.models.linear_gaussian import LinearGaussian
from pyrogaps.signatures import nearest

FUNCTIONS = [getattr(pg, name) for name in pg.__all__ if inspect.isfunction(getattr(pg, name))]
SETTINGS = [pg.AIS, pg.Ladder, pg.Refinement, pg.Conditioning, pg.Retraining, pg.Certificate, pg.Split, pg.Training]
PLOTS = [pg.plot_gaps, pg.plot_datapoints, pg.plot_traces, pg.plot_ledger]


@pytest.mark.parametrize("target", [*FUNCTIONS, *SETTINGS, pg.IndexedData, pg.JointDensity, pg.Problem.of])
def test_what_a_function_takes_is_listed(target: object) -> None:
    assert callable(target)
    known = inspect.signature(target).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return  # its further settings are another function's
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = (parameter for parameter in known.values() if parameter.kind not in kinds)
    required = {parameter.name: None for parameter in needed if parameter.default is parameter.empty}
    with pytest.raises(pg.InputError, match="unexpected keyword argument 'qqqq'") as raised:
        target(**required, qqqq=3)
    by_name = [name for name, parameter in known.items() if parameter.kind is parameter.KEYWORD_ONLY]
    in_order = [name for name in known if name not in by_name]
    takes = [", ".join(in_order)] * bool(in_order) + [f"by name {', '.join(by_name)}"] * bool(by_name)
    assert str(raised.value).endswith(f". It takes {'; '.join(takes)}")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (pg.bdmc, "bdmc: too many positional arguments. It takes model, data; by name guide_or_family, settings, "),
        (pg.loo, "loo: too many positional arguments. It takes tree; by name var_name, pointwise"),
        (pg.mapa_posterior, "mapa_posterior: too many positional arguments. It takes data, likelihood; by name "),
        (pg.MAPA_ELBO, "MAPA_ELBO: too many positional arguments. It takes posterior; by name num_top, "),
        (pg.Split, "Split: too many positional arguments. It takes train_data, retraining"),
        (
            pg.SimulatedData,
            "data: expected what the model is called with, got AmortizedNormal. Pass tensors here, ",
        ),
        (pg.Problem, "Problem: it cannot be made of programs directly. Use Problem.of(model, guide, data)"),
    ],
)
def test_other_arguments_than_model_guide_and_data_are_listed(call: object, said: str) -> None:
    """Of what is called with others, the call that works for its siblings says which."""
    assert callable(call)
    with pytest.raises(pg.InputError) as raised:
        call(LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(3, 4))
    assert str(raised.value).startswith(said)


def test_what_is_missing_is_listed() -> None:
    model, guide = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,))
    with pytest.raises(pg.InputError, match=r"missing a required argument: 'guides'\. It takes model, guides, data;"):
        pg.posterior_grid(model)  # type: ignore[call-arg]
    with pytest.raises(pg.InputError, match=r"^data: missing\. Pass what the model is called with, or a Problem"):
        pg.bdmc(model)
    with pytest.raises(pg.InputError, match=r"^data: expected .*, got AmortizedNormal\. .*guide_or_family="):
        pg.bdmc(model, guide)
    with pytest.raises(pg.InputError, match=r"^guide: missing\."):
        pg.shared_posterior(model)


LONG = [pg.ais, pg.bdmc, pg.calibrate, pg.decompose, pg.elbo, pg.iwae, pg.log_evidence, pg.refine]
ALSO_LONG = [pg.posterior_grid, pg.shared_posterior, pg.train]


@pytest.mark.parametrize("function", [*LONG, *ALSO_LONG])
def test_long_functions_take_the_same_settings(function: object) -> None:
    """Where data, randomness and time are spent alike, by the same names and with the same defaults."""
    assert callable(function)
    parameters = inspect.signature(function).parameters
    names = ["seed", "progress"] + ["plate"] * (function is not pg.train) + ["batch_size"] * (function in LONG)
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in names)
    assert (parameters["seed"].default, parameters["progress"].default) == (0, True)
    assert {name: parameters[name].annotation for name in ("seed", "progress")} == {"seed": int, "progress": bool}


@pytest.mark.parametrize("delay", [0.0, 60.0])
@pytest.mark.parametrize("progress", [False, True])
def test_a_bar_is_shown_of_calls_that_take_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, delay: float, progress: bool
) -> None:
    monkeypatch.setattr("pyrogaps.run.DELAY", delay)
    model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(130, 4)
    quiet = pg.elbo(model, guide, x, progress=False)
    assert torch.equal(pg.elbo(model, guide, x, progress=progress).value, quiet.value)
    shown = capsys.readouterr().err
    assert ("ELBO: 100%" in shown) == (bool(shown) and "about" in shown) == (progress and not delay)


@pytest.mark.parametrize(
    ("target", "unknown", "meant"),
    [
        (pg.calibrate, "num_datapoints", "num_simulated"),  # by the words of its description
        (pg.calibrate, "num_draw", "num_draws"),  # by its spelling
        (pg.train, "epochs", "num_epochs"),  # by a word of its name
        (pg.elbo, "num_samples", "num_particles"),
        (pg.AIS, "chains", "num_chains"),
        (pg.Refinement, "steps", "num_steps"),
        (pg.loo, "x", None),
    ],
)
def test_the_argument_that_was_meant(target: object, unknown: str, meant: str | None) -> None:
    assert callable(target)
    assert nearest(unknown, inspect.signature(target).parameters, target.__doc__ or "") == meant


def test_signatures_are_readable() -> None:
    """As `help` prints them: without the limits of settings and what the terms of a ledger are made of."""
    for target in (*FUNCTIONS, *SETTINGS):
        text = str(inspect.signature(target))
        assert len(text) < 1420
        assert "Annotated" not in text


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("source", [3, "gaps.nc", xr.Dataset(), xr.DataTree()])
def test_a_plot_of_no_ledger_is_refused(plot: object, source: object) -> None:
    assert callable(plot)
    with pytest.raises(pg.InputError, match=r"^ledger: must be a GapLedger or a DataTree of one, got .*open_datatree$"):
        plot(source)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (pg.GapLedger.from_datatree, "tree: must be a DataTree, got 3. Open a saved ledger with xarray.open_datatree"),
        (pg.Calibration.from_datatree, "tree: must be a DataTree, got 3. Open a saved calibration with"),
        (pg.loo, "tree: must be a DataTree, got 3. Open a saved result of to_datatree with"),
        (pg.plot_calibration, "calibration: must be a Calibration or a DataTree of one, got 3. Pass what calibrate"),
        (pg.plot_posteriors, "source: must be a Dataset with densities, got 3. Pass what posterior_grid returned"),
    ],
)
def test_what_is_no_tree_is_refused_with_a_remedy(call: object, said: str) -> None:
    assert callable(call)
    with pytest.raises(pg.InputError) as raised:
        call(3)
    assert str(raised.value).startswith(said)
