"""What is put to the test: a guide, or a family, that has an answer to data which it has not seen before."""

from typing import Any

from pyrogaps.density import GuideDensity, JointDensity
from pyrogaps.density.autoguides import is_autoguide
from pyrogaps.density.draws import Posterior
from pyrogaps.errors import InputError
from pyrogaps.refine import is_family, own_family

REFINE = "pass posterior='refined', which fits"


def subject_of(guide: Any, joint: JointDensity, *, refined: bool) -> Any:
    """`guide`, or the family to refine in its place, for data simulated in the shape of those of `joint`.

    Raises `InputError` where the guide has no answer to new data: what `refine` returned, a guide that holds parameters
    for each datapoint, and, unless it is to be refined, an autoguide or a family.
    """
    if isinstance(guide, Posterior) and hasattr(guide, "joint"):
        raise InputError(
            "guide: what refine returned belongs to the data it was refined for; pass the guide or family that was "
            "refined, and posterior='refined'"
        )
    if is_family(guide):
        if not refined:
            raise InputError(f"guide: {guide_name(guide)} is a family, not a guide; {REFINE} one to each datapoint")
        return guide
    if not refined and is_autoguide(guide):
        raise InputError(
            f"guide: {guide_name(guide)} holds parameters for each datapoint it was trained on and has none for "
            f"simulated ones; {REFINE} a fresh one to each"
        )
    extended = JointDensity(guide.augment(joint.model), joint.data, joint.plate) if hasattr(guide, "augment") else joint
    density = GuideDensity(guide, None, extended)
    if is_autoguide(guide):
        own = own_family(density)
        if own.kind == "autoguide":
            return own.elsewhere
    if density.bound:
        raise InputError(
            f"guide: its plate '{joint.plate}' has the data set's full size, so it holds parameters for each datapoint "
            "and has none for simulated ones; pass its family, a function family(model) -> guide, and "
            "posterior='refined'"
        )
    return guide


def guide_name(guide: Any) -> str:
    """What a guide or family is called."""
    return str(getattr(guide, "__name__", type(guide).__name__))
