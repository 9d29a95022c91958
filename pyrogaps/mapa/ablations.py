"""The exact reference for MAPA: the empiricalized model's own posterior."""

import torch
from pyro import poutine
from torch import Tensor

from pyrogaps.density import Data
from pyrogaps.density.data import as_indexed
from pyrogaps.density.runs import Program, evaluating
from pyrogaps.mapa.empiricalized import EmpiricalizedModel
from pyrogaps.mapa.kernels import OwnKernel
from pyrogaps.mapa.neighbours import BLOCK_ELEMENTS, search
from pyrogaps.mapa.paired import Latents
from pyrogaps.mapa.posterior import MapaPosterior, checked_number, first_argument

COLUMNS = 512


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
