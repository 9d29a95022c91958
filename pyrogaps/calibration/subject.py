"""The guide or family to calibrate, which must apply to new data."""

from typing import Any

from pyrogaps.density.autoguides import is_autoguide
from pyrogaps.density.draws import is_posterior
from pyrogaps.errors import InputError
from pyrogaps.problem import Problem
from pyrogaps.refine import OwnFamily, is_family, own_family
from pyrogaps.refine.families import Family

REFINE_REMEDY = "Pass posterior='refined', which fits"


def subject_of(guide: Any, plain: Problem, *, refined: bool) -> tuple[Problem, OwnFamily | Family | None]:
    """`plain` with the guide to calibrate, and the family to refine.

    Raises `InputError` where the guide does not apply to new data: the result of `refine`, a guide that holds
    parameters for each datapoint, and, unless it is to be refined, an autoguide or a family.
    """
    if is_posterior(guide):
        raise InputError(
            "guide: a refined guide fits only the data it was refined on. Pass the original guide or family, with "
            "posterior='refined'"
        )
    if is_family(guide):
        if not refined:
            raise InputError(
                f"guide: {guide_name(guide)} is a family, not a guide. {REFINE_REMEDY} a guide to each datapoint"
            )
        return plain, guide
    if not refined and is_autoguide(guide):
        raise InputError(
            f"guide: {guide_name(guide)} has no parameters for simulated datapoints. {REFINE_REMEDY} a new guide to "
            "each of them"
        )
    problem = plain.with_guide(guide)
    density = problem.guide_density()
    own = own_family(density) if refined else None
    if own is not None and own.fresh is not None:
        return plain, own
    if density.bound:
        raise InputError(
            f"guide: its plate '{problem.plate}' has the size of the data set, so it has no parameters for simulated "
            "datapoints. Pass the guide's family, a function family(model) -> guide, and posterior='refined'"
        )
    return problem, own


def guide_name(guide: Any) -> str:
    """The name of a guide or family."""
    return str(getattr(guide, "__name__", type(guide).__name__))
