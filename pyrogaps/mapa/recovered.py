"""`RecoveredPrior`: a Pyro model whose prior is learned from latents, so that MAPA leaves a whole generative model."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyrogaps.density import Data
from pyrogaps.density.data import as_indexed
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.mapa.empiricalized import EmpiricalizedModel
from pyrogaps.mapa.prior import recovered_prior

ROWS = 4096


class RecoveredPrior(nn.Module):
    r"""`model` with a mixture of Gaussians for the prior of its latent, N(0, I) until `recover` fits it.

    $$p(z) = \sum_k w_k \mathcal N(z; m_k, \Sigma_k), \quad x | z \text{ as in } \texttt{model}$$

    A Pyro model, called as `model` is. `MAPA_ELBO` trains a decoder and an encoder h, and leaves the distribution of
    the latents to itself; this model learns it afterwards, and its log p(x), guides and gaps are then those of any
    other. The prior is held in buffers: it is saved and loaded with the weights, and no training moves it.

    Args:
        model: a Pyro model with one latent site, of event shape `(latent_dim,)`, in its data plate.
        latent_dim: D.
        max_components: of the mixture.
        site: the latent's name.

    Raises:
        InputError: where the latent has another shape, when the model runs; for sizes below 1.
    """

    log_weights: Tensor
    means: Tensor
    scale_tril: Tensor

    def __init__(self, model: nn.Module, latent_dim: int = 1, max_components: int = 16, site: str = "z") -> None:
        super().__init__()
        for name, value in (("latent_dim", latent_dim), ("max_components", max_components)):
            if value < 1:
                raise InputError(f"RecoveredPrior: {name} must be at least 1, got {value}")
        self.model, self.site, self.max_components = model, site, max_components
        self.register_buffer("log_weights", torch.zeros(1))
        self.register_buffer("means", torch.zeros(1, latent_dim))
        self.register_buffer("scale_tril", torch.eye(latent_dim)[None])
        self._hold(self.log_weights, self.means, self.scale_tril)

    def forward(self, *args: Any) -> Any:
        """Run the model, its latent drawn from the recovered prior; returns what it returns."""
        with _WithPrior(self.site, self.prior()):
            return self.model(*args)

    def prior(self) -> Any:
        """p(z), event shape `(latent_dim,)`."""
        components = dist.MultivariateNormal(self.means, scale_tril=self.scale_tril)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.log_weights), components)

    def recover(self, encoder: Program, data: Data, *, plate: str | None = None, seed: int = 0) -> None:
        """Fit the prior to the latents h(x_n) of `data`, by `recovered_prior`.

        `encoder` is a guide whose site is a Delta, as for `MAPA_ELBO`. Raises `InputError` as `EmpiricalizedModel` and
        `recovered_prior` do.
        """
        indexed = as_indexed(data)
        joint = EmpiricalizedModel(self.model, encoder, indexed, plate)
        with torch.no_grad():
            parts = [
                joint.encode(rows, joint.fetch(rows))[self.site]["value"]
                for rows in torch.arange(len(indexed)).split(ROWS)
            ]
        mixture = recovered_prior(torch.cat(parts), max_components=self.max_components, seed=seed)
        normals = mixture.component_distribution
        self._hold(mixture.mixture_distribution.logits, normals.loc, normals.scale_tril)

    def _hold(self, log_weights: Tensor, means: Tensor, scale_tril: Tensor) -> None:
        """Keep a mixture, filled up by components without weight: a checkpoint's shapes must not depend on the fit."""
        spare = self.max_components - len(log_weights)
        self.log_weights = torch.cat([log_weights, log_weights.new_full((spare,), -math.inf)]).to(self.log_weights)
        self.means = torch.cat([means, means[:1].expand(spare, -1)]).to(self.means)
        self.scale_tril = torch.cat([scale_tril, scale_tril[:1].expand(spare, -1, -1)]).to(self.scale_tril)


class _WithPrior(Messenger):
    """Draws the site `name` from `prior`."""

    def __init__(self, name: str, prior: Any) -> None:
        super().__init__()
        self.name, self.prior = name, prior

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] != self.name:
            return
        if message["fn"].event_shape != self.prior.event_shape:
            raise InputError(
                f"RecoveredPrior: site '{self.name}' has event shape {tuple(message['fn'].event_shape)}, not "
                f"{tuple(self.prior.event_shape)}; set latent_dim"
            )
        message["fn"] = self.prior.expand(message["fn"].batch_shape)
