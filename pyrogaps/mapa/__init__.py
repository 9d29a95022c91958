"""MAPA: train a generative model against a posterior known before training."""

from pyrogaps.mapa.ablations import empiricalized_posterior, uniform_posterior
from pyrogaps.mapa.batches import neighbourhood_batches
from pyrogaps.mapa.elbo import MAPA_ELBO
from pyrogaps.mapa.empiricalized import EmpiricalizedModel
from pyrogaps.mapa.explainers import explainers, log_weights_without_replacement
from pyrogaps.mapa.kernels import BernoulliKernel, ContinuousBernoulliKernel, GaussianKernel, Kernel
from pyrogaps.mapa.posterior import MapaPosterior, mapa_posterior
from pyrogaps.mapa.prior import MonotoneTransport, recovered_prior, recovered_transport

__all__ = [
    "MAPA_ELBO",
    "BernoulliKernel",
    "ContinuousBernoulliKernel",
    "EmpiricalizedModel",
    "GaussianKernel",
    "Kernel",
    "MapaPosterior",
    "MonotoneTransport",
    "empiricalized_posterior",
    "explainers",
    "log_weights_without_replacement",
    "mapa_posterior",
    "neighbourhood_batches",
    "recovered_prior",
    "recovered_transport",
    "uniform_posterior",
]
