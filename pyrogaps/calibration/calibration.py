"""`Calibration`: the ranks of simulation-based calibration and their summary."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd
import xarray as xr

from pyrogaps.calibration.report import render, tables
from pyrogaps.calibration.statistics import covered, proportion
from pyrogaps.calibration.summary import summarise
from pyrogaps.errors import InputError
from pyrogaps.settings import File, Probability, checked
from pyrogaps.trees import PROVENANCE, describe, provenance_of, read_tree, saved, write_tree

SIMULATED, LATENT = "simulated", "latent"
GROUP, PIT_GROUP = "calibration", "prior_sbc"
SAMPLE_DIMS = ["chain", "draw"]


@dataclass(frozen=True, repr=False)
class Calibration:
    """Ranks of the truth among a posterior's draws, on datapoints simulated from the model; see `calibrate`.

    Latent dimensions are the coordinates of the model's unconstrained space: "z[3]" is coordinate 3 of site "z".

    Attributes:
        per_simulated: over ("simulated", "latent"): `rank`, 0 to L, ties broken at random; `pit`, the rank normalised
            to [0, 1], with a uniform draw within the interval of the rank: exactly uniform under calibration; both NaN
            where a mask hides the coordinate; `truth`, unconstrained. Over "simulated": `log_joint_pit`, the normalised
            rank of log p(x, z), and of a refined posterior `converged`.
        provenance: which posterior, of which guide; number of draws, seed and settings.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> calibration = pg.calibrate(model, guide, x, num_simulated=100, num_draws=100)
        >>> calibration.per_simulated.sizes["simulated"]
        100
    """

    per_simulated: xr.Dataset
    provenance: dict[str, Any]

    @property
    def ranks(self) -> xr.DataArray:
        """How many of the L draws lie below the truth, over ("simulated", "latent"); NaN under a False mask."""
        return self.per_simulated["rank"]

    @property
    def num_draws(self) -> int:
        """L, the draws from the posterior of a datapoint."""
        return int(self.provenance["num_draws"])

    @checked()
    def coverage(self, probabilities: Probability | Sequence[Probability] = (0.5, 0.8, 0.95)) -> xr.Dataset:
        """How often central intervals of the posterior contain the truth, with standard errors.

        `coverage` and `coverage_error` are over ("probability", "latent"), the errors binomial; `overall` and
        `overall_error` over ("probability",) are for all latent dimensions together. These are not independent within a
        datapoint, so their standard error is that over datapoints. Raises `InputError` for a probability outside (0,
        1).
        """
        levels = np.atleast_1d(np.asarray(probabilities, dtype=float))
        pit = self.per_simulated["pit"].values
        active = np.isfinite(pit)
        each = [proportion(covered(pit, level), active) for level in levels]
        together = [proportion(covered(pit, level).sum(1), active.sum(1)) for level in levels]
        variables: dict[str, Any] = {}
        for position, suffix in enumerate(("", "_error")):
            variables[f"coverage{suffix}"] = (("probability", LATENT), np.stack([pair[position] for pair in each]))
            variables[f"overall{suffix}"] = ("probability", np.stack([pair[position] for pair in together]))
        return xr.Dataset(variables, {"probability": levels, LATENT: self.per_simulated[LATENT].values})

    def summary(self) -> pd.DataFrame:
        r"""One row per latent dimension, and a last row for log p(x, z).

        - `count`: number of datapoints where the dimension is not masked.
        - `mean_rank`: of the normalised ranks, 1/2 under calibration.
        - `shift`: how far the truth lies above the posterior, in posterior standard deviations; 0 under calibration.
        - `spread`: standard deviation of the truth around the posterior, relative to the posterior's own. Above 1
          (ranks in a U) the posterior is too narrow, below 1 too wide. Shift and spread are mean and standard deviation
          of $\Phi^{-1}(\text{pit})$. L draws resolve it up to about $\Phi^{-1}(1 - 1/L)$, so both understate large
          deviations.
        - `coverage_50`, `coverage_95`: how often central intervals contain the truth.
        - each with its standard error `<name>_error`, over datapoints.
        - `p_uniform` (the ECDF of the ranks against its simultaneous band, exact), `p_shift` and `p_spread`: p-values
          under calibration, adjusted by Holm's method for all that are in the table.
        - `finding`: "too low", "too high", "too narrow", "too wide" or "misshapen", of the posterior relative to the
          truth, where an adjusted p-value is below 0.01: one in a hundred calibrated posteriors has any finding. Empty
          otherwise. The row of log p(x, z) compares the density of the draws with that of the truth.
        """
        labels = [str(label) for label in self.per_simulated[LATENT].values]
        return summarise(labels, self.per_simulated["pit"].values, self.per_simulated["log_joint_pit"].values)

    def to_datatree(self) -> xr.DataTree:
        """The calibration as an ArviZ DataTree, saved with `.to_netcdf(path, engine="h5netcdf")`.

        Group `prior_sbc` holds the normalised ranks by site, over (chain, draw, *site), chain = 1 and one draw
        per simulated datapoint: what `arviz_plots.plot_ecdf_pit(tree)` draws. Group `calibration` is `per_simulated`,
        and the attribute "pyrogaps" the provenance as JSON. Raises `InputError` for a site called "chain" or "draw".
        """
        from arviz_base import dict_to_dataset

        values, variables, start = self.per_simulated["pit"].values, {}, 0
        for name, shape in self.provenance["shapes"].items():
            if name in SAMPLE_DIMS:
                raise InputError(f"site '{name}': a dimension of the tree has this name. Rename the site")
            size = int(np.prod(shape))
            variables[name] = values[None, :, start : start + size].reshape(1, len(values), *shape)
            start += size
        by_site = dict_to_dataset(variables, sample_dims=SAMPLE_DIMS, check_conventions=False)
        tree = xr.DataTree.from_dict({PIT_GROUP: by_site, GROUP: self.per_simulated})
        return describe(tree, {GROUP: self.per_simulated}, self.provenance)

    @classmethod
    @checked()
    def from_datatree(cls, tree: Annotated[xr.DataTree, saved("calibration")]) -> "Calibration":
        """A calibration back from `to_datatree`; raises `InputError` for a tree that is not one, or not as written."""
        if GROUP not in tree.children or PROVENANCE not in tree.attrs:
            raise InputError("calibration: not a tree written by Calibration.to_datatree")
        per_simulated = tree.children[GROUP].to_dataset()
        return cls(per_simulated, provenance_of(tree, {GROUP: per_simulated}, "calibration"))

    @checked()
    def save(self, path: File) -> None:
        """Write the calibration to a netCDF file, whole or not at all; `Calibration.load` reads it back.

        Raises `InputError` for the ending of another format, and where the file cannot be written; a file that was
        there is then as before.
        """
        write_tree(self.to_datatree(), path, "calibration")

    @classmethod
    @checked()
    def load(cls, path: File) -> "Calibration":
        """The calibration that `save` wrote.

        Raises `InputError`, which names the file, where there is none, or where it is damaged or something else.
        """
        return read_tree(path, "calibration", cls.from_datatree)

    def __str__(self) -> str:
        return render(self.summary(), self.coverage(), self.per_simulated, self.provenance)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        parts = tables(self.summary(), self.coverage(), self.per_simulated, self.provenance)
        return "".join(table.html() for table in parts)
