"""Gaussians for each datapoint, fitted by moments or by curvature."""

from pyrogaps.gaussians.anchor import MAX_DIM, anchor_of, prior_gaussian
from pyrogaps.gaussians.curvature import Curvature, gaussian_by_curvature
from pyrogaps.gaussians.gaussian import Gaussian
from pyrogaps.gaussians.moments import gaussian_by_moments, gaussian_of

__all__ = [
    "MAX_DIM",
    "Curvature",
    "Gaussian",
    "anchor_of",
    "gaussian_by_curvature",
    "gaussian_by_moments",
    "gaussian_of",
    "prior_gaussian",
]
