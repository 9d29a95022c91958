"""Per-datapoint refinement: the best guide of a family for every datapoint, q* = argmax_q ELBO(x; q)."""

from pyrogaps.refine.families import is_family
from pyrogaps.refine.own import OwnFamily, own_family
from pyrogaps.refine.refine import RefinedGuide, refine, refine_all
from pyrogaps.refine.refiner import Refiner
from pyrogaps.refine.settings import Refinement

__all__ = ["OwnFamily", "RefinedGuide", "Refinement", "Refiner", "is_family", "own_family", "refine", "refine_all"]
