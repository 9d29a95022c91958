"""Posteriors over two latent dimensions, true and variational, as densities on a grid."""

from pyrogaps.grid.grid import posterior_grid
from pyrogaps.grid.modes import count_modes

__all__ = ["count_modes", "posterior_grid"]
