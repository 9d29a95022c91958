"""Some of a ledger's datapoints: the worst of them, and a ledger of any."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from pyrogaps.errors import InputError, counted
from pyrogaps.evidence.reliability import RELIABLE, enough_trusted, is_examined, reliability_notes
from pyrogaps.gaps import other_starts
from pyrogaps.gaps.finite import finite_part, is_finite
from pyrogaps.gaps.terms import APPROXIMATION, DATA_SET, GLOBAL, INFERENCE, Mean, Values, ids, parent_of, values_of
from pyrogaps.signatures import nearest
from pyrogaps.tables import Frame

Provenance: TypeAlias = dict[str, Any]
DATAPOINT, FAMILY, FLAGS = "datapoint", "family", "flags"
FINGERPRINT = "data_fingerprint"  # of what the model observes
NAME = "name"  # of the datapoint, where the data have names
CONVERGED = "converged"
BOUNDS = ("log_evidence", "elbo")
# What is said of a datapoint that does not pass a check.
UNTRUSTED = {
    "finite": "no finite bounds",
    "reliable": "log p(x) unreliable",
    "converged": "refinement not converged",
    "examined": "log p(x) not examined",
}
# Why there is no verdict on a mean, and what to do.
NO_VERDICT = {
    "reliable": ("log p(x) is reliable for only", "Spend more on evidence"),
    "converged": ("refinement has converged for only", "Raise num_steps of Refinement"),
}
# What log p(x) is a part of, and the bound that is taken from it there.
FROM_EVIDENCE = {"log_evidence": "", INFERENCE: "elbo", DATA_SET: "elbo", APPROXIMATION: "elbo_refined"}
UNREFINED = ("log_evidence", "elbo", INFERENCE, DATA_SET, GLOBAL)  # what does not rest on refinement


def with_flags(dataset: xr.Dataset) -> xr.Dataset:
    """The columns of a ledger with flags, fingerprints and names as coordinates, which arithmetic leaves alone."""
    aside = [name for name, column in dataset.data_vars.items() if column.dtype == bool or name in (FINGERPRINT, NAME)]
    return dataset.set_coords(aside)


def checks_of(dataset: xr.Dataset) -> dict[str, NDArray[np.bool_]]:
    """What can be trusted of a datapoint, `(N,)` each: "finite" bounds, "reliable" log p(x) where that was examined,
    "converged" refinement of the guide's own family.
    """
    checks = {"finite": is_finite(dataset)}
    if is_examined(dataset):
        checks["reliable"] = dataset[RELIABLE].values.astype(bool)
    if CONVERGED in dataset:
        checks["converged"] = converged_of(dataset, 0)
    return checks


def converged_of(dataset: xr.Dataset, family: int | str) -> NDArray[np.bool_]:
    """Where the refinement of a family has converged, `(N,)`; where datapoints share latents, given all draws."""
    converged = dataset[CONVERGED]
    if FAMILY in converged.dims:
        converged = converged.sel(family=family) if isinstance(family, str) else converged.isel(family=family)
    return np.asarray(converged.values == 1)


def taken_from_evidence(name: str) -> str | None:
    """The bound that is taken from log p(x) in a gap; empty for log p(x) itself, None where log p(x) has no part."""
    if _stored(name)[0] == "family_approximation_gap":
        return name.replace(APPROXIMATION, "elbo_refined")
    return FROM_EVIDENCE.get(name)


def checks_behind(dataset: xr.Dataset, name: str) -> dict[str, NDArray[np.bool_]]:
    """What has to hold of a datapoint, `(N,)` each, for its value of a row of the summary to be trusted."""
    checks, needed = checks_of(dataset), dict[str, NDArray[np.bool_]]()
    if taken_from_evidence(name) is not None and "reliable" in checks:
        needed["reliable"] = checks["reliable"]
    if name not in UNREFINED and CONVERGED in dataset:
        needed["converged"] = converged_of(dataset, _stored(name)[1] or 0)
    return needed


def doubts_on(dataset: xr.Dataset, name: str) -> dict[str, str]:
    """Why there is no verdict on the mean of a row of the summary, and what to do; empty where there is one."""
    doubts = {}
    for check, passes in checks_behind(dataset, name).items():
        trusted, number = int(passes.sum()), len(passes)
        if number and not enough_trusted(trusted, number):
            what, remedy = NO_VERDICT[check]
            doubts[f"{what} {trusted:,} of {counted(number, DATAPOINT)}"] = remedy
    return doubts


def flags_of(dataset: xr.Dataset) -> list[str]:
    """Why the numbers of a datapoint cannot be trusted, `(N,)` texts; empty where they can."""
    checks, unexamined = checks_of(dataset), [] if is_examined(dataset) else [UNTRUSTED["examined"]]
    return [
        "; ".join([*unexamined, *(UNTRUSTED[name] for name, passes in checks.items() if not passes[place])])
        for place in range(dataset.sizes[DATAPOINT])
    ]


def worst(dataset: xr.Dataset, gaps: xr.Dataset, num: int, by: str) -> pd.DataFrame:
    """The `num` datapoints of a ledger with the largest values of the column `by`, see `GapLedger.worst`."""
    column = _column(dataset, gaps, by)
    order = np.argsort(-np.nan_to_num(column.value, nan=np.inf), kind="stable")[:num]
    chosen = dataset.isel(datapoint=order)
    columns: dict[str, Any] = {by: column.value[order], f"{by}_mcse": column.mcse[order]}
    for name in (*ids(gaps), *BOUNDS):
        if name in dataset and name not in columns:
            columns[name] = chosen[name].values
    columns[FLAGS] = flags_of(chosen)
    if NAME in chosen.coords:
        columns = {NAME: chosen[NAME].values, **columns}
    return Frame(columns, index=pd.Index(chosen[DATAPOINT].values, name=DATAPOINT))


def _column(dataset: xr.Dataset, gaps: xr.Dataset, by: str) -> Values:
    """A column of a ledger; of a further family by its name in the summary, such as "approximation_gap[flow]"."""
    stored, family = _stored(by)
    columns = [str(key) for key, column in dataset.items() if f"{key}_mcse" in dataset and DATAPOINT in column.dims]
    if by in ids(gaps) and by not in columns:
        raise InputError(
            f"by: '{by}' is a difference between data sets and has no values per datapoint. Use one of "
            f"{', '.join(key for key in ids(gaps) if key in columns)}"
        )
    families = [str(key) for key in dataset[FAMILY].values]
    if stored not in columns or (family and (FAMILY not in dataset[stored].dims or family not in families)):
        named = [key for key in columns if FAMILY not in dataset[key].dims]
        named += [f"{APPROXIMATION}[{key}]" for key in families[1:]]
        hint = f"Did you mean '{near}'? " if (near := nearest(by, named, "")) else ""
        raise InputError(f"by: there is no '{by}' per datapoint. {hint}Known are {', '.join(named)}")
    return column_of(dataset, by)


def column_of(dataset: xr.Dataset, name: str) -> Values:
    """A row of the summary, per datapoint; "elbo_refined[flow]" and "approximation_gap[flow]" are a family's."""
    stored, family = _stored(name)
    return values_of(dataset.sel(family=family) if family else dataset, stored)


