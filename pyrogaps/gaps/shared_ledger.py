"""The ledger of a model with latents shared by datapoints: local gaps given draws of them, and the global gap."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyrogaps.conditioning import declared
from pyrogaps.density import Data
from pyrogaps.density.forms import as_given
from pyrogaps.density.guide import GuideDensity
from pyrogaps.density.hierarchy import Hierarchy, SharedDraws
from pyrogaps.density.remarks import quoted
from pyrogaps.density.rows import same_density
from pyrogaps.density.runs import Program
from pyrogaps.density.shared import SharedLatents
from pyrogaps.errors import InputError
from pyrogaps.gaps.assemble import observed_of
from pyrogaps.gaps.decomposition import Decomposition
from pyrogaps.gaps.finite import MAX_NAMED, is_finite
from pyrogaps.gaps.ledger import GapLedger
from pyrogaps.gaps.shared_columns import averaged, by_draw, data_set_line, gaps_of, with_elbo, with_global_gap
from pyrogaps.gaps.table import last_gap
from pyrogaps.gaps.terms import Columns, Term
from pyrogaps.gaussians import MAX_DIM
from pyrogaps.problem import Problem
from pyrogaps.run import Run
from pyrogaps.shared import GlobalGap, Shared, global_gap
from pyrogaps.shared.global_gap import WEIGHTS
from pyrogaps.shared.whole import whole_evidence
from pyrogaps.streams import derive_seed

FEW = 8  # datapoints of which the guide is examined


@dataclass(frozen=True)
class SharedDecomposition:
    """A hierarchy, and the arguments of `decompose` for it.

    Attributes:
        hierarchy: of `model` and `guide`, given `data`.
        settings: what is spent on the shared latents.
        options: of the `Decomposition` of the datapoints given them.
        compiled: whether densities are given to `torch.compile`.
    """

    hierarchy: Hierarchy
    model: Program
    guide: Program
    data: Data
    settings: Shared
    options: dict[str, Any]
    compiled: bool = False

    def __post_init__(self) -> None:
        names = quoted(self.hierarchy.names)
        for option in ("split", "certificate", "reference"):
            if self.options.get(option) is not None:
                raise InputError(f"{option}: not available where datapoints share latents ({names}). Leave it out")

    @classmethod
    def of(
        cls, found: SharedLatents, model: Program | Problem, guide: Program | None, data: Data | None
    ) -> Callable[..., "SharedDecomposition"]:
        """One of these programs, where `found` has their parts, as a function of the other arguments; else raise it."""
        if found.hierarchy is None or isinstance(model, Problem) or guide is None or data is None:
            raise found
        return partial(cls, found.hierarchy, model, guide, data)

    def rehearse(self) -> None:
        """Raise what `ledger` would raise, as far as a few steps and draws of the first datapoints can tell."""
        drawn = self._drawn()
        Decomposition(self._local(drawn), **self.options).rehearse()

    def ledger(self, terms: Sequence[Term]) -> GapLedger:
        """Measure everything."""
        drawn, hierarchy = self._drawn(), self.hierarchy
        local = self._local(drawn)
        ledgers = [*self._ledgers(local, drawn, terms)]
        run = Run(self._seed)
        per_datapoint = averaged(ledgers)
        gap = None if _is_impossible(ledgers) else self._global_gap(local, drawn, run)
        independent = self._is_independent(local, drawn)
        draws = by_draw(ledgers, per_datapoint)
        shared = with_global_gap(draws, gap, hierarchy.names, hierarchy.dim, independent=independent)
        first = ledgers[0].provenance
        columns = Columns(
            per_datapoint,
            amortized=first["amortized"],
            evidence_direction=first["quantities"]["log_evidence"]["direction"],
            shared=shared,
        )
        traces = xr.concat([ledger.traces for ledger in ledgers], "draw", join="override").mean("draw")
        provenance = {**self._provenance(ledgers), "shared": {**shared.attrs, "settings": vars(self.settings)}}
        observed = observed_of(as_given(self.data).tensor)
        gaps = gaps_of(columns, terms)
        if gap is not None and is_finite(per_datapoint).all():
            shared = with_elbo(shared, gaps, local.num_datapoints)
            provenance["shared"]["data_set"] = data_set_line(shared)
        own = [self._on_independence(local, last_gap(first))] if independent else []
        provenance["remarks"] = [*own, *provenance["remarks"], *_on_global_gap(gap, local.dim)]
        return GapLedger(per_datapoint, traces, observed, provenance, gaps, shared=shared)

    def _global_gap(self, local: Problem, drawn: SharedDraws, run: Run) -> GlobalGap | None:
        number = self.hierarchy.dim + local.num_datapoints * local.dim
        whole = whole_evidence(self.model, self.guide, self.data, number, self.settings.tolerance, run)
        return global_gap(self.hierarchy, local, drawn.values, whole, self.settings, run)

    def _ledgers(self, local: Problem, drawn: SharedDraws, terms: Sequence[Term]) -> Iterator[GapLedger]:
        """The ledger of the datapoints given each draw. What the first has recorded serves the others."""
        cache = self.options.get("cache")
        for place, values in enumerate(drawn.values):
            problem = local if place == 0 else local.over(self.hierarchy.at(values))
            folder = None if cache is None else Path(cache) / f"draw-{place}"
            options = {**self.options, "seed": derive_seed(self._seed, "shared draw", place), "cache": folder}
            yield Decomposition(problem, **options).ledger(terms)

    def _provenance(self, ledgers: Sequence[GapLedger]) -> dict[str, Any]:
        """That of the first draw; notes on quality are of the draw with the most cautions."""
        number, first = len(ledgers), ledgers[0].provenance
        worst = max(ledgers, key=lambda ledger: len(ledger.provenance.get("cautions", []))).provenance
        examined = [ledger.provenance["examined"] for ledger in ledgers if "examined" in ledger.provenance]
        names = quoted(self.hierarchy.names)
        remarks = [
            f"gaps per datapoint are given {names}: means over {number} draws from the guide, with the Monte Carlo "
            "errors of these draws"
        ]
        if declared(self.guide) is not None:
            remarks.append("the conditioning gap is not measured where latents are shared; other gaps include it")
        return {
            **first,
            "notes": [*worst.get("notes", [])],
            "cautions": [f"{line} (given one draw of {names})" for line in worst.get("cautions", [])],
            **({"examined": max(examined, key=_raised)} if examined else {}),
            **({"infinite": infinite} if (infinite := _infinite(ledgers)) else {}),
            "remarks": [*remarks, *first.get("remarks", [])],
            "seed": self._seed,
        }

    def _is_independent(self, local: Problem, drawn: SharedDraws) -> bool:
        """Whether the guide draws the latents of datapoints independently of the shared ones."""
        if not local.dim or not isinstance(local.posterior, GuideDensity):
            return False
        indices = torch.arange(min(local.num_datapoints, FEW))
        with Run(self._seed).stream("dependence").seeded(device=local.joint.device), torch.no_grad():
            z, _ = local.posterior.sample(1, indices)
            try:
                first, *others = (self._at(local, values).log_prob(z, indices) for values in drawn.values)
            except InputError:  # a flow without an inverse
                return False
        return all(same_density(first, other) for other in others)

    def _at(self, local: Problem, values: Mapping[str, Tensor]) -> GuideDensity:
        return local.over(self.hierarchy.at(values)).guide_density()

    def _on_independence(self, local: Problem, gap: str) -> str:
        names, latents = quoted(self.hierarchy.names), quoted(tuple(local.joint.sites))
        return (
            f"the guide draws {latents} independently of {names}: what that costs is in the {gap}, and no training "
            f"gains it. Let the distribution of {latents} in the guide depend on {names}"
        )

    def _drawn(self) -> SharedDraws:
        return self.hierarchy.draw(self.settings.num_draws, Run(self._seed).stream("shared latents"))

    def _local(self, drawn: SharedDraws) -> Problem:
        """The problem of the datapoints given the first draw."""
        hierarchy = self.hierarchy
        problem = Problem.of(hierarchy.model, hierarchy.guide, hierarchy.at(drawn.values[0]), hierarchy.plate)
        return problem.compiled() if self.compiled else problem

    @property
    def _seed(self) -> int:
        return int(self.options.get("seed", 0))


def _on_global_gap(gap: GlobalGap | None, dim: int) -> list[str]:
    """Remarks on what the global gap leaves out; `dim` latents has a datapoint."""
    if gap is None and dim > MAX_DIM:
        return [f"the global gap is not measured: a datapoint has more than {MAX_DIM} latents"]
    if gap is None:
        return ["the global gap is not measured: log p(x) of the data set is -infinity"]
    if gap.method == WEIGHTS:
        return [
            "the global gap leaves out whatever the guide's draws never reach, such as further modes of the posterior"
        ]
    return []


def _is_impossible(ledgers: Sequence[GapLedger]) -> bool:
    """Whether log p(x_n) of a datapoint is -infinity given every draw, and so that of the data set."""
    values = np.stack([ledger.per_datapoint["log_evidence"].values for ledger in ledgers])
    return bool(np.isneginf(values).all(0).any())


def _infinite(ledgers: Sequence[GapLedger]) -> list[dict[str, Any]]:
    """The first datapoints without finite bounds given any of the draws, each as the first such draw describes it."""
    entries: dict[int, dict[str, Any]] = {}
    for ledger in ledgers:
        for entry in ledger.provenance.get("infinite", []):
            entries.setdefault(entry["datapoint"], entry)
    return [entries[n] for n in sorted(entries)][:MAX_NAMED]


def _raised(examined: Any) -> int:
    """How many datapoints other starts raised."""
    gains = [examined.get("log_evidence"), *examined.get("refined", {}).values()]
    return sum(gain["count"] for gain in gains if gain)
