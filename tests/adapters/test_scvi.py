"""Models of scvi-tools: pairs with its own densities and ELBO, ledgers of cells, and one line for wrong use."""

import doctest
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyro import poutine
from scipy.sparse import csr_matrix
from torch import Tensor
from torch.distributions import Normal

import pyrogaps as pg
from tests.refusals import refuses

NUM_CELLS, NUM_GENES, DIM, NUM_OWN = 40, 20, 3, 500
FEW: dict[str, Any] = {
    "refinement": pg.Refinement(num_steps=20, num_selection=64),
    "evidence": pg.Ladder(tolerance=1.0, max_evaluations=200),
    "num_particles": 64,
    "referee": False,
    "progress": False,
}
LIKELIHOODS = [
    {"gene_likelihood": likelihood, "use_observed_lib_size": observed, "latent_distribution": latents}
    for likelihood in ("nb", "zinb", "poisson", "normal")
    for observed, latents in ((True, "normal"), (False, "ln"))
]
COVARIATES = {"continuous_covariate_keys": ["age"], "categorical_covariate_keys": ["donor"]}
SETTINGS: list[dict[str, Any]] = [
    *LIKELIHOODS,
    {"dispersion": "gene-batch"},
    {"dispersion": "gene-label", "gene_likelihood": "nb"},
    {"dispersion": "gene-cell", "use_observed_lib_size": False},
    {"setup": COVARIATES, "n_layers": 2, "encode_covariates": True},
    {"setup": {"size_factor_key": "size"}, "gene_likelihood": "nb"},
    {"batch_representation": "embedding", "encode_covariates": True, "setup": COVARIATES},
    {"linear": True},
    {"linear": True, "use_observed_lib_size": True, "latent_distribution": "ln"},
]


# Warnings of scvi-tools and its libraries are not this library's.
pytestmark = pytest.mark.filterwarnings("ignore:::(?!pyrogaps)")


@pytest.fixture(scope="module")
def scvi() -> Any:
    """scvi-tools, quiet."""
    found = pytest.importorskip("scvi")
    found.settings.verbosity = logging.ERROR
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return found


def cells(scvi: Any) -> Any:
    adata = scvi.data.synthetic_iid(batch_size=NUM_CELLS // 2, n_genes=NUM_GENES, n_batches=2, n_labels=3)
    draws = np.random.default_rng(0)
    adata.obs["age"], adata.obs["size"] = draws.normal(size=NUM_CELLS), draws.uniform(50, 100, NUM_CELLS)
    adata.obs["donor"] = draws.choice(list("abc"), NUM_CELLS)
    return adata


def trained(
    scvi: Any, adata: Any = None, *, linear: bool = False, setup: dict[str, Any] | None = None, **options: Any
) -> Any:
    scvi.settings.seed = 0
    adata, kind = cells(scvi) if adata is None else adata, scvi.model.LinearSCVI if linear else scvi.model.SCVI
    kind.setup_anndata(adata, batch_key="batch", labels_key="labels", **(setup or {}))
    model = kind(adata, n_hidden=16, n_latent=DIM, **options)
    fit(model)
    return model


def fit(model: Any, num_steps: int = 60) -> None:
    """An epoch as scvi-tools trains, and further steps on its loss, without what an epoch costs."""
    model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False, logger=False, enable_checkpointing=False)
    tensors, module = next(iter(model._make_data_loader(model.adata, batch_size=NUM_CELLS))), model.module
    optimiser = torch.optim.Adam(module.parameters(), 0.01)
    module.train()
    for _ in range(num_steps):
        optimiser.zero_grad()
        module(tensors)[2].loss.backward()
        optimiser.step()
    module.eval()


@pytest.fixture(scope="module")
def vae(scvi: Any) -> Any:
    """A small SCVI of counts, which no test changes."""
    return trained(scvi, gene_likelihood="nb")


def log_joint(model: Any, z: Tensor) -> Tensor:
    """log p(x, z) of all cells by scvi-tools' own `generative`, `(N,)`, at z and, beside it, the log library size."""
    module, tensors = model.module, next(iter(model._make_data_loader(model.adata, batch_size=NUM_CELLS)))
    with torch.no_grad():
        inferred = module.inference(**module._get_inference_input(tensors))
        inferred["z"] = module.z_encoder.z_transformation(z[:, :DIM])
        total = Normal(0.0, 1.0).log_prob(z[:, :DIM]).sum(-1)
        if z.shape[1] > DIM:
            inferred["library"] = z[:, DIM:]
        made = module.generative(**module._get_generative_input(tensors, inferred))
        if z.shape[1] > DIM:
            total = total + made["pl"].log_prob(z[:, DIM:]).sum(-1)
        return total + made["px"].log_prob(tensors["X"]).sum(-1)


