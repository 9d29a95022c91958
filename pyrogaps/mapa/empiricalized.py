"""The empiricalized model, whose latents are the encoded data set, and its exact posterior."""

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrogaps.density import Data
from pyrogaps.density.forms import as_indexed
from pyrogaps.density.layout import leaf
from pyrogaps.density.runs import Program, evaluating
from pyrogaps.errors import InputError
from pyrogaps.mapa.kernels import CustomKernel
from pyrogaps.mapa.neighbours import BLOCK_ELEMENTS, search
from pyrogaps.mapa.paired import Latents, Paired, pair_log_likelihood
from pyrogaps.mapa.posterior import MapaPosterior, checked_number, first_argument

# The number of datapoints that are decoded at a time for the exact posterior.
COLUMNS = 512


class EmpiricalizedModel(Paired):
    r"""$i \sim U\{1..N\}, \; x|i \sim p_\theta(x|z_i), \; z_i = h_\phi(x_i)$.

    Args:
        model: a Pyro model with a data plate, in which the likelihood depends on z alone. Its prior is not used.
        encoder: h, a Pyro guide whose sites are Deltas, `pyro.sample("z", dist.Delta(h(x), event_dim=1))`; or the
            latents z_i themselves, `(N, *event)`, in a dictionary by site name where there are several sites.
        data: as for `JointDensity`.
        plate: the data plate's name, where it cannot be found.

    Raises:
        InputError: for a model and data that `JointDensity` refuses; for a model without a data plate; for an encoder
            with a site that is no Delta, with other sites than the model's latents, or with values outside their
            support; for a likelihood that is masked, or that depends on the data other than through z.
    """

    def log_likelihood(self, indices: Tensor, columns: Tensor) -> tuple[Tensor, int]:
        """log p(x_n | z_i), n = `indices` `(B,)` and i = `columns` `(B, C)`: shape `(B, C)`, nats.

        Also returns the number of datapoints that were encoded and decoded for it, each of them once.
        """
        unique, positions = torch.cat([indices[:, None], columns], 1).unique(return_inverse=True)
        args = self.fetch(unique)
        sites = self.decode(unique, args, self.encode(unique, args))
        rows, columns = positions[:, 0], positions[:, 1:]
        terms = [pair_log_likelihood(sites[name], self.plate, rows, columns) for name in self.joint.observed]
        return torch.stack(terms).sum(0), len(unique)

    def check_encoded(self, sites: dict[str, Any], indices: Tensor, args: tuple[Any, ...]) -> None:
        """Refuse sites that are no Deltas: an encoder maps x to one z."""
        for name, site in sites.items():
            kind = type(leaf(site["fn"])).__name__
            if kind != "Delta":
                raise InputError(
                    f"site '{name}': it is a {kind} in the encoder, which must be deterministic. Use "
                    f"pyro.sample('{name}', dist.Delta(value, event_dim=...)), or MAPA_IWAE_ELBO"
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

    The exact reference for `mapa_posterior`: with it, the bound of `MAPA_ELBO` for the same model and encoder is tight.
    The model's parameters keep their values, and no gradient flows through the result.

    Args:
        model, encoder, data, plate: as for `EmpiricalizedModel`. The encoder may be the latents, such as the true ones.
        num_neighbours: as for `mapa_posterior`. All N^2 pairs are scored in any case.

    Raises:
        InputError: as `EmpiricalizedModel`, and where a likelihood is NaN or infinite.
    """
    indexed = as_indexed(data, model)
    number = checked_number(num_neighbours, len(indexed))
    joint = EmpiricalizedModel(model, encoder, indexed, plate)
    size = first_argument(indexed)[0].numel()

    def block(rows: Tensor, columns: Tensor) -> Tensor:
        return joint.log_likelihood(rows, columns.expand(len(rows), -1))[0].to(rows.device)

    def log_likelihood(rows: Tensor, columns: Tensor) -> Tensor:
        row_blocks = rows.split(max(1, BLOCK_ELEMENTS // (COLUMNS * size)))
        return torch.cat([torch.cat([block(r, c) for c in columns.split(COLUMNS)], 1) for r in row_blocks])

    programs = [program for program in (model, encoder) if callable(program)]
    with poutine.block(), evaluating(*programs), torch.no_grad():
        neighbours = search(CustomKernel(log_likelihood).compare(torch.arange(len(indexed))), number)
    log_q = torch.log_softmax(neighbours.distances[:, :1] - neighbours.distances, 1)
    return MapaPosterior(indexed, neighbours.indices, log_q)
