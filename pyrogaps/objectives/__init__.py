"""Losses for `pyro.infer.SVI` that are right under plates."""

from pyrogaps.objectives.iwae import IWAE_ELBO

__all__ = ["IWAE_ELBO"]
