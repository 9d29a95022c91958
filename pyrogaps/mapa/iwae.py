"""`MAPA_IWAE_ELBO`, which keeps the entropy that MAPA's Deltas lack, and the draws that its datapoints share."""

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
from pyrogaps.settings import Count, Name, Whole, checked


@dataclass(frozen=True)
class DrawDensities:
    """Densities of draws z_c, R from each of the D datapoints i that explain x_n; nats.

    `log_joint` `(B, D R)` is log p(x_n, z_c), and `log_q` `(B, D R, D)` is log q(z_c | x_i). `num_rows` is the number
    of rows encoded and decoded, R for each datapoint that takes part.
    """

    log_joint: Tensor
    log_q: Tensor
    num_rows: int


class SharedDraws(Paired):
    r"""Draws $z \sim q_\phi(z|x_i)$ of some datapoints i, and their densities under those and other datapoints.

    `model` is a Pyro model with a data plate, `encoder` an amortized guide. Raises `InputError` as `EmpiricalizedModel`
    does, except that Deltas in the encoder are refused, and so are its sites that cannot be reparametrised, are masked
    or depend on one another.
    """

    def densities(self, indices: Tensor, columns: Tensor, num_draws: int) -> DrawDensities:
        """Densities for n = `indices` `(B,)` and i = `columns` `(B, D)`, with R = `num_draws` draws from each i."""
        unique, positions = torch.cat([indices[:, None], columns], 1).unique(return_inverse=True)
        repeated = unique.repeat(num_draws)
        args = self.fetch(repeated)
        encoded = self.encode(repeated, args)
        sites = self.decode(repeated, args, encoded)
        rows, explaining = positions[:, 0], positions[:, 1:]
        draws = torch.cat([explaining + r * len(unique) for r in range(num_draws)], 1)
        likelihood = [pair_log_likelihood(sites[name], self.plate, rows, draws) for name in self.joint.observed]
        prior = [self._log_prob(sites[name], len(repeated)) for name in encoded]
        log_joint = torch.stack(likelihood).sum(0) + torch.stack(prior).sum(0)[draws]
        return DrawDensities(log_joint, self._log_q(encoded, draws, explaining), len(repeated))

    def _log_q(self, encoded: dict[str, Any], draws: Tensor, explaining: Tensor) -> Tensor:
        """log q(z_c | x_i), c = `draws` `(B, C)` and i = `explaining` `(B, D)`: shape `(B, C, D)`."""
        shape = (*draws.shape, explaining.shape[1])
        columns = explaining[:, None].expand(shape).flatten(0, 1)
        terms = [pair_log_likelihood(site, self.plate, draws.flatten(), columns) for site in encoded.values()]
        return torch.stack(terms).sum(0).reshape(shape)

    def _log_prob(self, site: Any, num_rows: int) -> Tensor:
        """The log-density of a site's value in each row, `(num_rows,)`."""
        axis = plate_dim(site, self.plate)
        assert axis is not None
        return rows_first(site["fn"].log_prob(site["value"]), axis, num_rows)

    def check_encoded(self, sites: dict[str, Any], indices: Tensor, args: tuple[Any, ...]) -> None:
        """Refuse sites without a density or reparametrised draws, and densities that depend on other draws."""
        assert callable(self.encoder)
        moved = {name: site["value"].roll(1, self._value_axis(site)) for name, site in sites.items()}
        with self.joint.plates(indices):
            sites_of_moved = sample_sites(poutine.condition(self.encoder, data=moved), args, "encoder")
        for name, site in sites.items():
            kind = type(leaf(site["fn"])).__name__
            if kind == "Delta":
                raise InputError(f"site '{name}': it is a Delta in the encoder and has no density. Use MAPA_ELBO")
            if is_factor(site["fn"]) or is_masked(site):
                raise InputError(
                    f"site '{name}': it is masked or a pyro.factor in the encoder, so a draw has no known density. "
                    "Use a plain distribution"
                )
            if not site["fn"].has_rsample:
                raise InputError(
                    f"site '{name}': {kind} in the encoder cannot be reparametrised. Use a distribution with rsample"
                )
            if not same_density(*(part["fn"].log_prob(site["value"]) for part in (site, sites_of_moved[name]))):
                raise InputError(
                    f"site '{name}': its density in the encoder depends on other latents, which may belong to other "
                    "datapoints. Make it a function of x alone"
                )

    def _value_axis(self, site: Any) -> int:
        """The data plate's axis in a site's value."""
        axis = plate_dim(site, self.plate)
        if axis is None:
            raise InputError(f"encoder: put its sites inside `with pyro.plate('{self.plate}', len(x))`")
        return axis - int(site["fn"].event_dim)


