"""`Term`: a gap, and `TERMS`, the tree of them. Table, summary, diagnosis, plots and the saved tree all read it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pyrogaps.errors import InputError
from pyrogaps.evidence.reliability import is_exact
from pyrogaps.gaps.finite import finite_part
from pyrogaps.settings import Name, checked
from pyrogaps.signatures import nearest

Array = NDArray[np.float64]
INFERENCE, APPROXIMATION = "inference_gap", "approximation_gap"
# Where latents are shared by datapoints: the gap of the data set, of which the inference gaps of datapoints are a part.
DATA_SET, GLOBAL = "data_set_gap", "global_gap"
INDEPENDENT = "the guide draws a datapoint's latents independently of the shared ones, or is not trained to its best"
BRIEFLY_INDEPENDENT = "local latents ignore the shared ones, or more training is needed"
DEPENDENT = "local latents that depend on the shared ones in the guide; only then longer training"
ESTIMATE, LOWER_BOUND, UPPER_BOUND = "estimate (either way)", "lower bound of the gap", "upper bound of the gap"
UNBIASED = "unbiased"
# How many standard errors a gap, or what sets two apart, has to exceed before anything is said of it.
CERTAIN = 2.0
RICHER = "a richer family"


@dataclass(frozen=True)
class Columns:
    """What gaps are differences of.

    Attributes:
        per_datapoint: of the evaluated datapoints, with `log_evidence`, `elbo`, `elbo_refined` and what else there is,
            each with its Monte Carlo standard error `<name>_mcse`.
        training: of the training datapoints, where the amortization gap is split; else empty.
        amortized: whether one network serves all datapoints.
        evidence_direction: what the measured log p(x) is in expectation.
        shared: where datapoints share latents, means over datapoints given each draw of these, and the global gap.
    """

    per_datapoint: xr.Dataset
    training: xr.Dataset = field(default_factory=xr.Dataset)
    amortized: bool = True
    evidence_direction: str = "lower bound of log p(x)"
    shared: xr.Dataset = field(default_factory=xr.Dataset)

    @property
    def finite(self) -> "Columns":
        """Of the datapoints whose bounds are all finite."""
        return replace(self, per_datapoint=finite_part(self.per_datapoint), training=finite_part(self.training))


class Values(NamedTuple):
    """Values and their Monte Carlo standard errors, `(N,)` each, in nats."""

    value: Array
    mcse: Array

    def minus(self, other: "Values") -> "Values":
        """The difference, of independent estimates."""
        return Values(self.value - other.value, np.hypot(self.mcse, other.mcse))

    @property
    def mean(self) -> "Mean":
        """Over datapoints; NaN where there are none."""
        if not len(self.value):
            return Mean(np.nan, np.nan, np.nan)
        if not np.isfinite(self.value).all():
            return Mean(float(self.value.mean()), np.nan, np.nan)
        return Mean(float(self.value.mean()), standard_error(self.value), summary_mcse(self.mcse))


class Mean(NamedTuple):
    """A mean over datapoints, its standard error over datapoints and its Monte Carlo standard error, in nats."""

    mean: float
    standard_error: float
    mcse: float


@checked("Term")
@dataclass(frozen=True, repr=False)
class Term:
    """A gap of the tree.

    Attributes:
        id: the name of its column and of its row in `summary()`; no two terms have the same one.
        label: what tables and plots call it.
        parent: the id of the term that it is a part of; None for the root. Children sum to their parent. A further term
            without a parent stands beside the tree, and no verdict ranks it.
        estimator, direction: the difference that it is, and whether that is a bound of the gap; as text, or as a
            function from the columns to text.
        value: from the columns, per datapoint or, for what is a difference between data sets, as means.
        applies: whether there is such a gap, from the columns.
        cause, remedy: what a large gap says, and what usually helps.
        colour, hatch: in plots.
        brief: the cause in a few words, for the printed ledger; empty: the cause itself.

    Example:
        >>> import pyrogaps as pg
        >>> next(term for term in pg.TERMS if term.id == "approximation_gap").remedy.split("(")[0]
        'a richer family '
    """

    id: Name
    label: Name
    parent: Name | None
    estimator: str | Callable[[Columns], str]
    direction: str | Callable[[Columns], str]
    value: Callable[[Columns], Values | Mean]
    applies: Callable[[Columns], bool] = lambda columns: True
    cause: str = ""
    remedy: str = ""
    colour: str = "#8c8c8c"
    hatch: str = ""
    brief: str = ""

    def __repr__(self) -> str:
        return f"Term({self.id!r})"

    def described(self, name: str, columns: Columns) -> str:
        """`estimator` or another text of the gap of these columns, as it stands beside it in a table."""
        text: str | Callable[[Columns], str] | None = getattr(self, name)
        return text(columns) if callable(text) else text or ""


def check_tree(terms: Sequence[Term]) -> None:
    """Refuse terms that are no tree: two with one id, or one whose parent is not among them."""
    names = [term.id for term in terms]
    if not names:
        raise InputError("terms: there are none. Pass TERMS, or TERMS + (mine,)")
    for term in terms:
        if names.count(term.id) > 1:
            raise InputError(f"terms: two have the id '{term.id}'. Give each an id of its own")
        if term.parent is not None and term.parent not in names:
            near = nearest(term.parent, names, "")
            hint = f". Did you mean '{near}'?" if near else ". Pass it too, as TERMS + (mine,) does"
            raise InputError(f"terms: '{term.id}' is a part of '{term.parent}', which is not among them{hint}")


def values_of(dataset: xr.Dataset, name: str) -> Values:
    """A column and its Monte Carlo error; of a column over families, the guide's own."""
    pair = (dataset[column] for column in (name, f"{name}_mcse"))
    own = (column.isel(family=0) if "family" in column.dims else column for column in pair)
    return Values(*(column.values.astype(float) for column in own))


