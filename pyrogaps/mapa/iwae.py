"""`MAPA_IWAE_ELBO`: MAPA with the entropy that its Deltas lack, for latents of many dimensions."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrogaps.density.layout import leaf, plate_dim, rows_first
from pyrogaps.density.rows import same_density
from pyrogaps.density.structure import is_factor, is_masked, sample_sites
from pyrogaps.errors import InputError
from pyrogaps.mapa.elbo import IndexedELBO
from pyrogaps.mapa.explainers import explaining_mixture
from pyrogaps.mapa.paired import Paired, pair_log_likelihood
from pyrogaps.mapa.posterior import MapaPosterior


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


class MAPA_IWAE_ELBO(IndexedELBO):
    r"""A lower bound of log p(x_n) itself, by a mixture of the amortized posteriors of what explains x_n.

    D_n are the K most probable explanations of x_n under MAPA's fixed q(i|x_n), itself among them as a rule, and S
    others drawn from it without replacement. Each of them gives R draws to an importance-weighted bound whose proposal
    is their mixture:

    $$\mathcal L_n = \mathbb E \log \sum_{i \in D_n} a_{ni} \frac1R \sum_r \frac{p_\theta(x_n, z_{ir})}{q_n(z_{ir})}
      \le \log p_\theta(x_n), \quad z_{ir} \sim q_\phi(z|x_i), \quad q_n(z) = \sum_{i \in D_n} a_{ni} q_\phi(z|x_i)$$

    in nats, with $a_{ni} \propto q(i|x_n)$ over D_n. The terms of one i have the mean $\int a_{ni} q_\phi(z|x_i)
    p_\theta(x_n, z) / q_n(z) dz$, and these sum to p(x_n), whatever D_n and a are. A draw serves all datapoints of a
    batch that it explains, and is decoded once.

    **The entropy.** With K = 1, S = 0, R = 1 this is the ELBO, $\mathbb E_q \log p(x_n|z) + \mathbb E_q \log p(z) +
    H[q_\phi(z|x_n)]$. For a Delta the last term is minus infinity. MAPA escapes that by a prior made of the same
    Deltas, $p(z) = \frac1N \sum_i \delta(z - h(x_i))$: then $p(z_i) / q_n(z_i) = 1 / (N a_{ni})$, and the bound is that
    of `MAPA_ELBO` over D_n. So what the latent says about its datapoint,

    $$I(x; z) = H[\mathbb E_x q(z|x)] - \mathbb E_x H[q(z|x)],$$

    costs log N at the most, however finely it says it: the entropy of q is what is missing. In few dimensions other
    datapoints explain x_n about as well as itself, and the price is right. In many, each is explained by itself alone,
    and the model is an autoencoder whose latents nothing holds together. Here the term is back, and the prior is the
    model's own, so that none has to be recovered and `encoder` is the model's guide.

    Hand it to SVI or to `pyrogaps.train` as you would `MAPA_ELBO`; `encoder` is a Pyro guide with one density for each
    site, of x alone, such as an amortized Normal. With K = 1, S = 0 and R draws it is `IWAE_ELBO(R)`.

    Args:
        posterior, num_top, num_samples, plate: as for `MAPA_ELBO`.
        num_draws: R.

    Raises:
        InputError: as `MAPA_ELBO`; for R < 1; and, at the first step, for encoders that `SharedDraws` refuses.

    Source: MAPA is Y. Yacoby et al. (AABI 2024, arXiv:2403.08941), who name the missing term; sampling a mixture
    component by component is E. Veach and L. Guibas' balance heuristic (SIGGRAPH 1995, doi:10.1145/218380.218498).
    """

    pairing = SharedDraws

    def __init__(
        self,
        posterior: MapaPosterior,
        *,
        num_top: int = 1,
        num_samples: int = 0,
        num_draws: int = 1,
        plate: str | None = None,
    ) -> None:
        super().__init__(posterior, num_top, num_samples, plate)
        self._check_without_replacement()
        if num_draws < 1:
            raise InputError(f"{self.name}: num_draws must be at least 1, got {num_draws}")
        self.num_draws = num_draws

    def draw_bounds(self, joint: SharedDraws, indices: Tensor) -> tuple[Tensor, int]:
        """One draw of the bound for each of `indices`, `(B,)`, and how many rows were encoded and decoded for it."""
        columns, log_mixture = explaining_mixture(self.posterior, indices, self.num_top, self.num_samples)
        found = joint.weigh(indices, columns, self.num_draws)
        log_mixture = log_mixture.to(found.log_joint)
        log_proposal = (found.log_q + log_mixture[:, None]).logsumexp(-1)
        # The first draw of every explanation comes before the second of any.
        log_strata = (log_mixture - math.log(self.num_draws)).repeat(1, self.num_draws)
        return (found.log_joint - log_proposal + log_strata).double().logsumexp(1), found.num_rows
