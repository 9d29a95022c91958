"""The words of a ledger's tables: titles, labels of rows, warnings and notes."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from pyrogaps.errors import counted
from pyrogaps.evidence.reliability import MAX_SHARE_UNRELIABLE
from pyrogaps.gaps import other_starts
from pyrogaps.gaps.finite import finite_part, infinite_lines
from pyrogaps.gaps.terms import DATA_SET, GLOBAL, ids, root, standard_error, tree_labels

EVIDENCE, GIVEN_SHARED = "log p(x)", "log p(x|theta)"
BOUNDS = {
    "log_evidence": "log p(x)",
    "log_evidence_upper": "log p(x), from above",
    "elbo_shared": "L[q*_C]",
    "elbo_on_completions": "L[q*_C] on completions",
    "elbo": "L[q]",
}
FURTHER = "approximation_gap["  # of a family beside the guide's own
MAX_KHAT = 0.7  # above it, importance weights are unreliable
TOTAL = "total"  # of the data set, where datapoints share latents


class Parts(NamedTuple):
    """What a ledger is printed from."""

    summary: pd.DataFrame
    gaps: xr.Dataset
    per_datapoint: xr.Dataset
    provenance: dict[str, Any]
    warnings: Sequence[str] = ()
    certificate: Sequence[str] = ()  # in words

    def row(self, name: str) -> Any:
        """Of the summary."""
        return self.summary.loc[name]

    def words(self, name: str, column: str) -> str:
        """The direction or the estimator of a row."""
        return given_shared(str(self.row(name)[column]), name, self.provenance)

    @property
    def totals(self) -> list[str]:
        """The heading of the column of totals, where there is one."""
        return [TOTAL] if "shared" in self.provenance else []


def decimals_of(summary: pd.DataFrame) -> int:
    """The decimals of the means in a table."""
    means = summary["mean"][np.isfinite(summary["mean"])]
    return 3 if means.empty or float(means.abs().max()) < 100 else 2


def groups_of(summary: pd.DataFrame, gaps: xr.Dataset) -> Iterator[list[tuple[str, Any]]]:
    """Rows of the summary by their names: bounds, gaps, gaps of further families."""
    group: list[tuple[str, Any]] = []
    further = False
    for name, row in ((str(key), row) for key, row in summary.iterrows()):
        is_further = name.startswith(FURTHER)
        if group and (name == root(gaps) or (is_further and not further)):
            yield group
            group = []
        further = is_further
        group.append((name, row))
    yield group


def title_of(provenance: dict[str, Any]) -> str:
    """What a table with all rows is of."""
    return f"Inference gaps of {heading_of(provenance)}"


def heading_of(provenance: dict[str, Any]) -> str:
    """How many datapoints, of how many latent dimensions, and given what."""
    latents = f"latent dimension {provenance['dim']}" if provenance["dim"] else "all latents discrete"
    heading = f"{number_of(provenance)}, {latents}; means over datapoints in nats"
    if shared := provenance.get("shared"):
        heading += f", given {shared['num_draws']} draws of {shared['names']}; totals of the data set"
    return heading


def number_of(provenance: dict[str, Any]) -> str:
    """The number of datapoints in words, and of how many they are a selection."""
    number, subset = provenance["num_datapoints"], provenance.get("subset")
    return counted(number, "datapoint") if subset is None else f"{number:,} of {counted(subset['of'], 'datapoint')}"


def labels_of(summary: pd.DataFrame, gaps: xr.Dataset, provenance: dict[str, Any]) -> dict[str, str]:
    """What the rows of a summary are called; gaps as a drawn tree."""
    labels = {str(name): label_of(str(name), provenance) for name in summary.index} | tree_labels(gaps)
    if "shared" in provenance:
        labels = {name: label.replace(EVIDENCE, GIVEN_SHARED) for name, label in labels.items()}
    return labels


def is_gap(name: str, gaps: xr.Dataset) -> bool:
    """Whether a row of the summary is a gap, of the tree or of a further family."""
    return name.startswith(FURTHER) or name in ids(gaps)


def given_shared(words: str, name: str, provenance: dict[str, Any]) -> str:
    """Words on a row of the summary; where datapoints share latents, log p(x) is given these."""
    shared = "shared" in provenance and name not in (DATA_SET, GLOBAL)
    return words.replace(EVIDENCE, GIVEN_SHARED) if shared else words


def warnings_of(per_datapoint: xr.Dataset, provenance: dict[str, Any]) -> list[str]:
    """Reasons not to trust the numbers."""
    return [*infinite_lines(per_datapoint, provenance), *cautions(finite_part(per_datapoint), provenance)]


def notes_of(per_datapoint: xr.Dataset, provenance: dict[str, Any]) -> list[str]:
    """What the numbers are of, and what they rest on."""
    return [*remarks_of(per_datapoint, provenance), *_methods(finite_part(per_datapoint), provenance)]


def remarks_of(per_datapoint: xr.Dataset, provenance: dict[str, Any]) -> list[str]:
    """What the numbers are of: the notes without which they could be misread."""
    shared, finite = provenance.get("shared") or {}, finite_part(per_datapoint)
    remarks = [shared["data_set"]] if "data_set" in shared else []
    remarks += provenance.get("remarks", [])
    if len(finite["datapoint"]):
        remarks += [*_on_conditions(finite, provenance), *_on_kept(provenance)]
    if provenance["unnormalised_likelihood"]:
        sites = ", ".join(provenance["unnormalised_likelihood"])
        remarks.append(
            f"unnormalised likelihood ({sites}): with validate_args=False, values outside the support were scored, so "
            "log p(x) is not a log-probability. The gaps remain valid"
        )
    return remarks


def label_of(name: str, provenance: dict[str, Any]) -> str:
    """What a quantity that is no gap is called."""
    if name == "iwae":
        return f"IWAE-{provenance['num_particles']}[q]"
    if name.startswith("elbo_refined["):
        return f"L[q*] {family_name(name[len('elbo_refined[') : -1])}"
    if name.startswith(FURTHER):
        return f"approximation gap, {name[len(FURTHER) : -1]}"
    return BOUNDS.get(name, name)


def family_name(name: str) -> str:
    """What a family is called."""
    return "own family" if name == "own" else name


def _methods(per_datapoint: xr.Dataset, provenance: dict[str, Any]) -> list[str]:
    """How the numbers were measured."""
    if not len(per_datapoint["datapoint"]):
        return []
    converged = per_datapoint["converged"].mean("datapoint")
    shares = zip(converged["family"].values, converged.values, strict=True)
    notes = ["refinement converged: " + ", ".join(f"{family_name(name)} {float(share):.0%}" for name, share in shares)]
    notes += provenance.get("notes", [])
    notes += [] if "subset" in provenance else other_starts.lines_on(provenance)
    notes += _on_weights(per_datapoint, provenance) if provenance["dim"] else []
    return [*notes, *_on_split(provenance)]


def _on_weights(per_datapoint: xr.Dataset, provenance: dict[str, Any]) -> list[str]:
    """Lines on importance weights of continuous latents, whose tails k-hat judges."""
    notes = _proposals(per_datapoint, provenance)
    khat = per_datapoint["khat"].values
    unreliable = float(np.mean(khat[np.isfinite(khat)] > MAX_KHAT)) if np.isfinite(khat).any() else 0.0
    if unreliable > 0:
        notes.append(
            f"IWAE is unreliable for {unreliable:.0%} of the datapoints (k-hat above {MAX_KHAT}). It is shown for "
            "comparison, and no gap uses it"
        )
    return notes


def _proposals(per_datapoint: xr.Dataset, provenance: dict[str, Any]) -> list[str]:
    """How close the guide and each refined family are to the posterior, as proposals."""
    if "khat_refined" not in per_datapoint:
        return []
    pairs = {guide_name(provenance): (per_datapoint["khat"], per_datapoint["ess"])}
    for family in per_datapoint["family"].values:
        refined = per_datapoint.sel(family=family)
        pairs[f"refined {family_name(family)}"] = refined["khat_refined"], refined["ess_refined"]
    values = [
        f"{name} k-hat {_median(khat)}, effective sample size {float(ess.median()) / provenance['num_particles']:.0%}"
        for name, (khat, ess) in pairs.items()
    ]
    return [f"importance weights, medians over datapoints: {'; '.join(values)}"]


def _median(khat: xr.DataArray) -> str:
    """As text; "-" where there are too few draws for a k-hat, or all weights are equal."""
    median = float(khat.median())
    if not np.isfinite(median):
        return "-"
    return f"{median:.2f}" + (f" (above {MAX_KHAT}: unreliable)" if median > MAX_KHAT else "")


def guide_name(provenance: dict[str, Any]) -> str:
    """What the guide is called."""
    return "amortized guide" if provenance["amortized"] else "guide"


def last_gap(provenance: dict[str, Any]) -> str:
    """What the difference between the refined and the guide's own bound is called."""
    return "amortization gap" if provenance["amortized"] else "optimization gap"


