"""log p(x) of real cells under scVI: `get_marginal_ll` of scvi-tools beside the ladder, and gaps by library size.

1,000 human blood cells, the 2,000 genes of highest variance, 16 samples as batches, under scvi-tools' SCVI at its
defaults (zero-inflated negative binomial, 10 latents, 128 hidden units, observed library size), trained on 800 of them,
and the same with `latent_distribution="ln"`. Half of the cells measured were trained on, half were not, as far as there
are. `decompose` runs at its defaults; `get_marginal_ll` with its 1,000 draws, one to a pass as it does by default. One
process, one thread; seconds are CPU seconds, training not included.

    PYROGAPS_DATA=... python -m benchmarks.scvi_cells              # 1,000 cells: half an hour of a quiet core
    PYROGAPS_DATA=... python -m benchmarks.scvi_cells --cells 200 --ln-cells 64
    python -m benchmarks.scvi_cells --quick                        # a minute, on synthetic cells: does it run?

Needs the extra `scvi`.
"""

import argparse
import logging
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import pyrogaps as pg
from benchmarks.reporting import RESULTS, machine, report, write

MODELS: dict[str, dict[str, Any]] = {"SCVI": {}, "SCVI, ln": {"latent_distribution": "ln"}}
COLUMNS = [
    "model",
    "cells",
    "L[q]",
    "get_elbo",
    "log p(x), from below",
    "from above",
    "width of reliable",
    "width > 0.1",
    "reliable",
    "get_marginal_ll",
    "its error",
    "error, 10% to 90%",
    "k-hat",
    "ledger, s/cell",
    "get_marginal_ll, s/cell",
]
GROUPS = ["cells", "number", "log p(x)", "inference gap", "approximation gap", "amortization gap"]


def real_cells() -> Any:
    """The cells of `pbmc-1k-counts.npz` in the folder that PYROGAPS_DATA names."""
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    with np.load(Path(os.environ["PYROGAPS_DATA"]) / "pbmc-1k-counts.npz") as stored:
        adata = AnnData(csr_matrix(stored["counts"].astype(np.float32)))
        adata.obs_names, adata.var_names = stored["cells"].astype(str), stored["genes"].astype(str)
        adata.obs["batch"] = stored["batch"].astype(str)
        adata.obs["library"] = stored["library_size"]
    return adata


def synthetic_cells() -> Any:
    import scvi

    adata = scvi.data.synthetic_iid(batch_size=30, n_genes=50)
    adata.obs["library"] = adata.X.sum(1)
    return adata


def trained(adata: Any, folder: Path, epochs: int, settings: dict[str, Any]) -> Any:
    """An SCVI of these cells, trained on 80% of them, or as it lies in the folder."""
    import scvi

    kind = scvi.model.SCVI
    if folder.exists():
        return kind.load(folder, adata)
    kind.setup_anndata(adata, batch_key="batch")
    model = kind(adata, **settings)
    model.train(epochs, accelerator="cpu", train_size=0.8, enable_progress_bar=False, logger=False)
    model.save(folder)
    return model


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def mean_of(values: NDArray[np.float64]) -> str:
    return f"{values.mean():.2f} ± {values.std(ddof=1) / len(values) ** 0.5:.2f}"


def measure(
    name: str, model: Any, rows: NDArray[np.int64], draws: int, **options: Any
) -> tuple[pg.GapLedger, list[Any]]:
    """The ledger of these cells, and their row of the table."""
    ledger, spent = timed(lambda: pg.decompose(*pg.from_scvi(model, indices=rows), **options))
    theirs, own_spent = timed(lambda: model.get_marginal_ll(indices=rows, n_mc_samples=draws, return_mean=False))
    elbo = torch.stack([model.get_elbo(indices=rows, return_mean=False) for _ in range(50)]).mean(0).numpy()
    columns = ledger.per_datapoint
    low, high = columns["log_evidence"].values, columns["log_evidence_upper"].values
    reliable = columns["log_evidence_reliable"].values
    width, error = (high - low)[reliable], theirs.numpy() - low
    spread = " to ".join(f"{value:.2f}" for value in np.quantile(error, [0.1, 0.9]))
    row = [name, len(rows), mean_of(columns["elbo"].values), float(elbo.mean()), mean_of(low), mean_of(high)]
    row += [float(width.mean()), float((width > 0.1).mean()), float(reliable.mean()), float(theirs.mean())]
    row += [mean_of(error), spread, float(np.median(columns["khat"].values))]
    return ledger, [*row, spent / len(rows), own_spent / len(rows)]


