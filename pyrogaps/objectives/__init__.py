"""Losses for `pyro.infer.SVI` that handle plates correctly."""

from pyrogaps.objectives.iwae import IWAE_ELBO

__all__ = ["IWAE_ELBO"]
