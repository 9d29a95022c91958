"""`from_scvi`: a model of scvi-tools as a Pyro model and a Pyro guide, in its own networks."""

from collections.abc import Iterable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pyrogaps.adapters.cells import cells_of
from pyrogaps.density import IndexedData
from pyrogaps.errors import InputError
from pyrogaps.guard import guarded
from pyrogaps.likelihoods.counts import NegativeBinomial, ZeroInflatedNegativeBinomial
from pyrogaps.settings import checked

# scvi-tools adds it to the mean and the inverse dispersion of its negative binomials.
SMALLEST = 1e-8
GIVEN_SIZE = "log p(x) is given the size of each cell (scvi-tools: observed library size or size factor)"
SUPPORTED = "an SCVI or a LinearSCVI"


class CellGuide(nn.Module):
    """q(z | x), and q(log library | x) where the library size is latent: the encoders of a module of scvi-tools."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.z_encoder = module.z_encoder
        self.library_encoder = None if module.use_observed_lib_size else module.l_encoder
        self.log_variational, self.encode_covariates = module.log_variational, module.encode_covariates
        self.embedding = _embedding(module) if module.encode_covariates else None
        self.one_hot = module.batch_representation == "one-hot"

    def forward(
        self,
        x: Tensor,
        log_size: Tensor | None,
        batch: Tensor,
        label: Tensor | None,
        continuous: Tensor | None,
        categorical: Tensor | None,
    ) -> None:
        """Run the guide on cells, as `CellModel.forward` takes them."""
        inputs, columns = [x.log1p() if self.log_variational else x], _columns(categorical)
        if self.encode_covariates:
            inputs += [] if continuous is None else [continuous]
            inputs += [] if self.embedding is None else [self.embedding(batch[:, 0])]
        columns = [batch, *columns] if self.one_hot else columns
        shown = torch.cat(inputs, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", _encoded(self.z_encoder, shown, columns))
            if self.library_encoder is not None:
                pyro.sample("log_library", _encoded(self.library_encoder, shown, columns))


class CellModel(nn.Module):
    """p(z) p(x | z, size), or p(z) p(log library) p(x | z, library): the decoder of a module of scvi-tools.

    Attributes:
        remarks: what the ledger says of it.
    """

    library_means: Tensor
    library_variances: Tensor

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.decoder, self.embedding = module.decoder, _embedding(module)
        self.px_r: Any = getattr(module, "px_r", None)
        self.num_latents, self.transformation = module.n_latent, module.z_encoder.z_transformation
        self.dispersion, self.likelihood = module.dispersion, module.gene_likelihood
        self.latent_library = not module.use_observed_lib_size
        if self.latent_library:
            self.register_buffer("library_means", module.library_log_means)
            self.register_buffer("library_variances", module.library_log_vars)
        self.remarks = () if self.latent_library else (GIVEN_SIZE,)

    def forward(
        self,
        x: Tensor,
        log_size: Tensor | None,
        batch: Tensor,
        label: Tensor | None,
        continuous: Tensor | None,
        categorical: Tensor | None,
    ) -> None:
        """Run the model on cells.

        Args:
            x: `(B, genes)`, counts.
            log_size: `(B, 1)`, the logarithm of the observed library size or size factor; None where it is latent.
            batch: `(B, 1)`, numbers of the cells' batches.
            label: `(B, 1)`, numbers of the cells' labels, where the dispersion depends on them.
            continuous, categorical: `(B, covariates)`, further covariates where there are any.
        """
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.num_latents), 1.0).to_event(1))
            if self.latent_library:
                means, variances = (
                    linear(_indicators(batch, values.shape[1]), values)
                    for values in (self.library_means, self.library_variances)
                )
                log_size = pyro.sample("log_library", dist.Normal(means, variances.sqrt()).to_event(1))
            fn = self.observed(z, log_size, batch, label, continuous, categorical)
            pyro.sample("x", fn.to_event(1), obs=x)

    def observed(
        self,
        z: Tensor,
        log_size: Tensor | None,
        batch: Tensor,
        label: Tensor | None,
        continuous: Tensor | None,
        categorical: Tensor | None,
    ) -> Any:
        """p(x | z, size) of each gene, with batch shape `(B, genes)`."""
        inputs, columns = [self.transformation(z)], _columns(categorical)
        inputs += [] if continuous is None else [continuous]
        if self.embedding is not None:
            inputs.append(self.embedding(batch[:, 0]))
        else:
            columns = [batch, *columns]
        layers = getattr(self.decoder, "px_decoder", None) or self.decoder.factor_regressor
        decoded = self.decoder(self.dispersion, torch.cat(inputs, -1), log_size, *_one_hot(layers, columns))
        _, log_dispersion, mean, zero_logits = decoded
        if self.dispersion == "gene":
            log_dispersion = self.px_r
        elif self.dispersion in ("gene-batch", "gene-label"):
            group = batch if self.dispersion == "gene-batch" else label
            log_dispersion = linear(_indicators(group, self.px_r.shape[1]), self.px_r)
        if self.likelihood == "poisson":
            return dist.Poisson(mean)
        dispersion = log_dispersion.exp()
        if self.likelihood == "normal":
            return dist.Normal(mean, dispersion)
        mean, dispersion = mean + SMALLEST, dispersion + SMALLEST
        if self.likelihood == "nb":
            return NegativeBinomial(mean, dispersion)
        return ZeroInflatedNegativeBinomial(mean, dispersion, zero_logits)


def _embedding(module: Any) -> nn.Module | None:
    """What represents batches, where they are not one-hot."""
    return module.get_embedding("batch") if module.batch_representation == "embedding" else None


def _columns(categorical: Tensor | None) -> list[Tensor]:
    return [] if categorical is None else [*categorical.split(1, 1)]


def _indicators(numbers: Any, size: int) -> Tensor:
    """Numbers `(B, 1)` of categories as one-hot rows `(B, size)`; torch's `one_hot` looks at values, which a recording
    of the density cannot.
    """
    rows: Tensor = numbers == torch.arange(size, device=numbers.device)
    return rows.to(torch.get_default_dtype())


def _one_hot(layers: Any, columns: Iterable[Tensor]) -> list[Tensor]:
    """Categories as these layers take them: they leave a single category out, with 0 in their list."""
    sizes = zip(columns, layers.n_cat_list, strict=False)
    return [_indicators(column, size) if size else column for column, size in sizes]


def _encoded(encoder: Any, shown: Tensor, columns: list[Tensor]) -> Any:
    """The Normal of an encoder of scvi-tools, without the draw that its own `forward` makes."""
    hidden = encoder.encoder(shown, *_one_hot(encoder.encoder, columns))
    variance = encoder.var_activation(encoder.var_encoder(hidden)) + encoder.var_eps
    return dist.Normal(encoder.mean_encoder(hidden), variance.sqrt()).to_event(1)


@guarded
@checked()
def from_scvi(
    model: Any, adata: Any = None, indices: Sequence[int] | None = None
) -> tuple[CellModel, CellGuide, IndexedData]:
    r"""A trained model of scvi-tools as a Pyro model, a Pyro guide and data.

    $$z \sim N(0, I), \quad \log l \sim N(m_{batch}, v_{batch}), \quad
      x_g | z, l \sim \text{likelihood}(l f_g(z, batch), \theta_g)$$

    With an observed library size, or a size factor, l is given. With `latent_distribution="ln"` the latents are those
    before the softmax, which have a density; scvi-tools' own `get_marginal_ll` scores the softmax by it. Both programs
    compute with the networks of `model.module` itself, no copies: what trains one trains the other.

    Args:
        model: a trained SCVI or LinearSCVI, with any likelihood, dispersion, covariates, and library size.
        adata: cells with the genes and the categories of those that it was trained on, in memory, sparse, or backed by
            a file; None for these.
        indices: row numbers of the cells to take, such as `model.validation_indices`; None for all.

    Returns:
        `(model, guide, data)`, with sites "z", "x" and, where it is latent, "log_library" in the plate "data". The data
        are fetched by index: their memory does not grow with the number of cells. They have the names of the cells,
        which `to_obs` reads.

    Raises:
        InputError: for other classes of model; for one that is not trained, or in training mode; for other genes or
            another order of them; for values that the likelihood does not have.

    Example:
        >>> import pyrogaps as pg, scvi                                                # doctest: +SKIP
        >>> adata = scvi.data.synthetic_iid(batch_size=20, n_genes=10)                 # doctest: +SKIP
        >>> scvi.model.SCVI.setup_anndata(adata, batch_key="batch")                    # doctest: +SKIP
        >>> vae = scvi.model.SCVI(adata, n_latent=2, gene_likelihood="nb")             # doctest: +SKIP
        >>> vae.train(max_epochs=1, enable_progress_bar=False)                         # doctest: +SKIP
        >>> pg.elbo(*pg.from_scvi(vae)).value.shape                                    # doctest: +SKIP
        torch.Size([40])
    """
    _check(model)
    data = cells_of(model, adata, indices)
    return CellModel(model.module), CellGuide(model.module), data


def _check(model: Any) -> None:
    """Refuse what is no trained SCVI or LinearSCVI in evaluation mode."""
    try:
        import scvi.model
        import scvi.module
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "scvi":
            raise
        raise InputError(
            "model: scvi-tools is not installed. Install it, as in pip install 'pyrogaps[scvi]'"
        ) from error
    if isinstance(model, type):
        raise InputError(f"model: {model.__name__} is a class. Pass a trained one")
    module = getattr(model, "module", None)
    ours = isinstance(model, scvi.model.SCVI | scvi.model.LinearSCVI)
    if not ours or (module is not None and type(module) not in (scvi.module.VAE, scvi.module.LDVAE)):
        raise InputError(
            f"model: {type(model).__name__} is none of the models of scvi-tools that are read here. Pass {SUPPORTED}"
        )
    if not model.is_trained or module is None:
        raise InputError("model: it is not trained. Call model.train(), or load a trained one")
    if model.minified_data_type is not None:
        raise InputError("model: its cells are minified, so their counts are gone. Load it with the AnnData of counts")
    if module.training:
        raise InputError(
            "model: its module is in training mode, where dropout and batch statistics make it another model at every "
            "call. Call model.module.eval()"
        )
