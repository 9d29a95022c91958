"""The empiricalized model: a Pyro model whose latents are what an encoder makes of the data set."""

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrogaps.density import Data
from pyrogaps.density.data import as_indexed
from pyrogaps.density.layout import leaf
from pyrogaps.density.runs import Program, evaluating
from pyrogaps.errors import InputError
from pyrogaps.mapa.kernels import OwnKernel
from pyrogaps.mapa.neighbours import BLOCK_ELEMENTS, search
from pyrogaps.mapa.paired import Latents, Paired, pair_log_likelihood
from pyrogaps.mapa.posterior import MapaPosterior, checked_number, first_argument

COLUMNS = 512


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


def empiricalized_posterior(
    model: Program,
    encoder: Program | Latents,
    data: Data,
    *,
    num_neighbours: int | None = None,
    plate: str | None = None,
) -> MapaPosterior:
    r"""MAPA-GT: the true posterior of the empiricalized model, $q(i|x_n) = p(x_n|z_i) / \sum_j p(x_n|z_j)$.

    The bound of `MAPA_ELBO` for the same model and encoder is tight with it. The model's parameters are taken as they
    are; no gradient flows through the result.

    Args:
        model, encoder, data, plate: as for `EmpiricalizedModel`. The encoder may be the latents, the true ones, say.
        num_neighbours: as for `mapa_posterior`. All N^2 pairs are scored in any case.

    Raises:
        InputError: as `EmpiricalizedModel`, and where a likelihood is NaN or infinite.
    """
    indexed = as_indexed(data)
    number = checked_number(num_neighbours, len(indexed))
    joint = EmpiricalizedModel(model, encoder, indexed, plate)

    size = first_argument(indexed)[0].numel()

    def log_likelihood(rows: Tensor, columns: Tensor) -> Tensor:
        def scored(some: Tensor, others: Tensor) -> Tensor:
            return joint.log_likelihood(some, others.expand(len(some), -1))[0].to(some.device)

        parts = rows.split(max(1, BLOCK_ELEMENTS // (COLUMNS * size)))
        return torch.cat([torch.cat([scored(part, others) for others in columns.split(COLUMNS)], 1) for part in parts])

    programs = [program for program in (model, encoder) if callable(program)]
    with poutine.block(), evaluating(*programs), torch.no_grad():
        found = search(OwnKernel(log_likelihood).compare(torch.arange(len(indexed))), number)
    log_q = torch.log_softmax(found.distances[:, :1] - found.distances, 1)
    return MapaPosterior(indexed, found.indices, log_q)
