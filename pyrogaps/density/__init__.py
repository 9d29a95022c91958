"""The seam to Pyro: models and guides as densities per datapoint."""

from pyrogaps.density.data import Data, IndexedData
from pyrogaps.density.forms import as_indexed
from pyrogaps.density.guide import GuideDensity
from pyrogaps.density.joint import JointDensity

__all__ = ["Data", "GuideDensity", "IndexedData", "JointDensity", "as_indexed"]
