"""Likelihoods that the library and its models share: distributions of ours, and those that are called by a name."""

from pyrogaps.likelihoods.counts import NegativeBinomial, ZeroInflatedNegativeBinomial
from pyrogaps.likelihoods.discretised_logistic import DiscretisedLogistic
from pyrogaps.likelihoods.named import LIKELIHOODS, OUTPUTS, Likelihood, Output

__all__ = [
    "LIKELIHOODS",
    "OUTPUTS",
    "DiscretisedLogistic",
    "Likelihood",
    "NegativeBinomial",
    "Output",
    "ZeroInflatedNegativeBinomial",
]