def combined_error(standard_error: Any, mcse: Any) -> float:
    """Of a mean, over datapoints and draws together; of one datapoint, which has no standard error, of draws alone."""
    return float(np.hypot(np.nan_to_num(standard_error), mcse))


def _target(columns: Columns) -> Values:
    """The best bound that the network can reach: of guides that are shown no more than it."""
    return values_of(columns.per_datapoint, "elbo_shared" if _has_shared(columns) else "elbo_refined")


def _has_shared(columns: Columns) -> bool:
    return "elbo_shared" in columns.per_datapoint


def _inference_direction(columns: Columns) -> str:
    if is_exact(columns.evidence_direction):
        return UNBIASED
    return LOWER_BOUND if columns.evidence_direction.startswith("lower bound") else ESTIMATE


def _inference(columns: Columns) -> Values:
    data = columns.per_datapoint
    return values_of(data, "log_evidence").minus(values_of(data, "elbo"))


def approximation_direction(evidence_direction: str) -> str:
    """What log p(x) - L[q*] is in expectation: L[q*] is measured too low."""
    return UPPER_BOUND if is_exact(evidence_direction) else ESTIMATE


def _approximation(columns: Columns) -> Values:
    data = columns.per_datapoint
    return values_of(data, "log_evidence").minus(values_of(data, "elbo_refined"))


def _has_global(columns: Columns) -> bool:
    return GLOBAL in columns.shared


def _global(columns: Columns) -> Mean:
    """Per datapoint, as all other gaps."""
    number = len(columns.per_datapoint["datapoint"])
    return Mean(float(columns.shared[GLOBAL]) / number, np.nan, float(columns.shared[f"{GLOBAL}_mcse"]) / number)


def _global_direction(columns: Columns) -> str:
    names = ("lower", "upper", "lower_mcse", "upper_mcse")
    low, high, *errors = (float(columns.shared[f"{GLOBAL}_{name}"]) for name in names)
    if columns.shared.attrs["bounded"]:
        return f"total between {low:.3f} and {high:.3f} (± {max(errors):.3f}) nats"
    error = f" (± {errors[0]:.3f})" if np.isfinite(errors[0]) else ""
    return f"total at least {max(low, 0.0):.3f}{error} nats, not bounded above"


def _data_set(columns: Columns) -> Mean:
    own, draws = _global(columns), columns.shared[INFERENCE].values
    error = float(draws.std(ddof=1)) / len(draws) ** 0.5
    return Mean(own.mean + _inference(columns).mean.mean, np.nan, float(np.hypot(own.mcse, error)))


def _data_set_direction(columns: Columns) -> str:
    return ESTIMATE if columns.shared.attrs["bounded"] else LOWER_BOUND


def _conditioning(columns: Columns) -> Values:
    data = columns.per_datapoint
    return values_of(data, "elbo_refined").minus(values_of(data, "elbo_shared"))


def _amortization(columns: Columns) -> Values:
    return _target(columns).minus(values_of(columns.per_datapoint, "elbo"))


def _on_training(upper: str, lower: str) -> Callable[[Columns], Mean]:
    return lambda columns: values_of(columns.training, upper).minus(values_of(columns.training, lower)).mean


def _generalization(columns: Columns) -> Mean:
    here, there = _amortization(columns).mean, _on_training("elbo_target", "elbo")(columns)
    errors = np.hypot(here[1:], there[1:])
    return Mean(here.mean - there.mean, float(errors[0]), float(errors[1]))


def _is_split(columns: Columns) -> bool:
    return columns.amortized and "elbo_retrained" in columns.training


