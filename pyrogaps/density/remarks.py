"""Short sentences about what the numbers of a problem are of: what of its programs is left out of the densities."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pyrogaps.density.runs import Program, modules_of

# The lowest and the highest scale at each site that has one.
Scales = dict[str, tuple[float, float]]

WRITTEN = "the ledger is of the model as written, not of the objective trained"
# Modules that act differently in training.
BATCH_STATISTICS = (nn.modules.batchnorm._NormBase,)
DROPOUT = (nn.modules.dropout._DropoutNd,)


def scales_of(sites: Mapping[str, Any]) -> Scales:
    """The scales other than 1 of a run's sites, without those of subsampled plates."""
    scales = {}
    for name, message in sites.items():
        scale = torch.as_tensor(message["scale"], dtype=torch.float64)
        for frame in message["cond_indep_stack"]:
            scale = scale * (frame.size / frame.full_size if frame.full_size else 1.0)
        low, high = float(scale.min()), float(scale.max())
        if abs(low - 1) > 1e-6 or abs(high - 1) > 1e-6:
            scales[name] = low, high
    return scales


def joined(runs: Iterable[Scales]) -> Scales:
    """The scales of several runs together."""
    together: Scales = {}
    for scales in runs:
        for name, (low, high) in scales.items():
            lowest, highest = together.get(name, (low, high))
            together[name] = min(low, lowest), max(high, highest)
    return together


def on_one_datapoint(why: str) -> list[str]:
    """A remark on why the whole data set is one datapoint; none where there is nothing to say."""
    return [f"the numbers are of the data set as one datapoint, because {why}"] if why else []


def declared(program: Program) -> tuple[str, ...]:
    """What a program that has an attribute `remarks`, a tuple of short sentences, says of itself."""
    remarks = getattr(program, "remarks", ())
    return remarks if isinstance(remarks, tuple) and all(isinstance(line, str) for line in remarks) else ()


def on_scales(scales: Scales, what: str) -> list[str]:
    """A remark for each scale that is ignored; `what` names the program."""
    sites: dict[tuple[float, float], list[str]] = {}
    for name, ends in scales.items():
        sites.setdefault(ends, []).append(name)
    remarks = []
    for (low, high), names in sites.items():
        where = f"at {quoted(names)} in the {what}"
        one = high - low <= 1e-6 * high
        size = f"the scale {low:.4g} {where} is" if one else f"the scales from {low:.4g} to {high:.4g} {where} are"
        remarks.append(f"{size} ignored: {WRITTEN}")
    return remarks


def on_drawn(names: Sequence[str]) -> str:
    """A remark on the discrete latents that a guide draws."""
    return (
        f"{quoted(names)}, discrete, drawn by the guide: its bounds are of all latents together, log p(x) sums over "
        "every state"
    )


def on_modes(program: Program, what: str) -> list[str]:
    """A remark on the modules of a program that act differently in training; `what` names the program."""
    modules = {module for top in modules_of(program) for module in top.modules()}
    remarks = []
    if any(_drops(module) for module in modules):
        remarks.append(f"dropout in the {what} is off (evaluation mode)")
    if any(isinstance(module, BATCH_STATISTICS) and module.track_running_stats for module in modules):
        remarks.append(f"batch normalisation in the {what} uses its running statistics (evaluation mode)")
    return remarks


def _drops(module: nn.Module) -> bool:
    """Whether a module has dropout that is not zero."""
    rate = getattr(module, "p", 0.0) if isinstance(module, DROPOUT) else 0.0
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        rate = module.dropout
    return bool(rate)


def quoted(names: Iterable[str]) -> str:
    """Names of sites in quotation marks, as a list in a sentence."""
    *first, last = (f"'{name}'" for name in names)
    return f"{', '.join(first)} and {last}" if first else last
