"""`read_estimates`: the latents that a guide sets to values, found by running it."""

from typing import Any, cast

import torch
from pyro.infer.autoguide import AutoLaplaceApproximation
from torch import Tensor

from pyrogaps.density.autoguides import autoguides_in, check_autoguide, refuse_never_run
from pyrogaps.density.carried import drawn, nats_of
from pyrogaps.density.data import IndexedData
from pyrogaps.density.discrete import is_discrete
from pyrogaps.density.draws import is_posterior
from pyrogaps.density.estimates import PointEstimates, same_values
from pyrogaps.density.forms import Given, as_indexed, whole
from pyrogaps.density.given import HideSites, ReplaySites, SetSites, under
from pyrogaps.density.guide import GuideDensity
from pyrogaps.density.joint import JointDensity
from pyrogaps.density.layout import plate_dim
from pyrogaps.density.plates import steady_plates
from pyrogaps.density.reading import (
    ModelStructure,
    find_data_plate,
    finite_arguments,
    first_rows,
    model_sites,
)
from pyrogaps.density.rows import CHECK_ROWS, same_density
from pyrogaps.density.runs import Program, evaluating
from pyrogaps.density.score import log_prob
from pyrogaps.density.structure import first_sites, sample_sites
from pyrogaps.density.supports import support_of
from pyrogaps.density.terms import is_delta, no_density
from pyrogaps.errors import InputError
from pyrogaps.settings import Plate
from pyrogaps.streams import seeded

Messages = dict[str, Any]
NUM_PRIOR_DRAWS = 4


def estimates_of(model: Program, guide: Any, data: Given, plate: Plate) -> PointEstimates | None:
    """The latents that a guide sets to values, see `read_estimates`, or that a refined guide was refined given."""
    if is_posterior(guide):
        return cast(PointEstimates | None, guide.joint.structure.estimates)
    return read_estimates(model, guide, data, plate) if callable(guide) else None


def read_estimates(model: Program, guide: Program, data: Given, plate: Plate) -> PointEstimates | None:
    """The latents of the model that the guide sets to values; None where there are none.

    These are Deltas whose value does not change with the guide's draws. What keeps model or guide from running at all
    is left to those that read them.

    Raises `InputError` naming the site, where nothing else is latent, or a value does not fit the model.
    """
    refuse_never_run(guide)
    if any(isinstance(part, AutoLaplaceApproximation) for part in autoguides_in(guide)):
        return None
    with evaluating(guide, model), torch.no_grad():
        if (run := _first_run(guide, data, plate)) is None or not (names := _unchanging(guide, *run)):
            return None
        hidden = under(HideSites(names), model)
        if all(is_delta(message) for message in run[1].values()) and not _has_latents(hidden, run[0]):
            raise no_density(names[0])
        name = plate or None if plate is not None else find_data_plate(hidden, as_indexed(data))
        return _read(model, guide, data, name, names)


def _first_run(guide: Program, data: Given, plate: Plate) -> tuple[tuple[Any, ...], Messages] | None:
    """The arguments of a run of the guide on some rows, and what it draws; None where it does not run."""
    try:
        indexed: IndexedData = whole(data) if plate is False else as_indexed(data)
    except InputError:
        indexed = whole(data)
    few = torch.tensor([0]) if plate is False else first_rows(indexed.num_datapoints)
    for rows in (few, torch.arange(indexed.num_datapoints)):
        try:
            args = finite_arguments(indexed.fetch(rows))
            return args, _run(guide, args, 0)
        except InputError:
            continue
    return None


def _run(guide: Program, args: tuple[Any, ...], seed: int) -> Messages:
    with seeded(seed, "estimates"), steady_plates():
        return drawn(sample_sites(guide, args, "guide"))


def _has_latents(model: Program, args: tuple[Any, ...]) -> bool:
    """Whether anything is latent beside what is hidden, such as discrete latents that the guide leaves out."""
    with seeded(0, "estimates"), steady_plates():
        sites, _ = first_sites(model, args)
    return not all(site["is_observed"] for site in sites.values())


def _unchanging(guide: Program, args: tuple[Any, ...], messages: Messages) -> list[str]:
    """The names of the Deltas whose values are the same in a further run.

    Those with an auxiliary draw of their own are its image, whatever its scale. Raises `InputError` for values that
    change though no draw does, and for functions of draws of the model's own latents.
    """
    deltas = [name for name, m in messages.items() if is_delta(m) and f"{name}_unconstrained" not in messages]
    if not deltas:
        return []
    again = _run(guide, args, 1)
    fixed = [name for name in deltas if name in again and same_values(messages[name]["value"], again[name]["value"])]
    if len(fixed) < len(deltas):
        moving = next(name for name in deltas if name not in fixed)
        draws = {name: message for name, message in messages.items() if not is_delta(message)}
        with ReplaySites({name: message["value"] for name, message in draws.items()}):
            replayed = _run(guide, args, 1)
        if moving in replayed and not same_values(messages[moving]["value"], replayed[moving]["value"]):
            raise InputError(
                f"site '{moving}': the guide's Delta is random beyond the guide's sample sites: its value changed "
                "between two runs with the same draws. Draw it with pyro.sample, and switch dropout off in evaluation "
                "mode (F.dropout(x, p, training=self.training))"
            )
        if not any(message["infer"].get("is_auxiliary") for message in draws.values()):
            raise InputError(
                f"site '{moving}': the guide's Delta is a function of its other draws, so the guide has no density. "
                "Draw the site from a distribution, or compute it in the model, with pyro.deterministic"
            )
    return fixed


