"""What further families would save of the approximation gap, as a ledger has measured it."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import xarray as xr

from pyrogaps.evidence.reliability import enough_trusted
from pyrogaps.gaps.selection import column_of, converged_of
from pyrogaps.gaps.terms import CERTAIN, combined_error, standard_error


@dataclass(frozen=True)
class Saving:
    """What a further family would save of the approximation gap: mean and error, nats.

    It is the refined bound of that family less the one of the guide's own, paired by datapoint: log p(x) cancels. The
    error combines the standard error over datapoints with the Monte Carlo error.

    Attributes:
        family: its name.
        same: whether it is the guide's own family.
        unconverged: the share of the datapoints at which its refinement has not converged, where these are too many:
            it then saves at least this. Else 0.
    """

    family: str
    nats: float
    error: float
    same: bool = False
    unconverged: float = 0.0

    @property
    def certain(self) -> bool:
        """Whether the saving exceeds its error."""
        return not self.same and self.nats > CERTAIN * self.error

    def __str__(self) -> str:
        if self.same:
            return f"{self.family} is the guide's own family"
        size = f"{abs(self.nats):.3f} ± {self.error:.3f} nats"
        if self.certain:
            text = f"{self.family} would save {size} of it"
        elif self.nats < -CERTAIN * self.error:
            text = f"{self.family} would save nothing, because its gap is {size} larger"
        else:
            text = f"{self.family} would save nothing beyond the error ({self.nats:.3f} ± {self.error:.3f} nats)"
        if self.unconverged:
            text += f", or more: its refinement has not converged for {self.unconverged:.0%} of the datapoints"
        return text


def savings_of(dataset: xr.Dataset, shared: xr.Dataset | None, same: Collection[str] = ()) -> list[Saving]:
    """The savings of all further families of a ledger with the columns `dataset`, the largest first; the guide's own
    family, of which `same` has the names, comes last. `shared` has means over datapoints by draw, where latents are
    shared.
    """
    if not dataset.sizes["datapoint"]:
        return []
    own, *others = (str(name) for name in dataset["family"].values)
    savings = [_saving(dataset, shared, own, name, name in same) for name in others]
    return sorted(savings, key=lambda saving: (saving.same, -saving.nats))


def _saving(dataset: xr.Dataset, shared: xr.Dataset | None, own: str, name: str, same: bool) -> Saving:
    of_family, of_own = (column_of(dataset, f"elbo_refined[{family}]") for family in (name, own))
    mean = of_family.minus(of_own).mean
    mcse = mean.mcse
    if shared is not None:
        draws = shared["elbo_refined"]
        mcse = standard_error((draws.sel(family=name) - draws.sel(family=own)).values)
    converged = converged_of(dataset, name)
    enough = enough_trusted(int(converged.sum()), len(converged))
    unconverged = 0.0 if enough else 1 - float(np.mean(converged))
    return Saving(name, mean.mean, combined_error(mean.standard_error, mcse), same, unconverged)
