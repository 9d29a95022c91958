"""Observed sites and factors of a guide: terms of the objective it was trained by, which are no part of log q."""

from collections.abc import Callable
from typing import Any

import torch

from pyrogaps.density.data import evenly_spaced
from pyrogaps.density.joint import JointDensity
from pyrogaps.density.layout import plate_dim, rows_first
from pyrogaps.density.score import site_log_prob
from pyrogaps.density.structure import is_factor
from pyrogaps.errors import InputError
from pyrogaps.streams import seeded

NUM_DATAPOINTS = 256
NUM_RUNS = 16  # whose mean is printed

Messages = dict[str, Any]


def drawn(messages: Messages) -> Messages:
    """The sites of a guide's run that it draws."""
    return {name: message for name, message in messages.items() if not message["is_observed"]}


def carried(messages: Messages, joint: JointDensity) -> list[str]:
    """The names of the observed sites and factors of a guide's run.

    Raises `InputError` where one is a latent of the model, or where the guide observes all that the model observes.
    """
    names = [name for name, message in messages.items() if message["is_observed"]]
    for name in names:
        if name in joint.sites or name in joint.enumerated:
            raise InputError(f"site '{name}': observed in the guide. Remove obs=, because a guide must draw it")
    if joint.observed and set(joint.observed) <= set(names):
        raise InputError(
            f"site '{joint.observed[0]}': observed in the guide. Remove obs= with the whole statement, or pass the "
            "guide where this is the model"
        )
    return names


def on_carried(names: list[str], run: Callable[[torch.Tensor], Messages], joint: JointDensity) -> list[str]:
    """A remark for each of these sites, with the nats that it adds to log q in the objective, without its scale.

    `run(indices)` runs the guide. The nats are means over `NUM_RUNS` runs on at most `NUM_DATAPOINTS` datapoints.
    """
    if not names:
        return []
    indices = evenly_spaced(joint.num_datapoints, NUM_DATAPOINTS)
    with seeded(0, "carried", device=joint.device):
        runs = [run(indices) for _ in range(NUM_RUNS)]
    return [_remark(name, [messages[name] for messages in runs if name in messages], joint) for name in names]


def _remark(name: str, messages: list[Any], joint: JointDensity) -> str:
    values = torch.stack([nats_of(message, joint)[0] for message in messages]).double()
    mean, error = float(values.mean()), float(values.std()) / len(values) ** 0.5
    size = f"{mean:.4g}" if error <= 1e-3 * abs(mean) else f"{mean:.4g} ± {error:.1g}"
    unit = nats_of(messages[0], joint)[1]
    what = f"the factor '{name}' in" if is_factor(messages[0]["fn"]) else f"the observed site '{name}' of"
    return f"{what} the guide is left out of log q, to which it adds {size} {unit}"


def nats_of(message: Any, joint: JointDensity) -> tuple[torch.Tensor, str]:
    """A site's log-probability, masked and not scaled, with its unit: the mean over datapoints, or, outside the data
    plate, the sum.
    """
    term = site_log_prob(message)
    axis = None if joint.plate is None else plate_dim(message, joint.plate)
    if axis is None:
        return term.sum(), "nats" if joint.plate is None else "nats for the data set"
    rows = next(frame.size for frame in message["cond_indep_stack"] if frame.name == joint.plate)
    return rows_first(term, axis, int(rows)).mean(), "nats per datapoint"
