"""A trained guide as ArviZ knows posteriors: a DataTree of draws, and leave-one-out cross-validation where it holds."""

from pyrogaps.posterior_export.loo import loo
from pyrogaps.posterior_export.tree import to_datatree

__all__ = ["loo", "to_datatree"]