def check_guide(model: Any, problem: pg.Problem) -> None:
    """The guide's Normals are those of scvi-tools' own `inference`, so that ELBOs differ by their draws alone."""
    module, tensors = model.module, next(iter(model._make_data_loader(model.adata, batch_size=NUM_CELLS)))
    with torch.no_grad():
        inferred = module.inference(**module._get_inference_input(tensors))
        trace = poutine.trace(problem.guide).get_trace(*problem.joint.data.fetch(torch.arange(NUM_CELLS)))
    for site, name in (("z", "qz"), ("log_library", "ql")):
        assert (site in trace) == (inferred.get(name) is not None)
        if site in trace:
            found, own = trace.nodes[site]["fn"].base_dist, inferred[name]
            torch.testing.assert_close(found.loc, own.loc)
            torch.testing.assert_close(found.scale, own.scale)


@pytest.mark.parametrize("options", SETTINGS, ids=lambda options: "-".join(map(str, {**options, "setup": ""}.values())))
def test_densities_and_elbo_are_scvi_tools_own(scvi: Any, options: dict[str, Any]) -> None:
    model = trained(scvi, **options)
    if model.module.gene_likelihood == "normal":
        model.module.px_r.data += 3.0  # scales like those of counts
    for encoder in (model.module.z_encoder, model.module.l_encoder):
        encoder.var_encoder.bias.data -= 8.0  # a narrow q(z | x), whose ELBO is known more closely
    problem = pg.Problem.of(*pg.from_scvi(model))
    latent_library = not model.module.use_observed_lib_size
    assert problem.dim == DIM + latent_library
    z = torch.randn(NUM_CELLS, problem.dim)
    z[:, DIM:] = 4.0 + 0.3 * z[:, DIM:]
    torch.testing.assert_close(
        problem.joint(z[None], torch.arange(NUM_CELLS))[0], log_joint(model, z), rtol=1e-5, atol=0
    )

    check_guide(model, problem)
    bound = pg.elbo(problem, num_particles=1000)
    repeated = np.tile(np.arange(NUM_CELLS), NUM_OWN)  # a draw each
    own = model.get_elbo(indices=repeated, return_mean=False, batch_size=4000).reshape(NUM_OWN, NUM_CELLS).double()
    error = bound.mcse.hypot(own.std(0) / len(own) ** 0.5)
    assert (error < 1e-3 * bound.value.abs()).all()
    assert ((bound.value - own.mean(0)).abs() < 4.5 * error).all()
    z_score = (bound.value - own.mean(0)).mean() / (error.square().sum().sqrt() / NUM_CELLS)
    assert abs(float(z_score)) < 4


def real_cells(scvi: Any) -> Any:
    """100 human blood cells and the 100 genes with most counts in all."""
    anndata = pytest.importorskip("anndata")
    file = Path(os.environ.get("PYROGAPS_DATA", "")) / "pbmc-1k-counts.npz"
    if not file.exists():
        pytest.skip("PYROGAPS_DATA names no folder with pbmc-1k-counts.npz")
    with np.load(file) as stored:
        most = np.argsort(-stored["counts"].sum(0, dtype=np.int64), kind="stable")[:100]
        counts, names, genes = stored["counts"][:100, most], stored["cells"][:100], stored["genes"][most]
        adata = anndata.AnnData(csr_matrix(counts.astype(np.float32)), obs={"batch": stored["batch"][:100].astype(str)})
    adata.obs["labels"] = "cell"
    adata.obs_names, adata.var_names = names.astype(str), genes.astype(str)
    return adata