class _Recorded(SetSites):
    """Sets sites, and records the density of their values; `InputError` for values that do not fit."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__(values)
        self.log_probs: dict[str, Tensor] = {}

    def _pyro_sample(self, message: Any) -> None:
        name = message["name"]
        if name in self.values and not message["is_observed"]:
            fn, value = message["fn"], self.values[name]
            shape = tuple(fn.batch_shape + fn.event_shape)
            if not _broadcasts(tuple(value.shape), shape):
                raise InputError(
                    f"site '{name}': the guide's Delta has shape {tuple(value.shape)}, but the model's value has shape "
                    f"{shape}. Give it the model's shape and plates"
                )
            if not (value.is_floating_point() or is_discrete(fn)):
                raise InputError(
                    f"site '{name}': the guide's Delta has dtype {value.dtype}, but the site is continuous. Convert "
                    "its value, as in value.float()"
                )
            value = value.expand(shape)
            if not is_delta(message):
                _check_support(name, fn, value)
                self.log_probs[name] = log_prob(fn, value, name)
            else:
                self.log_probs[name] = value.new_zeros(())
        super()._pyro_sample(message)


def _broadcasts(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    try:
        return tuple(torch.broadcast_shapes(shape, expected)) == expected
    except RuntimeError:
        return False


def _check_support(name: str, fn: Any, value: Tensor) -> None:
    try:
        inside = bool(support_of(fn).check(value).all())
    except NotImplementedError:
        return
    if not inside:
        raise InputError(
            f"site '{name}': the guide's point estimate lies outside the support of the model's {type(fn).__name__}. "
            "Constrain the parameter to that support, as in pyro.param(..., constraint=)"
        )


def _in_model(model: Program, joint: JointDensity, rows: Tensor, values: dict[str, Tensor]) -> dict[str, bool]:
    """Those of these sites that are latent in the model, and whether their density depends on other latents."""
    runs = []
    for seed in range(NUM_PRIOR_DRAWS):
        recorded = _Recorded(values)
        with seeded(seed, "estimates, priors"):
            model_sites(under(recorded, model), joint.fetch(rows), rows, joint.plate, joint.num_datapoints, None)
        runs.append(recorded.log_probs)
    first = runs[0]
    return {name: not all(same_values(value, run[name]) for run in runs) for name, value in first.items()}


def _read(model: Program, guide: Program, data: Given, plate: str | None, names: list[str]) -> PointEstimates | None:
    """The values of the guide's Deltas `names`: those that all datapoints share, and those of each datapoint."""
    nothing = ModelStructure(plate, {}, (), (), False, False, torch.get_default_dtype(), torch.device("cpu"), -1)
    joint = JointDensity(model, data, structure=nothing)
    number = joint.num_datapoints
    check_autoguide(guide, joint)
    density = GuideDensity.unread(guide, joint)
    rows = torch.tensor([0]) if plate is None else first_rows(number)
    with seeded(0, "estimates, first rows"):
        first = density.first_run(rows)
    found = _in_model(model, joint, rows, {name: first[name]["value"] for name in names})
    if not found:
        return None
    local = [name for name in found if plate is not None and plate_dim(first[name], plate) is not None]
    constants = {name: first[name]["value"].detach().clone() for name in found if name not in local}
    with seeded(0, "estimates, all rows"):
        if constants and plate is not None and number > 1:
            _check_shared(constants, density.run_on(torch.tensor([0, number // 2, number - 1, number // 2, 0])))
        axes = {name: plate_dim(first[name], str(plate)) - first[name]["fn"].event_dim for name in local}
        batches = torch.arange(number).split(CHECK_ROWS) if local else ()
        parts = [density.run_on(batch) for batch in batches]
    values = {name: torch.cat([part[name]["value"].movedim(axes[name], 0) for part in parts]) for name in local}
    for name, value in values.items():
        _check_rows(name, value[rows], first[name]["value"].movedim(axes[name], 0))
    scored = frozenset(name for name, depends in found.items() if depends)
    stated = [remark for name in found for remark in _on_stated(name, first[name], joint)]
    return PointEstimates(constants, values, axes, scored, tuple(stated))


def _on_stated(name: str, message: Any, joint: JointDensity) -> list[str]:
    """A remark on the log-density that a Delta states at its value, where it is not zero."""
    nats, unit = nats_of(message, joint)
    if not float(nats):
        return []
    return [
        f"the log_density of the guide's Delta at '{name}' is left out of log q, to which it adds {nats:.4g} {unit}"
    ]


def _check_rows(name: str, value: Tensor, again: Tensor) -> None:
    """Refuse values of a datapoint that change with the other rows of a batch."""
    if not same_density(value, again):
        raise InputError(
            f"site '{name}': the guide's Delta changes with other rows of the batch. Treat rows independently (no "
            "batch statistics)"
        )


def _check_shared(constants: dict[str, Tensor], others: Messages) -> None:
    """Refuse values outside the data plate that change with the datapoints at hand."""
    for name, value in constants.items():
        there = others[name]["value"]
        if value.shape != there.shape or not same_density(value, there):
            raise InputError(
                f"site '{name}': outside the data plate, but the guide's Delta changes with the datapoints of the "
                "batch. Make it a parameter (pyro.param), or pass plate=False to treat the whole data set as one "
                "datapoint"
            )
