"""Models that were not written in Pyro, as pairs of a Pyro model and a Pyro guide."""

from pyrogaps.adapters.torch import from_torch

__all__ = ["from_torch"]
