"""`compare`: ledgers of the same datapoints, side by side."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from pyrogaps.errors import InputError
from pyrogaps.gaps.comparison import Comparison, gaps_in_common
from pyrogaps.gaps.differences import EVIDENCE, Difference, Pair, error_of
from pyrogaps.gaps.ledger import GapLedger
from pyrogaps.gaps.same_data import Named, common_datapoints, quoted_pair
from pyrogaps.gaps.table import warnings_of
from pyrogaps.gaps.terms import CERTAIN, Mean, ids
from pyrogaps.settings import Name, checked
from pyrogaps.signatures import nearest

LEDGER = "ledger.nc"  # of a run of the command
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@checked()
def compare(*ledgers: Any, reference: Name | None = None) -> Comparison:
    r"""Compare ledgers of the same datapoints, paired datapoint by datapoint.

    Every quantity's difference, the reference less another ledger, is a mean of paired differences,

    $$\bar d = \frac{1}{N} \sum_n (a_n - b_n),$$

    with its standard error over datapoints, and its Monte Carlo standard error: of independent estimates where the
    ledgers were measured with different seeds, else the sum of both, which no correlation exceeds. See `Comparison` for
    log p(x) of two models, which is known between bounds, and for what is needed for a verdict.

    Args:
        ledgers: `GapLedger`s, or paths of saved ones or of folders of runs, one after the other; or one dictionary
            `name -> ledger`. Without one, the files and folders give the names, and other ledgers are called a, b, ...
        reference: the name of the ledger that the others are compared with; None: the first.

    Returns:
        A `Comparison`; print it, take `.verdict()`, `.summary()`, `.per_datapoint`, or plot it with `plot_comparison`.

    Raises:
        InputError: naming the ledgers, where their data differ, or their log p(x) has different base measures (counts
            against normalised pixels, discrete against continuous values); where datapoints share latents; and for
            files that are no ledgers.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> model, x, quick = LinearGaussian.random(4, 2), torch.randn(6, 4), {"num_particles": 50, "progress": False}
        >>> guides = {"small": AmortizedNormal(4, 2, (2,)), "large": AmortizedNormal(4, 2, (32,))}
        >>> ledgers = {name: pg.decompose(model, guide, x, **quick) for name, guide in guides.items()}
        >>> pg.compare(ledgers).names
        ('small', 'large')
    """
    named = dict(_named(ledgers))
    if len(named) < 2:
        raise InputError("ledgers: there is nothing to compare. Pass two or more, or a dictionary of them by name")
    if reference is not None and reference not in named:
        near = nearest(reference, named, "")
        hint = f"Did you mean '{near}'?" if near else f"Known are {', '.join(named)}"
        raise InputError(f"reference: there is no ledger '{reference}'. {hint}")
    first = reference or next(iter(named))
    others = [name for name in named if name != first]
    pairs = {name: _paired((first, named[first]), (name, named[name])) for name in others}
    differences = {name: list(pair.differences()) for name, pair in pairs.items()}
    order = list(dict.fromkeys(difference.quantity for own in differences.values() for difference in own))
    return Comparison(
        (first, *others),
        _together([_means(differences[name]) for name in others], others, order),
        _together([_columns(pairs[name], differences[name]) for name in others], others),
        _gaps(pairs),
        _provenance((first, named[first]), named, pairs, differences),
    )


def _named(ledgers: tuple[Any, ...]) -> Iterator[Named]:
    """Ledgers by their names, loaded where they are paths."""
    if len(ledgers) == 1 and isinstance(ledgers[0], Mapping):
        for name, ledger in ledgers[0].items():
            yield str(name), _loaded(ledger, str(name))
        return
    paths = [Path(ledger) for ledger in ledgers if isinstance(ledger, str | os.PathLike)]
    short = [_name_of(path) for path in paths]
    letters, files = iter(LETTERS), iter(zip(paths, short, strict=True))
    seen: set[str] = set()
    for ledger in ledgers:
        if isinstance(ledger, str | os.PathLike):
            path, name = next(files)
            name = str(path) if short.count(name) > 1 else name
        else:
            name = next(letters, "")
        if name in seen or not name:
            raise InputError(f"ledgers: two are called '{name}'. Pass a dictionary, name -> ledger")
        seen.add(name)
        yield name, _loaded(ledger, name)


def _name_of(path: Path) -> str:
    """What a saved ledger is called: its file without the ending, or the folder of its run."""
    return path.resolve().parent.name if path.name == LEDGER else path.name if path.is_dir() else path.stem


def _loaded(ledger: Any, name: str) -> GapLedger:
    if isinstance(ledger, GapLedger):
        return ledger
    if isinstance(ledger, xr.DataTree):
        return GapLedger.from_datatree(ledger)
    if not isinstance(ledger, str | os.PathLike):
        raise InputError(
            f"ledger '{name}': must be a GapLedger or the path of a saved one, got a {type(ledger).__name__}. Pass "
            "what decompose returned"
        )
    path = Path(ledger)
    return GapLedger.load(path / LEDGER if path.is_dir() else path)


def _paired(first: Named, second: Named) -> Pair:
    """Two ledgers at the datapoints that they have in common."""
    labels = common_datapoints(first, second)
    pair = Pair(*(_at(ledger, labels) for _, ledger in (first, second)))
    if not pair.columns[0].sizes["datapoint"]:
        raise InputError(
            f"{quoted_pair(first, second)}: no datapoint has finite bounds in both. See print(ledger) for the sites at "
            "fault"
        )
    return pair


def _at(ledger: GapLedger, labels: Any) -> GapLedger:
    own = ledger.per_datapoint["datapoint"].values
    return ledger if np.array_equal(own, labels) else ledger.sel(labels)


def _together(parts: list[xr.Dataset], others: list[str], order: list[str] | None = None) -> xr.Dataset:
    """One data set of those of several ledgers, over "other"; `order` is that of quantities."""
    axis = xr.DataArray(others, dims="other", name="other")
    joined = xr.concat(parts, axis, join="outer", data_vars="all", coords="minimal", compat="override")
    flags = [str(name) for name in joined.data_vars if str(name).endswith("_trusted") and name != "num_trusted"]
    joined = joined.assign({name: joined[name].fillna(False).astype(bool) for name in flags}).set_coords(flags)
    return joined if order is None else joined.sel(quantity=order)


def _means(differences: list[Difference]) -> xr.Dataset:
    """Means over datapoints, a row for each quantity."""
    variables: dict[str, list[Any]] = {}
    for difference in differences:
        low, high = difference.ends
        row: dict[str, Any] = {
            "label": difference.label,
            "reference": difference.first,
            "value": difference.second,
            **difference.mean._asdict(),
            **{name: end.mean for name, end in (("low", low), ("high", high))},
            **{f"{name}_standard_error": end.standard_error for name, end in (("low", low), ("high", high))},
            **{f"{name}_mcse": end.mcse for name, end in (("low", low), ("high", high))},
            **{f"{name}_error": error_of(end) for name, end in (("low", low), ("high", high))},
            "num_trusted": int(difference.trusted.sum()),
            "num_datapoints": len(difference.trusted),
            "verdict": difference.verdict,
        }
        for name, value in row.items():
            variables.setdefault(name, []).append(value)
    names = [difference.quantity for difference in differences]
    return xr.Dataset({name: ("quantity", values) for name, values in variables.items()}, {"quantity": names})


def _columns(pair: Pair, differences: list[Difference]) -> xr.Dataset:
    """Differences per datapoint."""
    variables: dict[str, Any] = {}
    for difference in differences:
        ends = {"": difference.value, "_low": difference.low, "_high": difference.high}
        for end, values in ends.items():
            name = f"{difference.quantity}{end}"
            variables[name] = ("datapoint", values.value, {"units": "nats"})
            variables[f"{name}_mcse"] = ("datapoint", values.mcse, {"units": "nats"})
        variables[f"{difference.quantity}_trusted"] = ("datapoint", difference.trusted)
    return xr.Dataset(variables, {"datapoint": pair.columns[0]["datapoint"].values})


def _gaps(pairs: Mapping[str, Pair]) -> xr.Dataset:
    """The tree of gaps that all ledgers have."""
    trees = [pair.second.gaps for pair in pairs.values()]
    gaps = next(iter(pairs.values())).first.gaps
    for tree in trees:
        gaps = gaps_in_common(gaps, tree)
    return gaps


def _provenance(
    first: Named, named: Mapping[str, GapLedger], pairs: Mapping[str, Pair], differences: Mapping[str, list[Difference]]
) -> dict[str, Any]:
    known = {name: {difference.quantity for difference in own} for name, own in differences.items()}
    without = {
        name: sorted({*ids(pair.first.gaps), *ids(pair.second.gaps)} - known[name]) for name, pair in pairs.items()
    }
    return {
        "left_out": {name: _left_out(first[1], named[name], pair) for name, pair in pairs.items()},
        "one_model": {name: pair.one_model for name, pair in pairs.items()},
        "log_evidence": {name: float(pair.evidence.mean()) for name, pair in pairs.items() if pair.one_model},
        "one_seed": {name: pair.one_seed for name, pair in pairs.items()},
        "without": {name: [key.replace("_", " ") for key in keys] for name, keys in without.items()},
        "warnings": {name: [*_warnings(first[0], name, pair, differences[name])] for name, pair in pairs.items()},
    }


def _left_out(first: GapLedger, second: GapLedger, pair: Pair) -> int:
    """How many datapoints of either ledger are not compared."""
    every = np.union1d(*(ledger.per_datapoint["datapoint"].values for ledger in (first, second)))
    return len(every) - int(pair.columns[0].sizes["datapoint"])


def _warnings(first: str, other: str, pair: Pair, differences: list[Difference]) -> Iterator[str]:
    """Reasons not to trust the comparison: those of the ledgers, and log p(x) of one model that is two numbers."""
    evidence: Mean = next(difference for difference in differences if difference.quantity == EVIDENCE).mean
    if pair.one_model and abs(evidence.mean) > CERTAIN * error_of(evidence):
        low = first if evidence.mean < 0 else other
        yield (
            f"log p(x) of one model differs by {abs(evidence.mean):.3f} ± {error_of(evidence):.3f} nats between the "
            f"ledgers: that of '{low}' is too low, and so are the inference and approximation gaps that it prints"
        )
    for name, ledger in ((first, pair.first), (other, pair.second)):
        for line in warnings_of(ledger.per_datapoint, ledger.provenance):
            yield f"{name}: {line}"
