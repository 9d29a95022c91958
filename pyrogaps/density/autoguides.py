"""Check that an autoguide has a density per datapoint."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from pyro.contrib.easyguide import EasyGuide
from pyro.infer.autoguide import (
    AutoDiscreteParallel,
    AutoGaussian,
    AutoGuide,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoMessenger,
    AutoStructured,
)
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from pyrogaps.density.given import original
from pyrogaps.density.joint import JointDensity
from pyrogaps.density.layout import plate_dim
from pyrogaps.errors import InputError, counted

REMEDY = "Use AutoNormal or pyrogaps.guides.local.AutoLocalMultivariateNormal"


class OtherDataError(InputError):
    """An autoguide that was made for another data set; `reason` is the message without its remedy."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason}. {remedy}" if remedy else reason)
        self.reason = reason


def check_autoguide(guide: Any, joint: JointDensity) -> None:
    """Refuse an autoguide without a density per datapoint.

    Raises `InputError` where it was never run, belongs to other data, or is one distribution over all datapoints.
    """
    refuse_never_run(guide)
    plate, first = joint.plate, next(iter(joint.sites), None)
    for part in autoguides_in(guide):
        if isinstance(part, AutoLaplaceApproximation) and plate is None:
            raise InputError(
                "guide: AutoLaplaceApproximation is a Delta, which has no density. Pass the result of its "
                "laplace_approximation(*args)"
            )
        inside, every = ([], []) if plate is None else latents_in(part, plate)
        if every and not inside:
            continue  # of latents outside the data plate, which are given here
        if isinstance(part, AutoDiscreteParallel) and plate is not None:
            raise InputError(
                "guide: AutoDiscreteParallel has the probabilities of all datapoints in one distribution and cannot be "
                "taken at some of them. Leave it out of the AutoGuideList: discrete latents that the guide leaves out "
                "are summed out exactly"
            )
        if isinstance(part, AutoContinuous | AutoGaussian | AutoStructured) and plate is not None and first:
            raise InputError(
                f"site '{first}': {_name(part)} is one joint distribution over all datapoints, without a density per "
                f"datapoint of the plate '{plate}'. {REMEDY}"
            )
        check_size(part, plate, joint.num_datapoints)


def check_size(part: AutoGuide, plate: str | None, number: int) -> None:
    """Raise `OtherDataError` for an autoguide that was made for another number of datapoints."""
    frame = part._prototype_frames.get(plate)
    if frame is not None and (size := int(frame.full_size or frame.size)) != number:
        raise OtherDataError(
            f"guide: the plate '{plate}' of this {_name(part)} has size {size}, but the data set has "
            f"{counted(number, 'datapoint')}",
            "Train it on these data, because an autoguide has parameters for each datapoint",
        )


@contextmanager
def supports_at(guide: Any, plate: str | None, rows: Tensor) -> Iterator[None]:
    """Let an autoguide use the supports of the datapoints `rows`: it keeps those of its setup run, of all of them."""
    nodes = [node for part in autoguides_in(guide) for node in _latents(part, plate)] if plate is not None else []
    before = [node["fn"] for node in nodes]
    try:
        for node in nodes:
            node["fn"] = _at_rows(node, str(plate), rows)
        yield
    finally:
        for node, fn in zip(nodes, before, strict=True):
            node["fn"] = fn


def _latents(part: AutoGuide, plate: str | None) -> list[Any]:
    trace = part.prototype_trace
    nodes = [] if trace is None else [node for _, node in trace.iter_stochastic_nodes()]
    return [node for node in nodes if plate_dim(node, str(plate)) is not None]


def _at_rows(node: Any, plate: str, rows: Tensor) -> Any:
    """What an autoguide reads of a latent's distribution, for some rows of the data plate."""
    fn, dim = node["fn"], plate_dim(node, plate)
    assert dim is not None
    support = _support_at(fn.support, dim - fn.event_dim, rows)
    return SimpleNamespace(support=support, event_dim=fn.event_dim)


def _support_at(support: Any, axis: int, rows: Tensor) -> Any:
    """A constraint with its bounds at some rows of their (negative) `axis`."""
    changed = {}
    for name, value in vars(support).items():
        if isinstance(value, Constraint):
            changed[name] = _support_at(value, axis, rows)
        elif isinstance(value, Tensor) and value.dim() >= -axis and value.shape[axis] > 1:
            changed[name] = value.index_select(axis, rows.to(value.device))
    if not changed:
        return support
    selected = copy.copy(support)
    vars(selected).update(changed)
    return selected


def autoguides_within(guide: nn.Module) -> list[Any]:
    return [module for module in guide.modules() if isinstance(module, AutoGuide)]


def refuse_never_run(guide: Any) -> None:
    """Refuse a guide that still has to run the model to make its parameters."""
    guide = original(guide)
    own = isinstance(guide, AutoMessenger) and type(guide).__module__.startswith("pyro.")
    unset = (
        guide.prototype_trace is None if isinstance(guide, AutoGuide | EasyGuide) else own and not _has_weights(guide)
    )
    if unset:
        raise InputError(f"guide: this {_name(guide)} has never been run. Train it on these data first")


def _has_weights(guide: nn.Module) -> bool:
    return next(guide.parameters(), None) is not None


def is_autoguide(guide: Any) -> bool:
    guide = original(guide)
    return isinstance(guide, AutoGuide | AutoMessenger)


def latents_in(part: AutoGuide, plate: str) -> tuple[list[str], list[str]]:
    """Names of an autoguide's latents inside a plate, and of all its latents."""
    nodes = {} if part.prototype_trace is None else part.prototype_trace.nodes
    latents = {name: n for name, n in nodes.items() if n.get("type") == "sample" and not n.get("is_observed")}
    inside = [name for name, n in latents.items() if any(f.name == plate for f in n.get("cond_indep_stack", ()))]
    return inside, [*latents]


def autoguides_in(guide: Any) -> Iterator[AutoGuide]:
    """The autoguides that a guide consists of: itself, or those in its list; none for any other guide."""
    guide = original(guide)
    if isinstance(guide, AutoGuideList):
        for part in guide:
            yield from autoguides_in(part)
    elif isinstance(guide, AutoGuide):
        yield guide


def _name(guide: Any) -> str:
    return type(guide).__name__
