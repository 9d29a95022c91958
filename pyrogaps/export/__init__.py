"""Export to ArviZ: a DataTree of draws, and leave-one-out cross-validation."""

from pyrogaps.export.loo import loo
from pyrogaps.export.tree import to_datatree

__all__ = ["loo", "to_datatree"]