def groups_of(ledger: pg.GapLedger, model: Any, rows: NDArray[np.int64]) -> list[list[Any]]:
    """Gaps of cells trained on and held out, and of thirds by library size."""
    library = model.adata.obs["library"].to_numpy(dtype=float)[rows]
    held_out = np.isin(rows, model.validation_indices)
    low, high = np.quantile(library, [1 / 3, 2 / 3])
    masks = {
        "trained on": ~held_out,
        "held out": held_out,
        f"fewer than {low:,.0f} counts": library < low,
        "between": (library >= low) & (library <= high),
        f"more than {high:,.0f} counts": library > high,
    }
    names = ("log_evidence", "inference_gap", "approximation_gap", "amortization_gap")
    means = [[mean_of(ledger.per_datapoint[name].values[mask]) for name in names] for mask in masks.values()]
    return [[words, int(mask.sum()), *row] for (words, mask), row in zip(masks.items(), means, strict=True)]


def table(columns: list[str], rows: list[list[Any]]) -> str:
    cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *cells])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute, on synthetic cells: does it run?")
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--ln-cells", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=400, help="as scvi-tools trains so few cells")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--runs", type=Path, default=Path(__file__).parent / "runs")
    options = parser.parse_args()
    settings: dict[str, Any] = {"progress": False}
    if options.quick:
        options.cells = options.ln_cells = 4
        options.epochs, options.draws = 2, 10
        settings |= {"refinement": pg.Refinement(num_steps=4, num_selection=16), "num_particles": 50, "referee": False}
        settings["evidence"] = pg.Ladder(tolerance=1.0, max_evaluations=200)
    warnings.filterwarnings("ignore", module=r"(?!pyrogaps)")
    import scvi

    scvi.settings.verbosity, scvi.settings.seed = logging.ERROR, 0
    torch.set_num_threads(1)
    adata, rows, groups = synthetic_cells() if options.quick else real_cells(), [], []
    for name, further in MODELS.items():
        folder = options.runs / f"scvi-{'-'.join(['cells', *further.values()])}{'-quick' if options.quick else ''}"
        model = trained(adata.copy(), folder, options.epochs, further)
        half = (options.ln_cells if further else options.cells) // 2
        # As many as there are: 200 of 1,000 are held out.
        chosen = np.concatenate([np.sort(model.validation_indices)[:half], np.sort(model.train_indices)])
        chosen = chosen[: 2 * half]
        ledger, row = measure(name, model, chosen, options.draws, **settings)
        rows.append(row)
        groups = groups or groups_of(ledger, model, chosen)
        print(ledger, flush=True)
        report(
            "scvi_cells", "log p(x) of cells under scVI (nats, means over cells)", COLUMNS, rows, quick=options.quick
        )
        write_page(rows, groups, options, scvi.__version__)


def write_page(rows: list[list[Any]], groups: list[list[Any]], options: argparse.Namespace, version: str) -> None:
    """The page of the models measured so far."""
    arguments = f"--cells {options.cells} --ln-cells {options.ln_cells} --epochs {options.epochs}"
    text = PAGE.format(
        command=f"python -m benchmarks.scvi_cells {arguments}",
        machine=machine(),
        version=version,
        epochs=options.epochs,
        draws=options.draws,
        rows=table(["", *(row[0] for row in rows)], [[*line] for line in zip(COLUMNS, *rows, strict=True)][1:]),
        groups=table(GROUPS, groups),
    )
    write(RESULTS / f"scvi_cells{'-quick' if options.quick else ''}.md", text.encode())


PAGE = """# Real cells under scVI

Command: `PYROGAPS_DATA=... {command}`. {epochs} epochs on 800 of the 1,000 cells; half of the cells measured
are held out, as far as there are. scvi-tools {version}; {machine}. Nats, means over cells ± standard error over cells.
CPU seconds of one thread, recording and the examination from other starts included.

{rows}

*Its error* is that of `get_marginal_ll` with {draws:,} draws: it less log p(x) from below, cell by cell. With `ln`
latents scvi-tools scores the softmax of z by the density of z, so its number is of no density.

Gaps of the first model's cells:

{groups}
"""

if __name__ == "__main__":
    main()
