"""Models that were not written in Pyro, as pairs of a Pyro model and a Pyro guide, and data that are not in memory."""

from pyrogaps.adapters.anndata import from_anndata
from pyrogaps.adapters.obs import to_obs
from pyrogaps.adapters.scvi import from_scvi
from pyrogaps.adapters.stored import from_arrays
from pyrogaps.adapters.torch import from_torch

__all__ = ["from_anndata", "from_arrays", "from_scvi", "from_torch", "to_obs"]
