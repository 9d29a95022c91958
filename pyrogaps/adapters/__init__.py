"""Models that were not written in Pyro, as pairs of a Pyro model and a Pyro guide."""

from pyrogaps.adapters.obs import to_obs
from pyrogaps.adapters.scvi import from_scvi
from pyrogaps.adapters.torch import from_torch

__all__ = ["from_scvi", "from_torch", "to_obs"]