TERMS: tuple[Term, ...] = (
    Term(
        DATA_SET,
        "inference gap",
        None,
        "log p(x) - ELBO of the data set",
        _data_set_direction,
        _data_set,
        _has_global,
        colour="#d9d9d9",
    ),
    Term(
        GLOBAL,
        "global gap",
        DATA_SET,
        lambda columns: f"KL(q(theta) || p(theta | x)) by {columns.shared.attrs['method']}",
        _global_direction,
        _global,
        _has_global,
        cause="the guide's distribution of the latents that datapoints share is not their posterior",
        remedy="a richer guide for the shared latents (AutoMultivariateNormal over them, a flow), or longer training",
        colour="#8a6fae",
        brief="the guide's shared latents are not at their posterior",
    ),
    Term(INFERENCE, "inference gap", None, "log p(x) - L[q]", _inference_direction, _inference, colour="#d9d9d9"),
    Term(
        APPROXIMATION,
        "approximation gap",
        INFERENCE,
        "log p(x) - L[q*]",
        lambda columns: approximation_direction(columns.evidence_direction),
        _approximation,
        cause="the variational family cannot hold the posterior",
        remedy=(
            f"{RICHER} (full covariance, a flow, a mixture); decompose(families=...) measures how much it would gain"
        ),
        colour="#2f5d8c",
        brief="the family cannot hold the posterior",
    ),
    Term(
        "conditioning_gap",
        "conditioning gap",
        INFERENCE,
        "L[q*] - L[q*_C]",
        ESTIMATE,
        _conditioning,
        _has_shared,
        cause="the guide is not shown all data that the posterior depends on",
        remedy="showing the guide more data: a longer lookahead, smoothing, or the withheld inputs",
        colour="#7fa650",
        hatch="....",
        brief="the guide is not shown all of the data",
    ),
    Term(
        "amortization_gap",
        "amortization gap",
        INFERENCE,
        lambda columns: "L[q*_C] - L[q]" if _has_shared(columns) else "L[q*] - L[q]",
        LOWER_BOUND,
        _amortization,
        lambda columns: columns.amortized,
        cause="the network, shared by all datapoints, does not find the family's best for each",
        remedy="decompose(split=Split(train_data)), which shows whether capacity, training or data limit the network",
        colour="#f2b27a",
        hatch="////",
        brief="the network does not find the family's best",
    ),
    # Where nothing is amortized the same difference is called what it is.
    Term(
        "guide_optimization_gap",
        "optimization gap",
        INFERENCE,
        "L[q*] - L[q]",
        LOWER_BOUND,
        _amortization,
        lambda columns: not columns.amortized,
        cause="the guide has not been trained to the best of its family",
        remedy="longer training with a falling learning rate, or the refined guide: refine(model, guide, data)",
        colour="#e39a5c",
        hatch="\\\\\\\\",
        brief="the guide is not at its family's best",
    ),
    Term(
        "capacity_gap",
        "capacity gap",
        "amortization_gap",
        "L[q*_C] - L[q_phi-hat] on training data",
        ESTIMATE,
        _on_training("elbo_target", "elbo_retrained"),
        _is_split,
        cause="the network cannot express the best guides, however long it is trained",
        remedy="a larger or better suited encoder, or a few steps of refinement from its output",
        colour="#b5561e",
        brief="the network cannot express the best guides",
    ),
    Term(
        "optimization_gap",
        "optimization gap",
        "amortization_gap",
        "L[q_phi-hat] - L[q_phi] on training data",
        LOWER_BOUND,
        _on_training("elbo_retrained", "elbo"),
        _is_split,
        cause="the network has not been trained to convergence for this model",
        remedy=(
            "longer training with a falling learning rate, or extra guide steps before each model step (guide_steps)"
        ),
        colour="#e39a5c",
        hatch="\\\\\\\\",
        brief="the network is not trained to convergence",
    ),
    Term(
        "generalization_gap",
        "generalization gap",
        "amortization_gap",
        "amortization gap less that on training data",
        ESTIMATE,
        _generalization,
        _is_split,
        cause="the network does worse on these data than on those it was trained on",
        remedy=(
            "more training data, data simulated from the model, or regularisation (early stopping on the ELBO, dropout)"
        ),
        colour="#fdeedd",
        hatch="xxxx",
        brief="the network does worse here than on its training data",
    ),
)
DESCRIPTION = ("label", "parent", "estimator", "direction", "cause", "remedy", "colour", "hatch", "brief")


