"""One ledger of several: means over draws of the latents that datapoints share, with the errors of these draws."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from scipy import special  # type: ignore[import-untyped]

from pyrogaps.gaps.finite import finite_part, is_finite
from pyrogaps.gaps.ledger import GapLedger
from pyrogaps.gaps.selection import FINGERPRINT, NAME, with_flags
from pyrogaps.gaps.terms import DATA_SET, GLOBAL, Columns, Term, ids, measured_gaps
from pyrogaps.shared import GlobalGap

CONFIDENCE = 0.95
DATA_SET_ELBO = "data_set_elbo"
# Columns that hold in every draw, in any, and of which a mean over draws says nothing.
IN_ALL, IN_ANY, LEFT_OUT = ("log_evidence_reliable", "examined"), ("log_evidence_doubted",), ("log_evidence_method",)
FIELDS = (
    *("lower", "lower_mcse", "upper", "upper_mcse"),
    *("log_evidence", "log_evidence_upper", "log_evidence_mcse", "marginal_elbo", "marginal_elbo_mcse"),
)


def averaged(ledgers: Sequence[GapLedger]) -> xr.Dataset:
    """The columns of all draws: means over draws. The error of a datapoint's mean is that of the draws' values."""
    datasets = [ledger.per_datapoint.reset_coords() for ledger in ledgers]
    shared_names = set.intersection(*({*map(str, dataset)} for dataset in datasets)) - {*LEFT_OUT}
    columns: dict[str, Any] = {}
    combined: Any
    for name in (str(name) for name in datasets[0] if name in shared_names):
        of_draws = [dataset[name] for dataset in datasets]
        if name in (FINGERPRINT, NAME):
            combined = of_draws[0].values
        elif name in IN_ALL or name in IN_ANY:
            values = np.stack([column.values for column in of_draws])
            combined = values.all(0) if name in IN_ALL else values.any(0)
        elif name.endswith("_mcse") and (base := name.removesuffix("_mcse")) in shared_names:
            combined = _error(np.stack([dataset[base].values for dataset in datasets]).astype(float))
        else:
            combined = np.stack([column.values for column in of_draws]).astype(float).mean(0)
        columns[name] = (of_draws[0].dims, combined, of_draws[0].attrs)
    return with_flags(xr.Dataset(columns, datasets[0].coords))


def by_draw(ledgers: Sequence[GapLedger], per_datapoint: xr.Dataset) -> xr.Dataset:
    """Means over the datapoints whose bounds are finite in all draws, of every draw: over "draw", and "family"."""
    finite = is_finite(per_datapoint)
    variables: dict[str, Any] = {}
    for name in (str(name) for name in per_datapoint):
        column = per_datapoint[name]
        if not name.endswith("_mcse") and column.dims[0] == "datapoint" and column.dtype.kind == "f":
            means = [ledger.per_datapoint[name].isel(datapoint=finite).mean("datapoint").values for ledger in ledgers]
            variables[name] = (("draw", *column.dims[1:]), np.stack(means))
    for name in ids(ledgers[0].gaps):  # differences between data sets have no values per datapoint
        if name not in variables:
            variables[name] = ("draw", np.array([float(ledger.gaps["mean"].sel(gap=name)) for ledger in ledgers]))
    return xr.Dataset(variables, {"family": ledgers[0].per_datapoint["family"].values})


def with_global_gap(
    draws: xr.Dataset, gap: GlobalGap | None, names: Sequence[str], dim: int, *, independent: bool
) -> xr.Dataset:
    """`draws` with the global gap, and what the shared latents are; `independent`: of them the guide's others are."""
    number = draws.sizes["draw"]
    described: dict[str, Any] = {"names": ", ".join(names), "dim": dim, "num_draws": number}
    described["independent"] = int(independent)
    if gap is not None:
        draws = draws.assign({f"{GLOBAL}_{field}": ((), getattr(gap, field), {"units": "nats"}) for field in FIELDS})
        draws = draws.assign({GLOBAL: ((), gap.value), f"{GLOBAL}_mcse": ((), gap.mcse)})
        described |= {"bounded": int(gap.bounded), "method": gap.method, "num_further_draws": gap.num_draws}
    return draws.assign_attrs(described)