def _stored(name: str) -> tuple[str, str]:
    """The column that holds a row of the summary, and its family; empty for none."""
    bare, _, family = name.removesuffix("]").partition("[")
    return "family_approximation_gap" if family and bare == APPROXIMATION else bare, family


def positions(dataset: xr.Dataset, datapoint: Any) -> NDArray[np.int64]:
    """Where the datapoints chosen stand in a ledger, in the order given.

    Raises `InputError` for numbers that the ledger does not have, or has been asked for twice, and for none at all.
    """
    if isinstance(datapoint, slice):
        raise InputError("datapoint: a slice is ambiguous where datapoints have numbers. Pass range(start, stop)")
    labels, chosen = dataset[DATAPOINT].values, np.atleast_1d(np.asarray(datapoint))
    if chosen.ndim != 1 or not len(chosen) or chosen.dtype.kind not in "bui":
        raise InputError(
            "datapoint: must be numbers of datapoints, or a boolean mask over all of them. Pass such as [0, 3], or "
            "ledger.per_datapoint['elbo'] < -100"
        )
    if chosen.dtype == bool:
        if len(chosen) != len(labels):
            raise InputError(
                f"datapoint: the mask has length {len(chosen)}, and the ledger {counted(len(labels), DATAPOINT)}. Pass "
                "one entry for each"
            )
        if not chosen.any():
            raise InputError("datapoint: the mask is False everywhere. Choose at least one datapoint")
        return np.flatnonzero(chosen)
    places = {int(label): place for place, label in enumerate(labels)}
    missing = [int(label) for label in chosen if int(label) not in places]
    if missing:
        raise InputError(
            f"datapoint: the ledger has no datapoint {missing[0]}. Its numbers are in ledger.per_datapoint['datapoint']"
        )
    if len(set(chosen.tolist())) < len(chosen):
        raise InputError("datapoint: a datapoint is named twice. Name each once")
    return np.array([places[int(label)] for label in chosen])


