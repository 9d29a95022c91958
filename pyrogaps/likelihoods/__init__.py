"""Likelihoods that the library and its models share."""

from pyrogaps.likelihoods.discretised_logistic import DiscretisedLogistic

__all__ = ["DiscretisedLogistic"]
