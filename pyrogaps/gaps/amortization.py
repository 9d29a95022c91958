"""The bounds on the training data that split the amortization gap, and the guide that was trained on for them."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pyrogaps.bounds import changed_guide, chunk_log_weights, over_chunks
from pyrogaps.capture import GradientEvaluator
from pyrogaps.density import GuideDensity
from pyrogaps.density.runs import Program
from pyrogaps.gaps.ledger import GapLedger
from pyrogaps.gaps.parts import Arrays
from pyrogaps.gaps.retrain import Split, retrain
from pyrogaps.gaps.split import QUANTITIES
from pyrogaps.gaps.work import Work, as_arrays, columns, run_chunks
from pyrogaps.log_weights import mean_estimate
from pyrogaps.refine import own_family
from pyrogaps.streams import Chunk

# Draws by which rounds and starts are compared, the same for all of them.
NUM_COMPARING = 200


def with_split(
    ledger: GapLedger,
    split: Split,
    work: Work,
    batch_size: int,
    progress: bool,
    cache: str | os.PathLike[str] | None,
) -> GapLedger:
    """`ledger` with the amortization gap split in three; `work` is that on the measured training data."""
    model, guide = work.model, work.density.guide
    folder = None if cache is None else Path(cache) / "training"

    def read(candidate: Program) -> tuple[GuideDensity, GradientEvaluator]:
        density = changed_guide(candidate, model, work.joint)
        same = density.joint is work.joint
        return density, work.evaluator if same else GradientEvaluator(density.joint, work.evidence.mode)

    def bound(candidate: Program) -> float:
        density, scorer = read(candidate)

        def one(chunk: Chunk) -> Any:
            return chunk_log_weights(scorer, density, chunk, NUM_COMPARING, work.seed, "retraining").mean(0)

        means = over_chunks(one, work.joint, batch_size, work.seed)
        return float(np.concatenate([mean.cpu().numpy() for mean in means]).mean())

    starts = retrain(model, guide, split, bound, seed=work.seed, folder=folder, progress=progress)
    best, scorer = read(starts[0].guide)
    # The optimum is the same, but from phi-hat a refinement gets there where from a broken guide it may fall short.
    work.own = own_family(best)

    def measure(work: Work, chunk: Chunk) -> Arrays:
        weights = chunk_log_weights(scorer, best, chunk, work.num_particles, work.seed, "retrained")
        return {**work.bounds(chunk)[0], **as_arrays(columns("elbo_retrained", mean_estimate(weights)))}

    told = [start.told() for start in starts]
    results = run_chunks(work, measure, {"training": told, "seed": work.seed}, batch_size, progress, folder)
    quantities = {name: {"estimator": how, "direction": which} for name, (how, which) in QUANTITIES.items()}
    settings = {name: value for name, value in vars(split.retraining).items() if name != "training"}
    training = {name: _plain(value) for name, value in asdict(split.retraining.training).items()}
    provenance = {
        **ledger.provenance,
        "quantities": {**ledger.provenance["quantities"], **quantities},
        "split": {**settings, "training": training, "starts": told},
    }
    return replace(ledger, training=_dataset(results, split), provenance=provenance)


def _dataset(results: list[tuple[Chunk, Arrays]], split: Split) -> xr.Dataset:
    """Bounds on the training data, per datapoint; `elbo_target` is what one network has to live up to."""
    found = {name: np.concatenate([arrays[name] for _, arrays in results]) for name in _names(results)}
    for end in ("", "_mcse"):
        own = found.pop(f"elbo_refined{end}")[:, 0]
        found[f"elbo_target{end}"] = found.pop(f"elbo_shared{end}", own)
    variables = {name: ("training_datapoint", value, {"units": "nats"}) for name, value in found.items()}
    return xr.Dataset(variables, coords={"training_datapoint": split.measured()[1].numpy()})


def _names(results: list[tuple[Chunk, Arrays]]) -> list[str]:
    bounds = ("elbo", "elbo_refined", "elbo_shared", "elbo_retrained")
    return [name for name in results[0][1] if name.removesuffix("_mcse") in bounds]


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
