"""The empiricalized model: a Pyro model whose latents are what an encoder makes of the data set."""

from typing import Any

import torch
from torch import Tensor

from pyrogaps.density.layout import leaf
from pyrogaps.errors import InputError
from pyrogaps.mapa.paired import Paired
from pyrogaps.mapa.pairs import pair_log_likelihood


class EmpiricalizedModel(Paired):
    r"""$i \sim U\{1..N\}, \; x|i \sim p_\theta(x|z_i), \; z_i = h_\phi(x_i)$.

    Args:
        model: a Pyro model with a data plate, in which the likelihood depends on z alone. Its prior plays no part.
        encoder: h: a Pyro guide whose sites are Deltas, `pyro.sample("z", dist.Delta(h(x), event_dim=1))`; or the
            latents z_i themselves, `(N, *event)`, by the name of their site where there are several.
        data: as for `JointDensity`.
        plate: the data plate's name, where it cannot be found.

    Raises:
        InputError: what `JointDensity` refuses in a model and data; a model without a data plate; an encoder with a
            site that is no Delta, with other sites than the model's latents, or outside their support; a likelihood
            that is masked, or depends on the data other than through z.
    """

    def log_likelihood(self, indices: Tensor, columns: Tensor) -> tuple[Tensor, int]:
        """log p(x_n | z_i), n = `indices` `(B,)` and i = `columns` `(B, C)`: shape `(B, C)`, nats.

        Also the number of datapoints that were encoded and decoded for it, each once.
        """
        unique, positions = torch.cat([indices[:, None], columns], 1).unique(return_inverse=True)
        args = self.fetch(unique)
        sites = self.decode(unique, args, self.encode(unique, args))
        rows, columns = positions[:, 0], positions[:, 1:]
        terms = [pair_log_likelihood(sites[name], self.plate, rows, columns) for name in self.joint.observed]
        return torch.stack(terms).sum(0), len(unique)

    def check_encoded(self, sites: dict[str, Any], indices: Tensor, args: tuple[Any, ...]) -> None:
        """Refuse what is no Delta: an encoder maps x to one z."""
        for name, site in sites.items():
            if type(leaf(site["fn"])).__name__ != "Delta":
                raise InputError(
                    f"site '{name}': a {type(leaf(site['fn'])).__name__} in the encoder, which must map x to one z; "
                    f"make it pyro.sample('{name}', dist.Delta(value, event_dim=...)), or use MAPA_IWAE_ELBO"
                )