def cautions(per_datapoint: xr.Dataset, provenance: dict[str, Any]) -> list[str]:
    """Reasons not to trust these numbers."""
    if not len(per_datapoint["datapoint"]):
        return []
    reasons = []
    moving = 1 - float(per_datapoint["converged"].sel(family="own").mean())
    if moving > MAX_SHARE_UNRELIABLE:
        reasons.append(
            f"refinement had not converged for {moving:.0%} of the datapoints, so the approximation gap is too large "
            f"and the {last_gap(provenance)} too small. Raise num_steps of Refinement"
        )
    reasons += provenance.get("cautions", [])
    reasons += other_starts.cautions_of(provenance["examined"]) if "examined" in provenance else []
    starts = provenance.get("split", {}).get("starts", [])
    if starts and not all(start["converged"] for start in starts):
        reasons.append(
            "retraining (phi-hat) had not converged, so the capacity gap may be too large and the optimization gap too "
            "small. Raise max_rounds of Retraining"
        )
    return reasons


def _on_conditions(per_datapoint: xr.Dataset, provenance: dict[str, Any]) -> list[str]:
    """Lines on a guide that is not shown all of x."""
    shown = provenance.get("shown")
    if shown is None:
        return []
    if "elbo_shared" not in per_datapoint:
        return [
            f"conditions of the guide: {shown}. Without a reference guide, its amortization gap includes the "
            "conditioning gap"
        ]
    if "overfitting" not in per_datapoint:
        return [
            f"conditions of the guide: {shown}. The conditioning gap is overestimated wherever the reference guide is "
            "not optimal"
        ]
    number = int(per_datapoint["num_completions"].max())
    excess = float(per_datapoint["overfitting"].mean()) / 2
    misfit = (per_datapoint["elbo_on_completions"] - per_datapoint["elbo_shared"]).values
    error = f" ± {standard_error(misfit):.2f}" if len(misfit) > 1 else ""
    return [
        f"conditions of the guide: {shown}. The conditioning gap is overestimated by about {excess:.3f} nats, because "
        f"q*_C is fitted to only half of at most {counted(number, 'completion')}",
        f"the ELBO of q*_C is {misfit.mean():.2f}{error} nats higher on the model's completions than on the data. A "
        "value far from 0 means that the data do not follow the model",
    ]


def _on_split(provenance: dict[str, Any]) -> list[str]:
    """Lines on the guide that was trained on."""
    starts = provenance.get("split", {}).get("starts", [])
    if not starts:
        return []
    rounds = [len(start["elbo"]) - 1 for start in starts]
    left = [start["start"] for start in starts if not start["converged"]]
    least, most = min(rounds), max(rounds)
    trained = counted(most, "round") if least == most else f"{least} to {counted(most, 'round')}"
    return [
        f"retraining (phi-hat): {counted(len(starts), 'start')}, {trained}{' each' * (len(starts) > 1)}; best start: "
        f"{starts[0]['start']}; not converged: {', '.join(left) or 'none'}"
    ]


def _on_kept(provenance: dict[str, Any]) -> list[str]:
    """A line on fresh starts of the retraining that are not quite fresh."""
    starts = provenance.get("split", {}).get("starts", [])
    kept = sorted({name for start in starts for name in start.get("kept", [])})
    return [
        f"fresh starts reuse the guide's values of {', '.join(kept)}, because no reset_parameters() sets them. Define "
        "that method to draw new values"
    ] * bool(kept)
