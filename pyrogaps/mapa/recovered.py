"""`RecoveredPrior`: a Pyro model whose prior is fitted to latents, which completes a model trained by MAPA."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyrogaps.density import Data
from pyrogaps.density.forms import as_indexed
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.mapa.empiricalized import EmpiricalizedModel
from pyrogaps.mapa.prior import recovered_prior
from pyrogaps.settings import Count, Name, checked

ENCODED_ROWS = 4096


@checked("RecoveredPrior")
class RecoveredPrior(nn.Module):
    r"""`model` with a mixture of Gaussians as the prior of its latent; N(0, I) until `recover` fits it.

    $$p(z) = \sum_k w_k \mathcal N(z; m_k, \Sigma_k), \quad x | z \text{ as in } \texttt{model}$$

    A Pyro model, called as `model` is. `MAPA_ELBO` trains a decoder and an encoder h, and does not constrain the
    distribution of the latents. This model fits it afterwards, and is then a generative model like any other. Buffers
    hold the prior: it is saved and loaded with the weights, and training does not change it.

    Args:
        model: a Pyro model with one latent site, of event shape `(latent_dim,)`, in its data plate.
        latent_dim: D, the latent's dimension.
        max_components: the largest number of components of the mixture.
        site: the latent's name.

    Raises:
        InputError: for sizes below 1; and, when the model runs, for a latent of another shape.
    """

    log_weights: Tensor
    means: Tensor
    scale_tril: Tensor

    def __init__(self, model: nn.Module, latent_dim: Count = 1, max_components: Count = 16, site: Name = "z") -> None:
        super().__init__()
        self.model, self.site, self.max_components = model, site, max_components
        self.register_buffer("log_weights", torch.zeros(1))
        self.register_buffer("means", torch.zeros(1, latent_dim))
        self.register_buffer("scale_tril", torch.eye(latent_dim)[None])
        self._set_mixture(self.log_weights, self.means, self.scale_tril)

    def forward(self, *args: Any) -> Any:
        """Run the model with its latent drawn from the recovered prior; returns the model's result."""
        with _ReplacePrior(self.site, self.prior()):
            return self.model(*args)

    def prior(self) -> Any:
        """p(z), event shape `(latent_dim,)`."""
        components = dist.MultivariateNormal(self.means, scale_tril=self.scale_tril)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.log_weights), components)

    def recover(self, encoder: Program, data: Data, *, plate: str | None = None, seed: int = 0) -> None:
        """Fit the prior to the latents h(x_n) of `data`, by `recovered_prior`.

        Args:
            encoder: a guide whose site is a Delta, as for `MAPA_ELBO`.
            data, plate: as for `EmpiricalizedModel`.
            seed: the seed of the fit.

        Raises:
            InputError: as `EmpiricalizedModel` and `recovered_prior`.
        """
        indexed = as_indexed(data, self.model)
        joint = EmpiricalizedModel(self.model, encoder, indexed, plate)
        with torch.no_grad():
            latents = [
                joint.encode(rows, joint.fetch(rows))[self.site]["value"]
                for rows in torch.arange(len(indexed)).split(ENCODED_ROWS)
            ]
        mixture = recovered_prior(torch.cat(latents), max_components=self.max_components, seed=seed)
        normals = mixture.component_distribution
        self._set_mixture(mixture.mixture_distribution.logits, normals.loc, normals.scale_tril)

    def _set_mixture(self, log_weights: Tensor, means: Tensor, scale_tril: Tensor) -> None:
        """Set the mixture, padded by components of weight 0: a checkpoint's shapes must not depend on the fit."""
        spare = self.max_components - len(log_weights)
        self.log_weights = torch.cat([log_weights, log_weights.new_full((spare,), -math.inf)]).to(self.log_weights)
        self.means = torch.cat([means, means[:1].expand(spare, -1)]).to(self.means)
        self.scale_tril = torch.cat([scale_tril, scale_tril[:1].expand(spare, -1, -1)]).to(self.scale_tril)


class _ReplacePrior(Messenger):
    """Replace the distribution of the site `name` by `prior`."""

    def __init__(self, name: str, prior: Any) -> None:
        super().__init__()
        self.name, self.prior = name, prior

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] != self.name:
            return
        if message["fn"].event_shape != self.prior.event_shape:
            raise InputError(
                f"RecoveredPrior: site '{self.name}' has event shape {tuple(message['fn'].event_shape)}, but the prior "
                f"has {tuple(self.prior.event_shape)}. Set latent_dim to the size of the site"
            )
        message["fn"] = self.prior.expand(message["fn"].batch_shape)
