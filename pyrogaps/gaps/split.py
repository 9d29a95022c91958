"""The amortization gap in three: capacity, optimization and generalization, from bounds on the training data."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pyrogaps.gaps.table import standard_error, summary_mcse

Array = NDArray[np.float64]
CAPACITY, OPTIMIZATION, GENERALIZATION = "capacity_gap", "optimization_gap", "generalization_gap"
QUANTITIES = {
    CAPACITY: ("L[q*_C] - L[q_phi-hat] on training data", "estimate (either way)"),
    OPTIMIZATION: ("L[q_phi-hat] - L[q_phi] on training data", "lower bound of the gap"),
    GENERALIZATION: ("amortization gap less that on training data", "estimate (either way)"),
}


@dataclass(frozen=True)
class Part:
    """A mean in nats, its standard error over datapoints and its Monte Carlo standard error."""

    mean: float
    standard_error: float
    mcse: float


def parts_of(per_datapoint: xr.Dataset, training: xr.Dataset) -> Iterator[tuple[str, Part]]:
    r"""The children of the amortization gap, which they sum to, by name.

    With $A_D(\phi)$ the mean over D of $L[q^*_C] - L[q_\phi]$,

    $$A_{eval}(\phi) = \underbrace{A_{train}(\hat\phi)}_{\text{capacity}} +
      \underbrace{L_{train}[q_{\hat\phi}] - L_{train}[q_\phi]}_{\text{optimization}} +
      \underbrace{A_{eval}(\phi) - A_{train}(\phi)}_{\text{generalization}}$$
    """
    target, elbo, best = (_pair(training, name) for name in ("elbo_target", "elbo", "elbo_retrained"))
    yield CAPACITY, _difference(target, best)
    yield OPTIMIZATION, _difference(best, elbo)
    here, there = _mean(_pair(per_datapoint, "amortization_gap")), _difference(target, elbo)
    errors = (np.hypot(getattr(here, name), getattr(there, name)) for name in ("standard_error", "mcse"))
    yield GENERALIZATION, Part(here.mean - there.mean, *map(float, errors))


def _pair(dataset: xr.Dataset, name: str) -> tuple[Array, Array]:
    return dataset[name].values.astype(float), dataset[f"{name}_mcse"].values.astype(float)


def _difference(left: tuple[Array, Array], right: tuple[Array, Array]) -> Part:
    return _mean((left[0] - right[0], np.hypot(left[1], right[1])))


def _mean(pair: tuple[Array, Array]) -> Part:
    values, errors = pair
    return Part(float(values.mean()), standard_error(values), summary_mcse(errors))
