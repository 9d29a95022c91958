"""`to_obs`: the numbers of a ledger as columns of an AnnData, one row a cell."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyrogaps.errors import InputError, counted
from pyrogaps.gaps import GapLedger
from pyrogaps.gaps.selection import BOUNDS, DATAPOINT, FLAGS, NAME, flags_of
from pyrogaps.gaps.terms import ids
from pyrogaps.guard import guarded
from pyrogaps.settings import checked

PREFIX, NOT_MEASURED = "pyrogaps_", "not measured"


@guarded
@checked()
def to_obs(ledger: GapLedger, adata: Any) -> None:
    """Put a ledger's gaps and log p(x), in nats, into `adata.obs`.

    Columns are `pyrogaps_inference_gap` and so on for every gap with values per datapoint, `pyrogaps_log_evidence` and
    `pyrogaps_elbo`, each with its Monte Carlo standard error in `..._mcse`, and `pyrogaps_flags`: why the numbers of a
    cell cannot be trusted, empty where they can. Columns that are there already are replaced.

    Args:
        ledger: of data from `from_scvi`, whose cells are found by name; of other data, which have no names, the cells
            are those of `adata`, in its order.
        adata: an AnnData. Cells that were not measured get NaN, and the flag "not measured".

    Raises:
        InputError: for an AnnData without cells of the ledger, or, where these have no names, of another number; and
            for names that are not unique.

    Example:
        >>> import pyrogaps as pg, scvi                                                # doctest: +SKIP
        >>> adata = scvi.data.synthetic_iid(batch_size=20, n_genes=10)                 # doctest: +SKIP
        >>> scvi.model.SCVI.setup_anndata(adata)                                       # doctest: +SKIP
        >>> vae = scvi.model.SCVI(adata, n_latent=2)                                   # doctest: +SKIP
        >>> vae.train(max_epochs=1, enable_progress_bar=False)                         # doctest: +SKIP
        >>> pg.to_obs(pg.decompose(*pg.from_scvi(vae), progress=False), adata)         # doctest: +SKIP
        >>> bool(adata.obs["pyrogaps_inference_gap"].notna().all())                    # doctest: +SKIP
        True
    """
    if not hasattr(adata, "obs_names") or not hasattr(adata, "obs"):
        raise InputError(f"adata: expected an AnnData, got a {type(adata).__name__}")
    if adata.is_view:
        raise InputError("adata: a view of another AnnData, whose columns are not its own. Copy it with adata.copy()")
    places, measured = _places(ledger, adata), ledger.per_datapoint
    names = [name for name in (*ids(ledger.gaps), *BOUNDS) if name in measured]
    for name in (name for pair in ((name, f"{name}_mcse") for name in names) for name in pair if name in measured):
        values = np.full(adata.n_obs, np.nan)
        values[places] = measured[name].values
        adata.obs[f"{PREFIX}{name}"] = values
    flags = np.full(adata.n_obs, NOT_MEASURED, dtype=object)
    flags[places] = flags_of(measured)
    adata.obs[f"{PREFIX}{FLAGS}"] = pd.Categorical(flags)


def _places(ledger: GapLedger, adata: Any) -> NDArray[np.int64]:
    """The rows of the AnnData that the ledger's datapoints are."""
    measured = ledger.per_datapoint
    if NAME not in measured.coords:
        number = ledger.provenance.get("subset", {}).get("of", measured.sizes[DATAPOINT])
        if number != adata.n_obs:
            raise InputError(
                f"adata: it has {counted(adata.n_obs, 'cell')}, and the ledger is of {counted(number, DATAPOINT)} "
                "without names. Pass the AnnData that the data were taken from, with all its cells in their order"
            )
        places: NDArray[np.int64] = measured[DATAPOINT].values.astype(np.int64)
        return places
    if not adata.obs_names.is_unique:
        name = adata.obs_names[adata.obs_names.duplicated()][0]
        raise InputError(
            f"adata: two cells are named '{name}'. Call adata.obs_names_make_unique() before from_scvi, and measure "
            "again"
        )
    places = adata.obs_names.get_indexer(measured[NAME].values)
    missing = measured[NAME].values[places < 0]
    if len(missing):
        raise InputError(
            f"adata: it has no cell '{missing[0]}', which is one of {counted(len(missing), 'datapoint')} of the ledger "
            "that it lacks. Pass the AnnData that from_scvi was given"
        )
    return places