def gaps_over(dataset: xr.Dataset, gaps: xr.Dataset) -> tuple[xr.Dataset, list[str]]:
    """The tree of gaps as means over the datapoints of `dataset`, and the labels of those that have no such means."""
    kept: list[str] = []
    for name in ids(gaps):
        parent = parent_of(gaps, name)
        if name in dataset and (not parent or parent in kept):
            kept.append(name)
    finite = finite_part(dataset)
    means = [values_of(finite, name).mean for name in kept]
    tree = gaps.sel(gap=kept).assign(
        {column: ("gap", [getattr(mean, column) for mean in means]) for column in Mean._fields}
    )
    return tree, [str(gaps["label"].sel(gap=name).item()) for name in ids(gaps) if name not in kept]


def provenance_over(dataset: xr.Dataset, provenance: Provenance, dropped: Sequence[str]) -> Provenance:
    """That of a ledger of the datapoints of `dataset` alone, without what is `dropped`.

    What was said of all datapoints stays, and says so.
    """
    before = provenance.get("subset", {"of": provenance["num_datapoints"], "without": []})
    notes, cautions = _said_of_all(provenance)
    own_notes, own_cautions = _said_of(dataset, provenance["quantities"]["log_evidence"]["direction"])
    numbers = {int(label) for label in dataset[DATAPOINT].values}
    subset = {"of": before["of"], "without": list(dict.fromkeys([*before["without"], *dropped]))}
    result = {key: value for key, value in provenance.items() if key not in ("split", "examined", "infinite")}
    if not is_finite(dataset).all():
        result["infinite"] = [entry for entry in provenance["infinite"] if entry["datapoint"] in numbers]
    remarks = [_on_subset(len(numbers), **subset), *(line for line in provenance["remarks"] if SELECTED not in line)]
    result |= {"num_datapoints": len(numbers), "subset": subset, "remarks": remarks}
    return {**result, "notes": [*own_notes, *notes], "cautions": [*own_cautions, *cautions]}


SELECTED, WHOLE = "a selection of", "in the ledger of all"


def _on_subset(number: int, of: int, without: Sequence[str]) -> str:
    said = f"{SELECTED} {number:,} of {counted(of, DATAPOINT)}; means are over these"
    said += ", and biased where they were selected by values of this ledger"
    return f"{said}. Left out, because all datapoints are needed: {', '.join(without)}" if without else said


def _said_of_all(provenance: Provenance) -> tuple[list[str], list[str]]:
    """Notes and cautions on all datapoints of the ledger that this one is, or is a selection of."""
    notes, cautions = list(provenance.get("notes", [])), list(provenance.get("cautions", []))
    if "subset" in provenance:
        return [line for line in notes if line.startswith(WHOLE)], [line for line in cautions if line.startswith(WHOLE)]
    notes += other_starts.lines_on(provenance)
    cautions += other_starts.cautions_of(provenance["examined"]) if "examined" in provenance else []
    whole = f"{WHOLE} {counted(provenance['num_datapoints'], DATAPOINT)}"
    return [f"{whole}: {line}" for line in notes], [f"{whole}: {line}" for line in cautions]


def _said_of(dataset: xr.Dataset, direction: str) -> tuple[list[str], list[str]]:
    """Notes and cautions on the datapoints chosen, from their columns; `direction` is that of log p(x)."""
    notes = reliability_notes(dataset, direction, "these ") if is_examined(dataset) else []  # said of all
    number, unreliable = dataset.sizes[DATAPOINT], int((~checks_of(dataset).get("reliable", np.ones(1, bool))).sum())
    if not unreliable:
        return notes, []
    of = f"{unreliable:,} of these {counted(number, DATAPOINT)} (log_evidence_reliable is False there)"
    return notes, [f"log p(x), and the gaps measured from it, cannot be trusted for {of}"]
