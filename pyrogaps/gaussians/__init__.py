"""Gaussians for each datapoint, fitted by moments or by curvature."""

from pyrogaps.gaussians.anchor import MAX_DIM, anchor_of, fitted, prior_gaussian, settled_by_curvature
from pyrogaps.gaussians.curvature import Curvature, gaussian_by_curvature, longest_step
from pyrogaps.gaussians.distance import bhattacharyya
from pyrogaps.gaussians.gaussian import Gaussian
from pyrogaps.gaussians.low_rank import LowRank
from pyrogaps.gaussians.low_rank_curvature import gaussian_by_low_rank_curvature
from pyrogaps.gaussians.moments import gaussian_by_moments, gaussian_of

__all__ = [
    "MAX_DIM",
    "Curvature",
    "Gaussian",
    "LowRank",
    "anchor_of",
    "bhattacharyya",
    "fitted",
    "gaussian_by_curvature",
    "gaussian_by_low_rank_curvature",
    "gaussian_by_moments",
    "gaussian_of",
    "longest_step",
    "prior_gaussian",
    "settled_by_curvature",
]
