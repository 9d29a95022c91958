"""Draws of z from the amortized posteriors of some datapoints, weighed as explanations of others too."""

from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrogaps.density.layout import leaf, plate_dim, rows_first
from pyrogaps.density.rows import same_density
from pyrogaps.density.structure import is_factor, is_masked, sample_sites
from pyrogaps.errors import InputError
from pyrogaps.mapa.paired import Paired
from pyrogaps.mapa.pairs import pair_log_likelihood


@dataclass(frozen=True)
class Weighed:
    """Terms of the weights of draws z_c, R of each of the datapoints i_1..i_D that explain x_n; nats.

    `log_joint` `(B, D R)` is log p(x_n, z_c), `log_q` `(B, D R, D)` is log q(z_c | x_i); `num_rows` were
    encoded and decoded: R times each datapoint that takes part.
    """

    log_joint: Tensor
    log_q: Tensor
    num_rows: int


class SharedDraws(Paired):
    r"""$z \sim q_\phi(z|x_i)$ of some datapoints i, and its densities beside those of others.

    `model` and `encoder` are a Pyro model with a data plate and an amortized guide. Raises `InputError` as
    `EmpiricalizedModel` does, but for an encoder whose sites are Deltas, cannot be reparametrised, are masked, or
    depend on one another.
    """

    def weigh(self, indices: Tensor, columns: Tensor, num_draws: int) -> Weighed:
        """The terms for n = `indices` `(B,)` and i = `columns` `(B, D)`, with R = `num_draws` draws of each i."""
        unique, positions = torch.cat([indices[:, None], columns], 1).unique(return_inverse=True)
        drawn = unique.repeat(num_draws)
        args = self.fetch(drawn)
        encoded = self.encode(drawn, args)
        sites = self.decode(drawn, args, encoded)
        rows, explained = positions[:, 0], positions[:, 1:]
        draws = torch.cat([explained + r * len(unique) for r in range(num_draws)], 1)
        likelihood = [pair_log_likelihood(sites[name], self.plate, rows, draws) for name in self.joint.observed]
        prior = [self._of_rows(sites[name], len(drawn)) for name in encoded]
        log_joint = torch.stack(likelihood).sum(0) + torch.stack(prior).sum(0)[draws]
        return Weighed(log_joint, self._log_q(encoded, draws, explained), len(drawn))

    def _log_q(self, encoded: dict[str, Any], draws: Tensor, explained: Tensor) -> Tensor:
        """log q(z_c | x_i), c = `draws` `(B, C)` and i = `explained` `(B, D)`: shape `(B, C, D)`."""
        shape = (*draws.shape, explained.shape[1])
        columns = explained[:, None].expand(shape).flatten(0, 1)
        terms = [pair_log_likelihood(site, self.plate, draws.flatten(), columns) for site in encoded.values()]
        return torch.stack(terms).sum(0).reshape(shape)

    def _of_rows(self, site: Any, rows: int) -> Tensor:
        axis = plate_dim(site, self.plate)
        assert axis is not None
        return rows_first(site["fn"].log_prob(site["value"]), axis, rows)

    def check_encoded(self, sites: dict[str, Any], indices: Tensor, args: tuple[Any, ...]) -> None:
        """Refuse what has no density, no reparametrised draws, or a density that other draws would change."""
        assert callable(self.encoder)
        moved = {name: site["value"].roll(1, self._value_axis(site)) for name, site in sites.items()}
        with self.joint.plates(indices):
            others = sample_sites(poutine.condition(self.encoder, data=moved), args)
        for name, site in sites.items():
            kind = type(leaf(site["fn"])).__name__
            if kind == "Delta":
                raise InputError(f"site '{name}': a Delta in the encoder has no density; use MAPA_ELBO")
            if is_factor(site["fn"]) or is_masked(site):
                raise InputError(f"site '{name}': masked, or a pyro.factor, so its density is not that of a draw")
            if not site["fn"].has_rsample:
                raise InputError(f"site '{name}': {kind} in the encoder cannot be reparametrised; use one that can")
            if not same_density(*(part["fn"].log_prob(site["value"]) for part in (site, others[name]))):
                raise InputError(
                    f"site '{name}': its density in the encoder depends on other draws, which are other datapoints'; "
                    "make it a function of x alone"
                )

    def _value_axis(self, site: Any) -> int:
        axis = plate_dim(site, self.plate)
        if axis is None:
            raise InputError(f"encoder: put its sites inside `with pyro.plate('{self.plate}', len(x))`")
        return axis - int(site["fn"].event_dim)
