"""MAPA: training a generative model against a posterior known before training."""

from pyrogaps.mapa.aggregated import aggregated_transport
from pyrogaps.mapa.continuous_bernoulli import ContinuousBernoulliKernel
from pyrogaps.mapa.elbo import MAPA_ELBO
from pyrogaps.mapa.empiricalized import EmpiricalizedModel, empiricalized_posterior
from pyrogaps.mapa.explainers import explainers, log_weights_without_replacement
from pyrogaps.mapa.iwae import MAPA_IWAE_ELBO
from pyrogaps.mapa.kernels import BernoulliKernel, GaussianKernel, Kernel
from pyrogaps.mapa.posterior import MapaPosterior, mapa_posterior
from pyrogaps.mapa.prior import MonotoneTransport, recovered_prior, recovered_transport
from pyrogaps.mapa.recovered import RecoveredPrior
from pyrogaps.mapa.settings import Mapa, rehearse_mapa, train_by_mapa

__all__ = [
    "MAPA_ELBO",
    "MAPA_IWAE_ELBO",
    "BernoulliKernel",
    "ContinuousBernoulliKernel",
    "EmpiricalizedModel",
    "GaussianKernel",
    "Kernel",
    "Mapa",
    "MapaPosterior",
    "MonotoneTransport",
    "RecoveredPrior",
    "aggregated_transport",
    "empiricalized_posterior",
    "explainers",
    "log_weights_without_replacement",
    "mapa_posterior",
    "recovered_prior",
    "recovered_transport",
    "rehearse_mapa",
    "train_by_mapa",
]
