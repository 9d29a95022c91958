"""Check that an autoguide has a density per datapoint."""

from collections.abc import Iterator
from typing import Any

from pyro.infer.autoguide import AutoGuide, AutoGuideList, AutoLaplaceApproximation, AutoMessenger, AutoStructured
from pyro.infer.autoguide.guides import AutoContinuous

from pyrogaps.density.joint import JointDensity
from pyrogaps.errors import InputError

REMEDY = "Use AutoNormal or pyrogaps.guides.local.AutoLocalMultivariateNormal"


def check_autoguide(guide: Any, joint: JointDensity) -> None:
    """Refuse an autoguide without a density per datapoint.

    Raises `InputError` where it was never run, belongs to other data, or is one distribution over all datapoints.
    """
    if isinstance(guide, AutoGuide) and guide.prototype_trace is None:
        raise InputError(f"guide: this {_name(guide)} has never been run. Train it on these data first")
    plate, first = joint.plate, next(iter(joint.sites))
    for part in _parts(guide):
        if isinstance(part, AutoLaplaceApproximation) and plate is None:
            raise InputError(
                "guide: AutoLaplaceApproximation is a Delta, which has no density. Pass the result of its "
                "laplace_approximation(*args)"
            )
        if isinstance(part, AutoContinuous | AutoStructured) and plate is not None:
            raise InputError(
                f"site '{first}': {_name(part)} is one joint distribution over all datapoints, without a density per "
                f"datapoint of the plate '{plate}'. {REMEDY}"
            )
        if isinstance(part, AutoStructured):
            raise InputError(
                f"guide: the density of AutoStructured cannot be evaluated. {REMEDY}, or AutoMultivariateNormal"
            )
        frame = part._prototype_frames.get(plate)
        if frame is not None and (size := int(frame.full_size or frame.size)) != joint.num_datapoints:
            raise InputError(
                f"guide: the plate '{plate}' of this {_name(part)} has size {size}, but the data set has "
                f"{joint.num_datapoints} datapoints. Train it on these data, because an autoguide has parameters for "
                "each datapoint"
            )


def is_autoguide(guide: Any) -> bool:
    return isinstance(guide, AutoGuide | AutoMessenger)


def _parts(guide: Any) -> Iterator[AutoGuide]:
    if isinstance(guide, AutoGuideList):
        for part in guide:
            yield from _parts(part)
    elif isinstance(guide, AutoGuide):
        yield guide


def _name(guide: Any) -> str:
    return type(guide).__name__
