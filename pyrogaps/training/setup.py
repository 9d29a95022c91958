"""Checks before the first step: whether model, guide and minibatches fit together."""

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoCallable, AutoGuide, AutoGuideList
from pyro.poutine.util import site_is_subsample

from pyrogaps.density.data import IndexedData
from pyrogaps.density.discrete import is_discrete
from pyrogaps.density.runs import Program
from pyrogaps.density.structure import NOT_OBSERVED, missing
from pyrogaps.errors import InputError, counted

Shapes = dict[str, torch.Size]


def check_minibatches(model: Program, guide: Program, data: IndexedData, rows: int) -> None:
    """Raise `InputError` for a guide with parameters for each datapoint, when minibatches have `rows` rows.

    Such a guide accepts every minibatch of the size it was set up with and silently shares its parameters among all of
    them. The check therefore also runs the pair on one more row.

    On an error the param store is restored.
    """
    store = pyro.get_param_store()
    names = set(store.keys())
    try:
        _check(model, guide, data, rows)
    except InputError:
        for name in set(store.keys()) - names:
            del store[name]
        raise


def _check(model: Program, guide: Program, data: IndexedData, rows: int) -> None:
    minibatch, larger = (data.fetch(torch.arange(size)) for size in (rows, rows + 1))
    with torch.no_grad():
        expected, local = _model_shapes(model, minibatch, larger, rows)
        if local and any(_is_unamortized(part) for part in _parts(guide)):
            raise _tied(guide, rows)
        _latent_shapes(guide, minibatch)
        try:
            drawn = _latent_shapes(guide, larger)
        except (ValueError, RuntimeError, IndexError, AssertionError) as error:
            raise _tied(guide, rows) from error
    if any(drawn.get(name, expected[name]) != expected[name] for name in local):
        raise _tied(guide, rows)


def check_sites(model: Program, guide: Program, args: tuple[Any, ...]) -> None:
    """Raise `InputError` for latents of the model that the guide does not draw, which an ELBO would not sum out, and
    for a guide in the place of the model.
    """
    with torch.no_grad():
        drawn, read = (poutine.trace(program).get_trace(*args) for program in (guide, model))
    if drawn.observation_nodes and not read.observation_nodes:
        raise InputError(NOT_OBSERVED)
    for name in read.stochastic_nodes:
        site = read.nodes[name]
        if not site_is_subsample(site) and name not in drawn.nodes:
            summed = ", or train with Pyro's SVI and TraceEnum_ELBO, which sums it out" * is_discrete(site["fn"])
            raise InputError(f"{missing(name)}{summed}")


def refuse_global_latents(model: Program, data: IndexedData, rows: int) -> None:
    """Raise `InputError` for latents outside the data plate, which every process would count in full.

    Needed only for models whose plates do not declare the full number of datapoints. A latent is outside the plate if
    its shape is the same for `rows` datapoints as for one more.
    """
    minibatch, larger = (data.fetch(torch.arange(size)) for size in (rows, rows + 1))
    with torch.no_grad():
        shapes, local = _model_shapes(model, minibatch, larger, rows)
    for name in shapes:
        if name not in local:
            raise InputError(
                f"site '{name}': lies outside the data plate, so its density would be counted once per process. "
                "Declare the plate's full size, pyro.plate('data', N, subsample_size=len(x)), or use one process."
            )


def _model_shapes(model: Program, minibatch: Any, larger: Any, rows: int) -> tuple[Shapes, set[str]]:
    """Shapes of the latents for the larger minibatch, and the names of those that depend on its size."""
    before = _latent_shapes(model, minibatch)
    try:
        after = _latent_shapes(model, larger)
    except (ValueError, RuntimeError, IndexError, AssertionError) as error:
        raise InputError(
            f"model: runs on {counted(rows, 'datapoint')} but not on {rows + 1}. Size its plates by the data, as in "
            "pyro.plate('data', len(x))."
        ) from error
    return after, {name for name, shape in after.items() if before.get(name) != shape}


def _latent_shapes(program: Program, args: tuple[Any, ...]) -> Shapes:
    trace = poutine.trace(program).get_trace(*args)
    # Sizes that clash may raise an error only when the sites are scored.
    trace.compute_log_prob()
    sites: dict[str, Any] = {name: trace.nodes[name] for name in trace.stochastic_nodes}
    return {name: site["value"].shape for name, site in sites.items() if not site_is_subsample(site)}


def _parts(guide: Program) -> list[Any]:
    return list(guide) if isinstance(guide, AutoGuideList) else [guide]


def _is_unamortized(guide: Any) -> bool:
    """Whether this is an autoguide with one parameter per latent element of its setup data."""
    return isinstance(guide, AutoGuide) and not isinstance(guide, AutoCallable) and guide.create_plates is None


def _tied(guide: Program, rows: int) -> InputError:
    name = getattr(guide, "__qualname__", type(guide).__name__)
    return InputError(
        f"training: guide {name} has parameters for each of {counted(rows, 'datapoint')}, so minibatches and "
        "validation data are "
        "not supported. Use an amortized guide, or train in one process with batch_size set to the size of the data "
        "set."
    )
