"""Whether two ledgers are of the same data, and of densities with respect to the same measure; refused where not."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyrogaps.density.observations import FACTOR, described
from pyrogaps.errors import InputError, counted
from pyrogaps.gaps.facts import OBSERVED, same_model
from pyrogaps.gaps.ledger import GapLedger
from pyrogaps.gaps.selection import FINGERPRINT

Named = tuple[str, GapLedger]
SAME_SHAPE = 1e-4  # relative difference of moments in single precision


def common_datapoints(first: Named, second: Named) -> NDArray[np.int64]:
    """Numbers of the datapoints that two ledgers, each with its name, have in common.

    Raises `InputError`, which names the ledgers, where these are not of the same data, or where densities are with
    respect to different measures.
    """
    for name, ledger in (first, second):
        _check_known(name, ledger)
    sites = [ledger.provenance[OBSERVED] for _, ledger in (first, second)]
    names = quoted_pair(first, second)
    measures = [sorted({site["measure"] for site in own}) for own in sites]
    if measures[0] != measures[1]:
        raise InputError(
            f"{names}: log p(x) has different base measures. {_words(first[0], sites[0])}; "
            f"{_words(second[0], sites[1])}. A probability and a density cannot be compared. Use likelihoods of the "
            "same kind for both"
        )
    if FACTOR in measures[0] and not same_model(first[1].provenance, second[1].provenance):
        factor = next(site["site"] for site in sites[0] if site["measure"] == FACTOR)
        raise InputError(
            f"{names}: the models differ, and the base measure of the factor '{factor}' is not known. Replace "
            "pyro.factor by a sample site with obs="
        )
    labels = np.intersect1d(first[1].per_datapoint["datapoint"].values, second[1].per_datapoint["datapoint"].values)
    if not len(labels):
        raise InputError(f"{names}: no datapoint is in both. Compare ledgers of the same datapoints")
    prints = [_prints(ledger, labels) for _, ledger in (first, second)]
    different = np.flatnonzero(prints[0] != prints[1])
    if len(different):
        _refuse_other_data(first, second, labels[different], np.array_equal(np.sort(prints[0]), np.sort(prints[1])))
    return np.asarray(labels)


def quoted_pair(first: Named, second: Named) -> str:
    """Two ledgers by name."""
    return f"ledgers '{first[0]}' and '{second[0]}'"


def _check_known(name: str, ledger: GapLedger) -> None:
    if ledger.shared is not None:
        raise InputError(
            f"ledger '{name}': its datapoints share {ledger.provenance['shared']['names']}, and values given draws of "
            "them cannot be paired. Compare the totals in summary() instead"
        )
    if FINGERPRINT not in ledger.per_datapoint.coords or OBSERVED not in ledger.provenance:
        raise InputError(
            f"ledger '{name}': it does not record which data it is of, because an earlier version wrote it. Measure it "
            "again"
        )


def _prints(ledger: GapLedger, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    values: NDArray[np.int64] = ledger.per_datapoint[FINGERPRINT].sel(datapoint=labels).values
    return values


def _refuse_other_data(first: Named, second: Named, different: NDArray[np.int64], reordered: bool) -> None:
    names = quoted_pair(first, second)
    if reordered:
        raise InputError(f"{names}: the datapoints are the same, but in another order. Pass the data in the same order")
    one, other = (ledger.provenance[OBSERVED] for _, ledger in (first, second))
    if len(one) == len(other) == 1 and _is_rescaled(one[0], other[0]):
        raise InputError(
            f"{names}: log p(x) has different base measures. {_words(first[0], one)}; {_words(second[0], other)}. "
            "These are the same values in other units. Give both models the same"
        )
    raise InputError(
        f"{names}: the data differ at {counted(len(different), 'datapoint')}, first at datapoint {different[0]}. "
        f"{_words(first[0], one)}; {_words(second[0], other)}. Compare ledgers of the same data"
    )


def _is_rescaled(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two sites seem to hold the same values in other units: of the same shape, in another range."""
    ranges = [site["high"] - site["low"] for site in (one, other)]
    if one["count"] != other["count"] or not all(ranges) or np.isclose(ranges[0], ranges[1], rtol=SAME_SHAPE):
        return False
    shapes = [
        [(site["mean"] - site["low"]) / width, site["deviation"] / width]
        for site, width in zip((one, other), ranges, strict=True)
    ]
    return bool(np.allclose(shapes[0], shapes[1], rtol=SAME_SHAPE))


def _words(name: str, sites: Sequence[dict[str, Any]]) -> str:
    return f"'{name}' observes {', '.join(map(described, sites))}"