@checked("MAPA_IWAE_ELBO")
class MAPA_IWAE_ELBO(IndexedELBO):
    r"""A lower bound of log p(x_n) itself, by a mixture of the amortized posteriors of the datapoints that explain x_n.

    D_n holds the K most probable explanations of x_n under MAPA's fixed q(i|x_n), usually including x_n itself, and S
    others drawn from it without replacement. Each of them contributes R draws to an importance-weighted bound. The
    proposal is their mixture:

    $$\mathcal L_n = \mathbb E \log \sum_{i \in D_n} a_{ni} \frac1R \sum_r \frac{p_\theta(x_n, z_{ir})}{q_n(z_{ir})}
      \le \log p_\theta(x_n), \quad z_{ir} \sim q_\phi(z|x_i), \quad q_n(z) = \sum_{i \in D_n} a_{ni} q_\phi(z|x_i)$$

    in nats, with $a_{ni} \propto q(i|x_n)$ over D_n. The terms of one i have the mean $\int a_{ni} q_\phi(z|x_i)
    p_\theta(x_n, z) / q_n(z) dz$. For any D_n and a, these means sum to p(x_n). A draw is decoded once and serves all
    datapoints of a batch that it explains.

    **The entropy.** With K = 1, S = 0, R = 1 this is the ELBO, $\mathbb E_q \log p(x_n|z) + \mathbb E_q \log p(z) +
    H[q_\phi(z|x_n)]$. For a Delta the last term is minus infinity. MAPA avoids it by a prior made of the same Deltas,
    $p(z) = \frac1N \sum_i \delta(z - h(x_i))$: then $p(z_i) / q_n(z_i) = 1 / (N a_{ni})$, and the bound is that of
    `MAPA_ELBO` over D_n. The information of the latent about its datapoint,

    $$I(x; z) = H[\mathbb E_x q(z|x)] - \mathbb E_x H[q(z|x)],$$

    then costs at most log N, however precise the latent is: the entropy of q is missing. In few dimensions, other
    datapoints explain x_n about as well as x_n itself, and this cost is right. In many dimensions, each datapoint is
    explained by itself alone. The model is then an autoencoder whose latents nothing regularises. This bound contains
    the entropy, and its prior is the model's own. So no prior has to be recovered, and `encoder` is the model's guide.

    Pass it to SVI or to `pyrogaps.train` like `MAPA_ELBO`. `encoder` is a Pyro guide with one density for each site,
    of x alone, such as an amortized Normal. With K = 1, S = 0 and R draws it is `IWAE_ELBO(R)`.

    Args:
        posterior, num_top, num_samples, plate: as for `MAPA_ELBO`.
        num_draws: R.

    Raises:
        InputError: as `MAPA_ELBO`; for R < 1; and, at the first step, for encoders that `SharedDraws` refuses.

    Source: MAPA is by Y. Yacoby et al. (AABI 2024, arXiv:2403.08941), who name the missing term. Sampling a mixture
    component by component is the balance heuristic of E. Veach and L. Guibas (SIGGRAPH 1995,
    doi:10.1145/218380.218498).

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> bound = pg.MAPA_IWAE_ELBO(pg.mapa_posterior(x, "gaussian", bandwidth=1.0), num_top=1, num_samples=2)
        >>> pg.train(model, guide, x, objective=bound, num_epochs=2, progress=False).num_epochs
        2
    """

    pairing = SharedDraws

    def __init__(
        self,
        posterior: MapaPosterior,
        *,
        num_top: Whole = 1,
        num_samples: Whole = 0,
        num_draws: Count = 1,
        plate: Name | None = None,
    ) -> None:
        super().__init__(posterior, num_top, num_samples, plate)
        self._check_without_replacement()
        self.num_draws = num_draws

    def draw_bounds(self, joint: SharedDraws, indices: Tensor) -> tuple[Tensor, int]:
        """One draw of the bound for each of `indices`, `(B,)`, and the number of rows encoded and decoded for it."""
        columns, log_mixture = explaining_mixture(self.posterior, indices, self.num_top, self.num_samples)
        densities = joint.densities(indices, columns, self.num_draws)
        log_mixture = log_mixture.to(densities.log_joint)
        log_proposal = (densities.log_q + log_mixture[:, None]).logsumexp(-1)
        # Draws are ordered as in `SharedDraws.densities`: the first draw of every explanation, then the second.
        log_strata = (log_mixture - math.log(self.num_draws)).repeat(1, self.num_draws)
        return (densities.log_joint - log_proposal + log_strata).double().logsumexp(1), densities.num_rows
