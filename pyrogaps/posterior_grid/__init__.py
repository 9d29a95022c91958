"""Posteriors over two latent dimensions, true and variational, as densities on a grid."""

from pyrogaps.posterior_grid.grid import posterior_grid
from pyrogaps.posterior_grid.modes import count_modes

__all__ = ["count_modes", "posterior_grid"]
