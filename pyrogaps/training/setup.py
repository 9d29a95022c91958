"""Checks before the first step: do model, guide and minibatches go together?"""

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoCallable, AutoGuide, AutoGuideList
from pyro.poutine.util import site_is_subsample

from pyrogaps.density.data import IndexedData
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError

Shapes = dict[str, torch.Size]


def check_minibatches(model: Program, guide: Program, data: IndexedData, rows: int) -> None:
    """Refuse a guide that has parameters of its own for each datapoint where minibatches of `rows` are asked for.

    Such a guide would take any minibatch of the size it was set up with, and share the parameters among all of them
    without a word, so the pair is tried on one row more.

    Raises `InputError`; the param store is then as it was.
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
    few, more = (data.fetch(torch.arange(size)) for size in (rows, rows + 1))
    with torch.no_grad():
        expected, local = _model_shapes(model, few, more, rows)
        if local and any(_is_unamortized(part) for part in _parts(guide)):
            raise _tied(guide, rows)
        _latent_shapes(guide, few)
        try:
            drawn = _latent_shapes(guide, more)
        except (ValueError, RuntimeError, IndexError, AssertionError) as error:
            raise _tied(guide, rows) from error
    if any(drawn.get(name, expected[name]) != expected[name] for name in local):
        raise _tied(guide, rows)


def refuse_global_latents(model: Program, data: IndexedData, rows: int) -> None:
    """Refuse latents of which there are as many for `rows` datapoints as for one more: each process would count them.

    For models alone whose plates do not say how many datapoints there are in all. Raises `InputError`.
    """
    few, more = (data.fetch(torch.arange(size)) for size in (rows, rows + 1))
    with torch.no_grad():
        found, local = _model_shapes(model, few, more, rows)
    for name in found:
        if name not in local:
            raise InputError(
                f"site '{name}': is outside the data plate, and every process would count it in full; give the plate "
                "the data's size, as in pyro.plate('data', N, subsample_size=len(x)), or train in one process"
            )


def _model_shapes(model: Program, few: Any, more: Any, rows: int) -> tuple[Shapes, set[str]]:
    before = _latent_shapes(model, few)
    try:
        after = _latent_shapes(model, more)
    except (ValueError, RuntimeError, IndexError, AssertionError) as error:
        raise InputError(
            f"model: runs on {rows} datapoints but not on {rows + 1}; size its plates by the data, as in "
            "pyro.plate('data', len(x))"
        ) from error
    return after, {name for name, shape in after.items() if before.get(name) != shape}


def _latent_shapes(program: Program, args: tuple[Any, ...]) -> Shapes:
    trace = poutine.trace(program).get_trace(*args)
    # Scoring brings out sizes that clash; drawing alone may not.
    trace.compute_log_prob()
    sites: dict[str, Any] = {name: trace.nodes[name] for name in trace.stochastic_nodes}
    return {name: site["value"].shape for name, site in sites.items() if not site_is_subsample(site)}


def _parts(guide: Program) -> list[Any]:
    return list(guide) if isinstance(guide, AutoGuideList) else [guide]


def _is_unamortized(guide: Any) -> bool:
    """Whether this is an autoguide with a parameter for each element of the latents it was set up with."""
    return isinstance(guide, AutoGuide) and not isinstance(guide, AutoCallable) and guide.create_plates is None


def _tied(guide: Program, rows: int) -> InputError:
    name = getattr(guide, "__qualname__", type(guide).__name__)
    return InputError(
        f"training: guide {name} has parameters for each of {rows} datapoints, so it cannot be trained in minibatches "
        "or take validation data; set batch_size to the size of the data set, in one process, or use an amortized guide"
    )