def test_log_p_of_real_cells_is_bounded_from_both_sides(scvi: Any, tmp_path: Path) -> None:
    """`get_marginal_ll` is a lower bound in expectation, and lies below; the ledger finds its cells again."""
    model = trained(scvi, real_cells(scvi), gene_likelihood="nb")
    held_out = range(84, 92)
    ledger = pg.decompose(*pg.from_scvi(model, indices=held_out), **{**FEW, "evidence": pg.Ladder(tolerance=0.2)})
    columns = ledger.per_datapoint
    certain = columns["log_evidence_reliable"].values
    low, high = columns["log_evidence"].values, columns["log_evidence_upper"].values
    error = np.hypot(columns["log_evidence_mcse"].values, columns["log_evidence_upper_mcse"].values)
    assert certain.sum() >= 6
    assert (low < high + 4 * error)[certain].all() and (high - low)[certain].mean() < 0.5
    theirs = model.get_marginal_ll(indices=held_out, n_mc_samples=100, return_mean=False).numpy()
    assert (theirs < high + 4 * error + math.log(1000))[certain].all()  # once in 1,000 that far above (Markov)

    pg.to_obs(ledger, model.adata)
    obs = model.adata.obs
    np.testing.assert_array_equal(obs["pyrogaps_log_evidence"].iloc[held_out], low)
    assert obs["pyrogaps_inference_gap"].notna().sum() == len(held_out)
    flags = obs["pyrogaps_flags"].iloc[held_out]
    assert flags.str.contains("log p(x) unreliable", regex=False).tolist() == (~certain).tolist()
    assert (obs["pyrogaps_flags"] == "not measured").sum() == len(obs) - len(held_out)
    ledger.save(tmp_path / "cells.nc")
    again = pg.GapLedger.load(tmp_path / "cells.nc").sel([3, 1])
    assert again.per_datapoint["name"].values.tolist() == [model.adata.obs_names[87], model.adata.obs_names[85]]
    assert again.worst(1)["name"].iloc[0] in model.adata.obs_names


@pytest.mark.usefixtures("brief_check")
def test_cells_may_be_sparse_or_on_disk_and_are_fetched_by_index(scvi: Any, vae: Any, tmp_path: Path) -> None:
    *_, data = pg.from_scvi(vae, indices=[5, 2, 30])
    x, log_size, batch, label, continuous, categorical = data.fetch(torch.tensor([2, 0, 0]))
    counts = torch.from_numpy(vae.adata.X[[30, 5, 5]]).float()
    torch.testing.assert_close(x, counts)
    torch.testing.assert_close(log_size, counts.sum(1, keepdim=True).log())
    assert batch.shape == (3, 1) and label is continuous is categorical is None
    assert list(data.names) == vae.adata.obs_names[[5, 2, 30]].tolist()

    sparse = cells(scvi)
    sparse.X = csr_matrix(vae.adata.X)
    sparse.write_h5ad(tmp_path / "cells.h5ad")
    backed = pytest.importorskip("anndata").read_h5ad(tmp_path / "cells.h5ad", backed="r")
    for other in (sparse, backed):
        torch.testing.assert_close(pg.from_scvi(vae, other, [5, 2, 30])[2].fetch(torch.tensor([2, 0, 0]))[0], counts)
    *_, trained_on = pg.from_scvi(vae, indices=vae.train_indices)
    assert list(trained_on.names) == vae.adata.obs_names[vae.train_indices].tolist()


@pytest.mark.usefixtures("brief_check")
def test_programs_compute_with_the_networks_of_the_module(scvi: Any) -> None:
    """Whose weights are shared, and whose modes are as they were; every cell has a ledger with latent library sizes."""
    vae = trained(scvi, gene_likelihood="zinb", use_observed_lib_size=False, dispersion="gene-batch")
    model, guide, data = pg.from_scvi(vae)
    own = {id(parameter) for parameter in vae.module.parameters()}
    assert {id(parameter) for program in (model, guide) for parameter in program.parameters()} <= own
    assert not {id(parameter) for parameter in model.parameters()} & {id(parameter) for parameter in guide.parameters()}
    before = pg.elbo(model, guide, data, num_particles=100).value
    with torch.no_grad():
        vae.module.px_r += 1.0
    assert (pg.elbo(model, guide, data, num_particles=100).value != before).all()
    ledger = pg.decompose(*pg.from_scvi(vae, indices=range(4)), **FEW)
    assert np.isfinite(ledger.per_datapoint["inference_gap"].values).all()
    assert not any(GIVEN in line for line in ledger.provenance["remarks"]) and not vae.module.training


def test_simulated_cells_keep_their_library_size(vae: Any) -> None:
    """p(x | z, size) is that of the cell from which the size was taken, whatever counts are simulated."""
    problem = pg.Problem.of(*pg.from_scvi(vae))
    assert any(GIVEN in line for line in problem.remarks)
    before, after = (each.joint.fetch(torch.arange(NUM_CELLS)) for each in (problem, problem.simulated(0).problem))
    assert (after[0] != before[0]).any(1).all()
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=0)
    torch.testing.assert_close(after[1].exp(), before[0].sum(1, keepdim=True))


GIVEN = "given the size of each cell"


