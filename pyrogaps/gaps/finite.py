"""Datapoints without finite bounds: which they are, and by which site. Gaps are means over the others."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from pyrogaps.density.draws import BlockedGuide
from pyrogaps.density.impossible import impossible_sites
from pyrogaps.errors import InputError, counted
from pyrogaps.problem import Problem
from pyrogaps.run import Run
from pyrogaps.streams import BLOCK, Chunk, chunks, particle_blocks

# What gaps are differences of, and what it is called.
BOUNDS = {
    "log_evidence": "log p(x)",
    "elbo_refined": "L[q*]",
    "elbo_shared": "L[q*_C]",
    "elbo": "L[q]",
    "elbo_target": "L[q*_C]",
    "elbo_retrained": "L[q_phi-hat]",
}
MAX_NAMED = 5  # datapoints that are named
NUM_TRIED = 64  # points of each at which sites are scored


def refuse_nan(columns: Mapping[str, Any], chunk: Chunk) -> None:
    """Raise `InputError` where a bound of a datapoint of `chunk` is NaN or +infinity."""
    for name in BOUNDS.keys() & columns.keys():
        bad = ~(columns[name] < np.inf)
        if bad.any():
            where = chunk.start + int(np.argwhere(bad)[0][0])
            raise InputError(
                f"datapoint {where}: {BOUNDS[name]} is NaN or +infinity; look at the model's and the guide's "
                "parameters there (scales near zero, overflow)"
            )


def is_finite(dataset: xr.Dataset) -> NDArray[np.bool_]:
    """Whether all bounds of a datapoint are finite, `(N,)`."""
    columns = [dataset[name].values for name in BOUNDS if name in dataset]
    return np.all([np.isfinite(column).all(tuple(range(1, column.ndim))) for column in columns], 0)  # type: ignore[no-any-return]


def finite_part(dataset: xr.Dataset) -> xr.Dataset:
    """The datapoints whose bounds are all finite; of a data set without bounds, all."""
    if not BOUNDS.keys() & {*dataset}:
        return dataset
    finite, first = is_finite(dataset), next(name for name in BOUNDS if name in dataset)
    return dataset if finite.all() else dataset.isel({dataset[first].dims[0]: finite})


def described(dataset: xr.Dataset, problem: Problem, run: Run, num_particles: int) -> list[dict[str, Any]]:
    """The first datapoints without finite bounds: number, bounds, and the sites without a finite log-density."""
    return [
        {
            "datapoint": int(n),
            "bounds": [label for name, label in BOUNDS.items() if name in dataset and _is_infinite(dataset[name][n])],
            "sites": sorted(_sites(problem, run, int(n), num_particles)),
        }
        for n in np.flatnonzero(~is_finite(dataset))[:MAX_NAMED]
    ]


def _is_infinite(values: xr.DataArray) -> bool:
    return not bool(np.isfinite(values.values).all())


def _sites(problem: Problem, run: Run, index: int, num_particles: int) -> set[str]:
    """Sites without a finite log-density at the draws behind the guide's ELBO."""
    chunk, names = chunks(problem.num_datapoints, BLOCK)[index // BLOCK], set[str]()
    with run.stream("elbo").seeded(device=problem.joint.device):  # a guide draws also where it is read
        guide = BlockedGuide(problem.guided(), chunk)
        for first, size in enumerate(particle_blocks(num_particles)):
            z, _ = guide.sample(size, run.stream("elbo"), first)
            own = z[:, index - chunk.start]
            bad = ~problem.scored(own[:, None], torch.tensor([index])).isfinite()[:, 0]
            names |= impossible_sites(problem.scored, own[bad][:NUM_TRIED], index)
            if names:
                break
    return names


def infinite_lines(dataset: xr.Dataset, provenance: Mapping[str, Any]) -> Iterator[str]:
    """A line that counts and names the datapoints without finite bounds; none where there are none."""
    number, infinite = len(dataset["datapoint"]), int((~is_finite(dataset)).sum())
    if infinite:
        rest = f"so gaps are means over the other {number - infinite}" if infinite < number else "so there are no gaps"
        alike: dict[tuple[str, str], list[str]] = {}
        for entry in provenance["infinite"]:
            alike.setdefault((", ".join(entry["bounds"]), _reason(**entry)), []).append(str(entry["datapoint"]))
        named = "; ".join(
            f"datapoint{'s' * (len(numbers) > 1)} {', '.join(numbers)}: {bounds} = -inf{reason}"
            for (bounds, reason), numbers in alike.items()
        )
        left = infinite - len(provenance["infinite"])
        named = "; ".join([*([named] if named else []), *([f"and {left} more"] if named and left else [])])
        verb = "has" if infinite == 1 else "have"
        of = f" ({named})" if named else ""
        yield f"{infinite} of {counted(number, 'datapoint')} {verb} no finite bounds, {rest}{of}"


def _reason(datapoint: int, bounds: list[str], sites: list[str]) -> str:
    names = f"site{'s' * (len(sites) > 1)} {', '.join(repr(site) for site in sites)}"
    if not sites:
        return ""
    return f", {names} has density 0" if "log p(x)" in bounds else f", the guide draws where {names} has density 0"
