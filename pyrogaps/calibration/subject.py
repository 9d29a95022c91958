"""The guide or family to calibrate, which must apply to new data."""

from typing import Any

from pyrogaps.density.autoguides import is_autoguide
from pyrogaps.errors import InputError
from pyrogaps.problem import Problem, is_posterior
from pyrogaps.refine import OwnFamily, is_family, own_family
from pyrogaps.refine.families import Family

REFINE_REMEDY = "pass posterior='refined', which fits"


def subject_of(guide: Any, plain: Problem, *, refined: bool) -> tuple[Problem, OwnFamily | Family | None]:
    """`plain` with the guide to calibrate, and the family to refine.

    Raises `InputError` where the guide does not apply to new data: the result of `refine`, a guide that holds
    parameters for each datapoint, and, unless it is to be refined, an autoguide or a family.
    """
    if is_posterior(guide):
        raise InputError(
            "guide: the result of refine holds only for the data it was refined on; pass the guide or family that was "
            "refined, and posterior='refined'"
        )
    if is_family(guide):
        if not refined:
            raise InputError(
                f"guide: {guide_name(guide)} is a family, not a guide; {REFINE_REMEDY} one to each datapoint"
            )
        return plain, guide
    if not refined and is_autoguide(guide):
        raise InputError(
            f"guide: {guide_name(guide)} holds parameters for each datapoint of its training data, but none for "
            f"simulated ones; {REFINE_REMEDY} a fresh one to each"
        )
    problem = plain.with_guide(guide)
    density = problem.guide_density()
    own = own_family(density) if refined else None
    if own is not None and own.fresh is not None:
        return plain, own
    if density.bound:
        raise InputError(
            f"guide: it holds parameters for each datapoint (the plate '{problem.plate}' has the data set's full "
            "size), but none for simulated ones. Pass its family, a function family(model) -> guide, and "
            "posterior='refined'"
        )
    return problem, own


def guide_name(guide: Any) -> str:
    """The name of a guide or family."""
    return str(getattr(guide, "__name__", type(guide).__name__))