def test_wrong_models_are_refused(scvi: Any, vae: Any) -> None:
    other = scvi.model.SCANVI.from_scvi_model(vae, "unknown", labels_key="labels")
    refuses(lambda: pg.from_scvi(other), "model: SCANVI", "Pass an SCVI or a LinearSCVI")
    refuses(lambda: pg.from_scvi(vae.module), "model: VAE")
    refuses(lambda: pg.from_scvi(scvi.model.SCVI), "model: SCVI is a class", "Pass a trained one")
    fresh = scvi.model.SCVI(vae.adata)
    refuses(lambda: pg.from_scvi(fresh), "not trained", "model.train()")
    vae.module.train()
    try:
        refuses(lambda: pg.from_scvi(vae), "training mode", "model.module.eval()")
    finally:
        vae.module.eval()


def test_wrong_cells_are_refused(scvi: Any, vae: Any) -> None:
    adata = vae.adata
    refuses(lambda: pg.from_scvi(vae, adata[:, ::-1].copy()), "another order", "gene 0 is 'gene_19'", "adata[:, ")
    pg.from_scvi(vae, adata[:, ::-1][:, adata.var_names].copy())
    refuses(lambda: pg.from_scvi(vae, adata[:, :5].copy()), "lacks 15, such as 'gene_5'")
    refuses(lambda: pg.from_scvi(vae, adata.X), "expected an AnnData, got a ndarray")
    refuses(lambda: pg.from_scvi(vae, indices=np.arange(3) > 1), "indices[0]: must be a whole number, got False")
    refuses(lambda: pg.from_scvi(vae, indices=[]), "indices: there are none")
    refuses(lambda: pg.from_scvi(vae, indices=[NUM_CELLS]), f"N - 1 = {NUM_CELLS - 1}")
    normalised, elsewhere, empty, bare = (cells(scvi) for _ in range(4))
    normalised.X = np.log1p(normalised.X)
    refuses(lambda: pg.from_scvi(vae, normalised), "cell '0' has", "'nb' takes whole counts", "Pass raw counts")
    elsewhere.obs["batch"] = "new"
    refuses(lambda: pg.from_scvi(vae, elsewhere), "Category new not found", "Pass cells with the columns")
    empty.X[7] = 0
    refuses(lambda: pg.from_scvi(vae, empty), "cell '7' has size 0", "scanpy.pp.filter_cells")
    pytest.importorskip("scanpy").pp.filter_cells(empty, min_counts=1)
    assert len(pg.from_scvi(vae, empty)[2]) == NUM_CELLS - 1
    del bare.obs["labels"]
    refuses(lambda: pg.from_scvi(vae, bare), "labels not found")


@pytest.mark.usefixtures("brief_check")
def test_a_ledger_of_other_cells_is_refused(scvi: Any, vae: Any) -> None:
    model, guide, data = pg.from_scvi(vae, indices=range(6))
    ledger = pg.decompose(model, guide, data, **FEW)
    unnamed = pg.decompose(model, guide, pg.IndexedData(len(data), data.fetch), **FEW)
    adata = vae.adata.copy()
    pg.to_obs(ledger, adata)
    refuses(lambda: pg.to_obs(unnamed, adata), f"it has {NUM_CELLS} cells", "6 datapoints")
    first = adata[:6].copy()
    pg.to_obs(unnamed.sel([4, 2]), first)
    assert np.flatnonzero(first.obs["pyrogaps_flags"] != "not measured").tolist() == [2, 4]
    refuses(lambda: pg.to_obs(ledger, adata[1:].copy()), "it has no cell '0'")
    refuses(lambda: pg.to_obs(ledger, adata[:6]), "a view of another AnnData")
    refuses(lambda: pg.to_obs(adata, ledger), "ledger: must be a GapLedger")
    refuses(lambda: pg.to_obs(ledger, adata.X), "adata: expected an AnnData")
    adata.obs_names = ["same"] * NUM_CELLS
    refuses(lambda: pg.to_obs(ledger, adata), "two cells are named 'same'", "obs_names_make_unique()")


@pytest.mark.parametrize("name", ["from_scvi", "to_obs"])
def test_the_example_runs(scvi: Any, name: str) -> None:
    """That of the docstring, which is skipped where scvi-tools may be missing."""
    text = (getattr(pg, name).__doc__ or "").replace("# doctest: +SKIP", "")
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    assert doctest.DocTestRunner(verbose=False).run(test).failed == 0


def test_without_scvi_tools_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """This runs where it is missing, too."""
    for name in [name for name in sys.modules if name.startswith("scvi.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scvi", None)
    refuses(lambda: pg.from_scvi(object()), "model: scvi-tools is not installed", "pip install 'pyrogaps[scvi]'")
