"""The bounds on the training data that split the amortization gap, and the guide that was trained on for them."""

from dataclasses import asdict, replace
from typing import Any, cast

import numpy as np
import xarray as xr

from pyrogaps.bounds import chunk_log_weights
from pyrogaps.chunk_cache import Arrays
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.gaps.ledger import GapLedger
from pyrogaps.gaps.measure import Measure, as_arrays, columns_of, reached
from pyrogaps.gaps.retrain import Split, retrain
from pyrogaps.log_weights import mean_estimate
from pyrogaps.refine import own_family
from pyrogaps.run import Run
from pyrogaps.streams import Chunk

# Draws by which rounds and starts are compared, the same for all of them.
NUM_COMPARING = 200


def with_split(ledger: GapLedger, split: Split, measure: Measure, run: Run) -> GapLedger:
    """`ledger` with the amortization gap split in three; `measure` is of the training data."""
    problem = measure.problem
    folder = None if run.cache is None else run.cache / "training"

    def bounds(candidate: Program) -> Any:
        there = problem.with_guide(candidate)

        def mean_log_weights(chunk: Chunk) -> Any:
            stream = run.stream("retraining")
            return chunk_log_weights(there.scorer, there.guided(), chunk, NUM_COMPARING, stream).mean(0)

        return np.concatenate([mean.cpu().numpy() for mean in run.map(mean_log_weights, problem.joint)])

    guide = cast(Program, problem.guide)
    _refuse_infinite(bounds(guide))
    starts = retrain(problem.model, guide, split, lambda candidate: float(bounds(candidate).mean()), run, folder)
    best = problem.with_guide(starts[0].guide)
    # The optimum is the same, but a refinement that starts at a broken guide may not reach it.
    from_best = replace(measure, refiner=replace(measure.refiner, family=own_family(best.guide_density())))

    def measure_chunk(chunk: Chunk, run: Run) -> Arrays:
        stream = run.stream("retrained")
        weights = chunk_log_weights(best.scorer, best.guided(), chunk, measure.num_particles, stream)
        return {**from_best(chunk, run), **as_arrays(columns_of("elbo_retrained", mean_estimate(weights)))}

    described = [start.described() for start in starts]
    settings = {"training": described, "seed": run.seed}
    cached = replace(run, cache=folder)
    results = cached.map_kept(measure_chunk, problem.joint, settings, measure.fingerprint, measure.num_stages, reached)
    retraining = {name: value for name, value in vars(split.retraining).items() if name != "training"}
    training = {name: _plain(value) for name, value in asdict(split.retraining.training).items()}
    provenance = {
        **ledger.provenance,
        "amortized": True,  # of one evaluated datapoint too
        "split": {**retraining, "training": training, "starts": described},
    }
    return replace(ledger, training=_dataset(results, split), provenance=provenance)


def _refuse_infinite(bounds: Any) -> None:
    """No guide can be trained on data that the model, or the guide's draws, give density 0."""
    infinite = np.flatnonzero(~np.isfinite(bounds))
    if len(infinite):
        raise InputError(
            f"split: the ELBO of training datapoint {infinite[0]} is {bounds[infinite[0]]}, so the guide cannot be "
            "trained on; leave such datapoints out of the training data"
        )


def _dataset(results: list[tuple[Chunk, Arrays]], split: Split) -> xr.Dataset:
    """Bounds on the training data, per datapoint; `elbo_target` is what one network has to live up to."""
    columns = {name: np.concatenate([arrays[name] for _, arrays in results]) for name in _names(results)}
    for end in ("", "_mcse"):
        own = columns.pop(f"elbo_refined{end}")[:, 0]
        columns[f"elbo_target{end}"] = columns.pop(f"elbo_shared{end}", own)
    variables = {name: ("training_datapoint", value, {"units": "nats"}) for name, value in columns.items()}
    return xr.Dataset(variables, coords={"training_datapoint": split.measured()[1].numpy()})


def _names(results: list[tuple[Chunk, Arrays]]) -> list[str]:
    bounds = ("elbo", "elbo_refined", "elbo_shared", "elbo_retrained")
    return [name for name in results[0][1] if name.removesuffix("_mcse") in bounds]


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