def measured_gaps(columns: Columns, terms: Sequence[Term] = TERMS) -> tuple[xr.Dataset, dict[str, Values]]:
    """The gaps there are, and the values of those that have any per datapoint.

    Means are over the datapoints whose bounds are all finite, the same for every gap, so that children sum to parents.
    The first has a row a gap, over "gap", in the order of the tree, with `mean`, `standard_error` and `mcse` in nats
    and the description of its term.
    """
    applying = [term for term in terms if term.applies(columns)]
    if any(term.id == DATA_SET for term in applying):  # of which the gaps per datapoint are the local part
        own: dict[str, Any] = {"amortization_gap": {"remedy": "a larger network, or longer training"}}
        own["guide_optimization_gap"] = {"remedy": "longer training with a falling learning rate"}
        if columns.shared.attrs.get("independent"):
            own = {name: {"cause": INDEPENDENT, "brief": BRIEFLY_INDEPENDENT, "remedy": DEPENDENT} for name in own}
        changed = {INFERENCE: {"parent": DATA_SET, "label": "local gap"}, **own}
        applying = [replace(term, **changed.get(term.id, {})) for term in applying]
    ordered = [*_in_tree_order(applying, None)]
    with np.errstate(invalid="ignore"):  # infinity less infinity
        values = [term.value(columns) for term in ordered]
    finite = columns.finite
    means = [value.mean if isinstance(value, Values) else value for value in (t.value(finite) for t in ordered)]
    variables: dict[str, Any] = {name: ("gap", [getattr(mean, name) for mean in means]) for name in Mean._fields}
    variables |= {name: ("gap", [term.described(name, columns) for term in ordered]) for name in DESCRIPTION}
    gaps = xr.Dataset(variables, {"gap": [term.id for term in ordered]})
    per_datapoint = {term.id: value for term, value in zip(ordered, values, strict=True) if isinstance(value, Values)}
    return gaps, per_datapoint


def _in_tree_order(terms: Sequence[Term], parent: str | None) -> Iterator[Term]:
    for term in terms:
        if term.parent == parent:
            yield term
            yield from _in_tree_order(terms, term.id)


def leaves(gaps: xr.Dataset) -> list[str]:
    """The ids of the gaps without parts of their own, but for the root."""
    parents = set(gaps["parent"].values.tolist())
    return [name for name in ids(gaps) if name not in parents and parent_of(gaps, name)]


def leaves_below(gaps: xr.Dataset, name: str) -> list[str]:
    """The leaves that a gap has as parts, or as parts of these; none for a leaf."""
    return [leaf for leaf in leaves(gaps) if leaf != name and name in ancestors(gaps, leaf)]


def ancestors(gaps: xr.Dataset, name: str) -> list[str]:
    """The ids of the gaps that `name` is a part of, from the nearest to the root."""
    parent = parent_of(gaps, name)
    return [parent, *ancestors(gaps, parent)] if parent else []


def ranked(gaps: xr.Dataset) -> list[str]:
    """The ids of the gaps that a diagnosis ranks first: those with a cause of their own, or without parts, that are
    not parts of one with a cause.
    """
    own = [name for name in ids(gaps) if root(gaps) in (name, *ancestors(gaps, name))]  # of the tree, none beside it
    causes = {name for name in own if gaps["cause"].sel(gap=name).item()}
    candidates = [name for name in own if name in causes or name in leaves(gaps)]
    return [name for name in candidates if not causes & {*ancestors(gaps, name)}]


def ids(gaps: xr.Dataset) -> list[str]:
    """Of the gaps, in the order of the tree."""
    return [str(name) for name in gaps["gap"].values]


def root(gaps: xr.Dataset) -> str:
    """The id of the whole: the inference gap, or that of the data set."""
    return DATA_SET if DATA_SET in ids(gaps) else INFERENCE


def parent_of(gaps: xr.Dataset, name: str) -> str:
    """The id of the gap that `name` is a part of; empty for the root."""
    return str(gaps["parent"].sel(gap=name).item())


def tree_labels(gaps: xr.Dataset) -> dict[str, str]:
    """Labels by id, drawn as a tree."""
    return dict(_drawn(gaps, "", ""))


def _drawn(gaps: xr.Dataset, parent: str, indent: str) -> Iterator[tuple[str, str]]:
    children = [name for name in ids(gaps) if parent_of(gaps, name) == parent]
    for name in children:
        label, last = str(gaps["label"].sel(gap=name).item()), name == children[-1]
        branch, below = ("", "") if not parent else ("└─ ", "   ") if last else ("├─ ", "│  ")
        yield name, indent + branch + label
        yield from _drawn(gaps, name, indent + below)


def standard_error(values: Any) -> float:
    """Of the mean over datapoints of `values` `(N,)`; NaN for one."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def summary_mcse(errors: Any) -> float:
    """Monte Carlo standard error of a mean over datapoints, from theirs `(N,)`."""
    return float(np.sqrt(np.square(errors).sum())) / len(errors)
