"""`loo`: leave-one-out cross-validation from a guide's draws, where the latents are global."""

from typing import Annotated, cast

import numpy as np
import xarray as xr
from arviz_stats.loo import loo_approximate_posterior
from arviz_stats.utils import ELPDData

from pyrogaps.errors import InputError
from pyrogaps.export.record import DATAPOINT
from pyrogaps.export.tree import GLOBAL, LOCAL, SAMPLE_DIMS
from pyrogaps.settings import Name, checked
from pyrogaps.trees import saved

MIN_DRAWS = 25  # a Pareto tail is fitted to the largest fifth of the ratios, at least five
NEEDED = {"log_likelihood": (), "sample_stats": ("log_p", "log_q")}


@checked()
def loo(
    tree: Annotated[xr.DataTree, saved("result of to_datatree")],
    *,
    var_name: Name | None = None,
    pointwise: bool | None = None,
) -> ELPDData:
    r"""PSIS-LOO of a tree from `to_datatree`, corrected by the guide's own importance ratios.

    $$\widehat{\mathrm{elpd}} = \sum_n \log \frac{\sum_s r_{ns}\, p(x_n \mid z_s)}{\sum_s r_{ns}}, \quad
      r_{ns} = \frac{p(x, z_s)}{q(z_s)} \frac{1}{p(x_n \mid z_s)}, \quad z_s \sim q$$

    with Pareto-smoothed $r_{ns}$ (Vehtari et al., arXiv:1507.04544; for approximate posteriors Magnusson et al., 2019,
    arXiv:1904.10679). The estimate is of $\sum_n \log p(x_n \mid x_{-n})$ under the *model's* posterior, consistent
    for any guide that covers it; Pareto k-hat, one for every observation, says when the guide does not.

    Args:
        tree: the result of `to_datatree` with global latents. Local latents are refused: the posterior without x_n does
            not constrain z_n, so $1/p(x_n|z_n)$ has infinite variance. Their predictive density is log p(x_n).
        var_name: the observed site, needed where there are several.
        pointwise: whether to keep `elpd_i` and `pareto_k` of every observation; None: as in ArviZ's settings.

    Returns:
        ArviZ's `ELPDData`, in nats: `elpd`, its standard error `se` over observations, and `p`, the effective number
        of parameters (how far `elpd` lies below the density in the sample, for which ArviZ takes the guide's draws as
        they are). Observations that a mask hides are left out.

    Raises:
        InputError: for local latents, with the reason; for a tree that `to_datatree` did not write, fewer than 25
            draws, a site that is not in the tree, observations that no plate or batch shape tells apart, and densities
            that are infinite.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyrogaps as pg
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)): pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> guide = lambda y: pyro.sample("mean", dist.Normal(y.sum() / (len(y) + 1), (len(y) + 1) ** -0.5))
        >>> int(pg.loo(pg.to_datatree(model, guide, torch.randn(20))).n_data_points)
        20
    """
    _check_tree(tree)
    name = _site(tree, var_name)
    pointwise_density: xr.DataArray = tree["log_likelihood"].to_dataset()[name]
    observations = [dim for dim in pointwise_density.dims if dim not in SAMPLE_DIMS]
    if not observations:
        raise InputError(
            f"site '{name}': leave-one-out needs several observations, but this site has one. Put it in a plate, and "
            "remove the plate's dimension from to_event"
        )
    hidden = pointwise_density.isnull().all(SAMPLE_DIMS)
    if bool(hidden.any()):
        pointwise_density = pointwise_density.stack(observation=observations)
        pointwise_density = pointwise_density[..., ~hidden.stack(observation=observations).values]
    log_p, log_q = (tree["sample_stats"].to_dataset()[density] for density in NEEDED["sample_stats"])
    for what, density in (("log_likelihood", pointwise_density), ("log_p", log_p), ("log_q", log_q)):
        if not bool(np.isfinite(density).all()):
            raise InputError(
                f"tree: {what} is infinite at some draws, which lie outside the model's support. Restrict the guide's "
                "support to the model's"
            )
    one_site = xr.DataTree.from_dict({"log_likelihood": xr.Dataset({name: pointwise_density})})
    result = loo_approximate_posterior(one_site, log_p, log_q, pointwise, name)  # type: ignore[no-untyped-call]
    return cast(ELPDData, result)


def _check_tree(tree: xr.DataTree) -> None:
    if not isinstance(tree, xr.DataTree) or "latents" not in tree.attrs:
        raise InputError("tree: it is not a result of pyrogaps.to_datatree")
    if tree.attrs["latents"] != GLOBAL:
        remedy = (
            f"The predictive density of a {DATAPOINT} is log p(x): use log_evidence of decompose, or ais"
            if tree.attrs["latents"] == LOCAL
            else "Sum or integrate it out in the model, or leave out whole groups"
        )
        raise InputError(
            f"tree: each observation has a latent of its own "
            f"({tree.attrs['local_latents']}), so the importance weights of loo have infinite variance. {remedy}"
        )
    for group, variables in NEEDED.items():
        missing = [group] if group not in tree.children else [n for n in variables if n not in tree[group]]
        if missing:
            raise InputError(
                f"tree: it has no {missing[0]}, which loo needs. Create the tree with pyrogaps.to_datatree"
            )
    if (draws := tree["sample_stats"].sizes["draw"]) < MIN_DRAWS:
        raise InputError(
            f"tree: loo needs at least {MIN_DRAWS} draws, but it has {draws}. Raise num_draws of to_datatree"
        )


def _site(tree: xr.DataTree, var_name: str | None) -> str:
    sites = [str(name) for name in tree["log_likelihood"].data_vars]
    if var_name is None and len(sites) > 1:
        raise InputError(f"var_name: the tree has several observed sites. Name one of {', '.join(sites)}")
    if var_name is not None and var_name not in sites:
        raise InputError(f"var_name: no observed site '{var_name}' in the tree. It has {', '.join(sites)}")
    return sites[0] if var_name is None else var_name
