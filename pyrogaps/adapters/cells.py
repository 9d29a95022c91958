"""The cells of an AnnData, as data of a model of scvi-tools: fetched by index, one chunk at a time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyrogaps.density import IndexedData
from pyrogaps.density.data import evenly_spaced
from pyrogaps.errors import InputError, counted

NUM_JUDGED = 64  # cells that are fetched at once, so that unusable counts are refused before anything is measured
COUNTED = ("nb", "zinb", "poisson")
Arguments = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]


def cells_of(model: Any, adata: Any, indices: Sequence[int] | None) -> IndexedData:
    """The cells `indices` of `adata`, all for None, as arguments of the programs that `from_scvi` makes of `model`.

    `adata` may be sparse, or backed by a file: a chunk of cells at a time is read and made dense. None is what the
    model was made with.

    Raises `InputError` for cells that the model does not take: other genes or another order of these, categories
    that it does not know, and for likelihoods of counts what is no count.
    """
    adata = _registered(model, adata)
    chosen = _chosen(indices, adata.n_obs)
    cells = Cells(model, adata, chosen)
    names = tuple(map(str, adata.obs_names[chosen]))
    data = IndexedData(len(chosen), cells.fetch, names=names if len({*names}) == len(names) else None)
    data.fetch(evenly_spaced(len(data), NUM_JUDGED))
    return data


class Cells:
    """Cells `rows` of an AnnData that is registered with a model of scvi-tools."""

    def __init__(self, model: Any, adata: Any, rows: NDArray[np.int64]) -> None:
        self.module, self.rows, self.names = model.module, rows, adata.obs_names
        self.rows_of = model.get_anndata_manager(adata, required=True).create_torch_dataset()

    def fetch(self, indices: Tensor) -> Arguments:
        """The arguments x, log_size, batch, label, continuous, categorical of the programs for these cells."""
        # Rows are read once each and in the order of the file, which files on disk require.
        rows, places = torch.from_numpy(self.rows)[indices.cpu()].unique(return_inverse=True)
        read = self.rows_of[rows.numpy()]
        tensors = {key: torch.as_tensor(value) for key, value in read.items()}
        self._check_counts(tensors["X"], rows)
        size = tensors.get("size_factor")
        if size is None and self.module.use_observed_lib_size:
            size = tensors["X"].sum(1, keepdim=True)
        if size is not None and not (size > 0).all():
            name = self.names[int(rows[(~(size > 0)).any(1)][0])]
            remedy = "Remove such cells, as in scanpy.pp.filter_cells(adata, min_counts=1)"
            raise InputError(
                f"adata: cell '{name}' has size {float(size[~(size > 0)][0]):.4g}, whose logarithm the model takes. "
                f"{'Give every cell a positive size factor' if 'size_factor' in tensors else remedy}"
            )
        label = tensors["labels"] if self.module.dispersion == "gene-label" else None
        covariates = (tensors.get(f"extra_{kind}_covs") for kind in ("continuous", "categorical"))
        arguments = (tensors["X"], None if size is None else size.log(), tensors["batch"], label, *covariates)
        at = self.module.device
        x, *others = (None if value is None else value[places].to(at) for value in arguments)
        return (x, *others)  # type: ignore[return-value]

    def _check_counts(self, x: Tensor, rows: Tensor) -> None:
        """Refuse what is no count where the likelihood is one of counts."""
        wrong = (x < 0) | (x != x.round())
        if self.module.gene_likelihood not in COUNTED or not wrong.any():
            return
        name, value = self.names[int(rows[wrong.any(1)][0])], float(x[wrong][0])
        raise InputError(
            f"adata: cell '{name}' has {value:.4g} where the likelihood '{self.module.gene_likelihood}' takes whole "
            "counts. Pass raw counts, from before they were normalised or their logarithms taken, and a model that "
            "was trained on them, as after setup_anndata(adata, layer='counts')"
        )


def _registered(model: Any, adata: Any) -> Any:
    """`adata` after scvi-tools has found in it what the model reads, or what the model was made with for None."""
    if adata is None and (adata := model.adata) is None:
        raise InputError("adata: the model was loaded without its cells. Pass them as adata")
    if not hasattr(adata, "obs_names") or not hasattr(adata, "var_names"):
        raise InputError(f"adata: expected an AnnData, got a {type(adata).__name__}")
    _check_genes(model, list(map(str, adata.var_names)))
    try:
        return model._validate_anndata(adata)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"adata: scvi-tools refuses it: {str(error.args[0] if error.args else error).strip(' .')}. Pass cells with "
            "the columns and the categories of those that the model was trained on"
        ) from error


def _check_genes(model: Any, given: list[str]) -> None:
    """Refuse other genes than the model's, and another order of these, which scvi-tools may take without a word."""
    registry = model.registry_["field_registries"]["X"]["state_registry"]
    genes = [str(name) for name in registry["column_names"]]
    if given == genes:
        return
    if sorted(given) == sorted(genes):
        first = next(at for at, pair in enumerate(zip(given, genes, strict=True)) if pair[0] != pair[1])
        raise InputError(
            f"adata: its genes have another order than those that the model was trained on: gene {first} is "
            f"'{given[first]}', and was '{genes[first]}'. Reorder them, as in adata[:, trained.var_names].copy()"
        )
    missing = [name for name in genes if name not in {*given}]
    what = f"of the model's {counted(len(genes), 'gene')} it lacks {len(missing):,}, such as '{missing[0]}'"
    what = what if missing else f"it has {counted(len(given), 'gene')}, and the model was trained on {len(genes):,}"
    raise InputError(f"adata: {what}. Pass cells with the genes of the training data, in their order")


def _chosen(indices: Sequence[int] | None, number: int) -> NDArray[np.int64]:
    """Row numbers of the cells chosen."""
    if indices is None:
        return np.arange(number)
    chosen = np.array(indices, dtype=np.int64)
    if not len(chosen):
        raise InputError("indices: there are none. Name at least one cell, or pass None for all")
    if not 0 <= int(chosen.min()) <= int(chosen.max()) < number:
        raise InputError(f"indices: they must be from 0 to N - 1 = {number - 1}")
    return chosen