def gaps_of(columns: Columns, terms: Sequence[Term]) -> xr.Dataset:
    """The tree of gaps with the errors of the draws, and totals of the data set with 95% intervals, in nats."""
    gaps, _ = measured_gaps(columns, terms)
    draws, number = columns.shared, len(finite_part(columns.per_datapoint)["datapoint"])
    mcse, half = gaps["mcse"].values.copy(), {}
    quantile = float(special.stdtrit(draws.sizes["draw"] - 1, 0.5 + CONFIDENCE / 2))
    for place, name in enumerate(ids(gaps)):
        if name in draws and draws[name].dims == ("draw",):
            mcse[place] = error_of(draws[name])
            half[name] = quantile * mcse[place] * number
    low, high = _ends(gaps, half, draws, number)
    total = gaps["mean"].values * number
    return gaps.assign(mcse=("gap", mcse), total=("gap", total), total_low=("gap", low), total_high=("gap", high))


def with_elbo(draws: xr.Dataset, gaps: xr.Dataset, number: int) -> xr.Dataset:
    """`draws` with the ELBO of a data set of `number` datapoints and its standard error, nats.

    It is A, the ELBO of theta alone (`GlobalGap.marginal_elbo`), less the local gaps.
    """
    local = gaps.sel(gap="inference_gap")
    elbo = float(draws[f"{GLOBAL}_marginal_elbo"]) - float(local["total"])
    error = np.hypot(float(draws[f"{GLOBAL}_marginal_elbo_mcse"]), number * float(local["mcse"]))
    attrs = {"units": "nats"}
    return draws.assign({DATA_SET_ELBO: ((), elbo, attrs), f"{DATA_SET_ELBO}_mcse": ((), float(error), attrs)})


def data_set_line(draws: xr.Dataset) -> str:
    """log p(x) and the ELBO of the data set, in words."""
    names = (*(f"{GLOBAL}_{name}" for name in ("log_evidence", "log_evidence_upper", "log_evidence_mcse")),)
    low, high, mcse = (float(draws[name]) for name in names)
    elbo, error = (float(draws[name]) for name in (DATA_SET_ELBO, f"{DATA_SET_ELBO}_mcse"))
    known = f"between {low:.2f} and {high:.2f}" if draws.attrs["bounded"] else f"at least {low:.2f}"
    return f"the data set: log p(x) {known} (± {mcse:.2f}) nats, ELBO {elbo:.2f} (± {error:.2f}) nats"


def _ends(gaps: xr.Dataset, half: Mapping[str, float], draws: xr.Dataset, number: int) -> tuple[Any, Any]:
    """Ends of the intervals of totals: of the global gap, of its bounds with their errors."""
    normal = float(special.ndtri(0.5 + CONFIDENCE / 2))
    low, high = (np.full(len(gaps["gap"]), np.nan) for _ in range(2))
    names = ids(gaps)
    for place, name in enumerate(names):
        total = float(gaps["mean"].values[place]) * number
        low[place], high[place] = total - half.get(name, np.nan), total + half.get(name, np.nan)
    if GLOBAL in names:
        place, root = names.index(GLOBAL), names.index(DATA_SET)
        low[place] = float(draws[f"{GLOBAL}_lower"] - normal * draws[f"{GLOBAL}_lower_mcse"])
        high[place] = float(draws[f"{GLOBAL}_upper"] + normal * draws[f"{GLOBAL}_upper_mcse"])
        if not draws.attrs["bounded"]:
            high[place] = np.inf
        local, own = names.index("inference_gap"), float(draws[GLOBAL])
        total = float(gaps["mean"].values[root]) * number
        width = half.get("inference_gap", np.nan)
        low[root] = total - np.hypot(width, own - low[place])
        high[root] = total + np.hypot(high[local] - float(gaps["mean"].values[local]) * number, high[place] - own)
    return low, high


def error_of(draws: xr.DataArray) -> float:
    """The standard error of a mean over draws, `(draw,)`."""
    return float(_error(draws.values))


def _error(values: Any) -> Any:
    with np.errstate(invalid="ignore"):  # infinity less infinity
        return values.std(0, ddof=1) / len(values) ** 0.5
