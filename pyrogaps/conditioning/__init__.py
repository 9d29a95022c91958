"""The conditioning gap of guides that are shown only a part of x."""

from pyrogaps.conditioning.conditions import Lookahead, Shown, checked_lookahead, declared
from pyrogaps.conditioning.leaks import check_no_leak
from pyrogaps.conditioning.measure import ConditioningMeasure, conditioning_measure
from pyrogaps.conditioning.posterior import SharedPosterior, shared_posterior
from pyrogaps.conditioning.reference import reference_guide, rehearse_reference
from pyrogaps.conditioning.settings import Conditioning
from pyrogaps.conditioning.simulated import SimulatedData

__all__ = [
    "Conditioning",
    "ConditioningMeasure",
    "Lookahead",
    "SharedPosterior",
    "Shown",
    "SimulatedData",
    "check_no_leak",
    "checked_lookahead",
    "conditioning_measure",
    "declared",
    "reference_guide",
    "rehearse_reference",
    "shared_posterior",
]
