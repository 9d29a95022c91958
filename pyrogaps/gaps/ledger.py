"""`GapLedger`: the gaps of every datapoint, with their errors and where each number comes from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import xarray as xr

from pyrogaps.calibration import Calibration
from pyrogaps.density import Data
from pyrogaps.errors import InputError
from pyrogaps.evidence.reliability import is_examined
from pyrogaps.gaps import certificate as certificates
from pyrogaps.gaps import selection
from pyrogaps.gaps.diagnose import Diagnosis, diagnosis
from pyrogaps.gaps.finite import finite_part, infinite_lines
from pyrogaps.gaps.markup import full_table, paper_table
from pyrogaps.gaps.savings import savings_of
from pyrogaps.gaps.short import short_table
from pyrogaps.gaps.table import Parts, cautions, last_gap
from pyrogaps.gaps.terms import INFERENCE, Mean, ids, root, values_of
from pyrogaps.settings import Count, File, Name, checked
from pyrogaps.tables import Frame, Table
from pyrogaps.trees import PROVENANCE, describe, provenance_of, read_tree, saved, write_tree

GROUPS = ("per_datapoint", "traces", "observed_data", "gaps")
TRAINING, CERTIFICATE, SHARED = "training_data", "certificate", "shared_latents"


@dataclass(frozen=True, repr=False)
class GapLedger:
    r"""The inference gap of every datapoint and its parts, in nats.

    ```
    inference gap = log p(x) - L[q]
    ├─ approximation gap = log p(x) - L[q*]     the family cannot hold the posterior
    ├─ conditioning gap  = L[q*]    - L[q*_C]   the guide is not shown all of x (where that is so, and measured)
    └─ amortization gap  = L[q*_C]  - L[q]      one network for all x
       ├─ capacity gap                          what the network cannot do, however well trained (where split)
       ├─ optimization gap                      what training it on would gain on the training data
       └─ generalization gap                    what it does worse on these data than on the training data
    ```

    Where datapoints share latents theta, that is the local gap, given theta, and with the global gap
    KL(q(theta) || p(theta | x)) it makes up the inference gap of the data set.

    Here q* is the best of the guide's own family for each datapoint, and q*_C the best that is shown no more of x than
    the guide (q* itself for a guide that is shown all). Children sum to their parent, because they are differences
    along one chain of estimates.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> pair = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,))
        >>> ledger = pg.decompose(*pair, torch.randn(6, 4), num_particles=50, progress=False)
        >>> ledger.sel(ledger.worst(3).index).per_datapoint.sizes["datapoint"]
        3

    `print(ledger)` shows the short table, `print(ledger.table("full"))` the full one, and a notebook both as HTML.
    `save` and `load` keep the ledger in a file; `to_markdown` and `to_latex` write its table for a report or a paper;
    `compare` sets ledgers side by side.

    Attributes:
        per_datapoint: variables over "datapoint" (and "family", whose first entry "own" is the guide's): `elbo`,
            `iwae`, `log_evidence`, `elbo_refined`, `family_approximation_gap` and the gaps that have values per
            datapoint (`inference_gap`, `approximation_gap`, `amortization_gap`, ...), each with its Monte Carlo
            standard error `<name>_mcse`; `khat` and `ess` of the guide's importance weights, `khat_refined` and
            `ess_refined` of each refined family's; `log_evidence_reliable`, whether log p(x) and its error can be
            trusted (False everywhere, with the attribute `status`, where the evidence does not examine that); what the
            evidence adds: of AIS and the ladder `log_evidence_draws` and `log_evidence_ess`, draws or chains behind
            log p(x), and `acceptance`, NaN for importance sampling; of the ladder and the bridge `log_evidence_low` and
            `log_evidence_high`, a 95% interval, and `log_evidence_evaluations`; of the ladder also
            `log_evidence_method` (as in `pyrogaps.evidence.METHODS`) and `log_evidence_temperatures`; `examined`,
            whether other starts were tried; `converged` and `kept_start` of the refinements. Where a conditioning gap
            was measured: `elbo_shared`, `conditioning_gap`, and of a shared posterior `elbo_on_completions`,
            `overfitting`, `shared_converged`, `completions_ess` and `num_completions`. Columns that are True or False
            are coordinates, so that arithmetic on the others, such as the difference of two ledgers, leaves them alone;
            so are `data_fingerprint`, a hash of what the model observes of the datapoint, and `name`, where the data
            have names.
        traces: ELBO along the refinements, acceptance and ESS along the AIS paths, means over datapoints.
        observed: the data, where they are one tensor of moderate size.
        provenance: which estimator, direction of bound and settings each number has; `remarks`, what of model and guide
            is left out; seed and versions.
        training: of a split amortization gap, over "training_datapoint": `elbo` of the guide, `elbo_retrained` of the
            guide trained on, `elbo_target` (L[q*_C]), each with `<name>_mcse`; else None.
        gaps: the tree of gaps, a row for each over "gap": `mean`, `standard_error` and `mcse` in nats, `parent` and
            what its `Term` says of it.
        certificate: where asked for, how wrong the bounds can be: `lower`, log p(x) by the ledger's evidence, and its
            upper bound `upper` over "simulated" datapoints; `gain` of L[q*] by a longer refinement over "refined_again"
            ones; else None.
        shared: where datapoints share latents, the means over datapoints given each draw of these, over "draw", with
            `global_gap_lower` and `global_gap_upper`, the bounds of the global gap in nats for the data set, and their
            errors; else None.
    """

    per_datapoint: xr.Dataset
    traces: xr.Dataset
    observed: xr.Dataset
    provenance: dict[str, Any]
    gaps: xr.Dataset
    training: xr.Dataset | None = None
    certificate: xr.Dataset | None = None
    shared: xr.Dataset | None = None

    def summary(self) -> pd.DataFrame:
        """One row a quantity: mean over datapoints, its standard error over datapoints, its Monte Carlo standard error
        (both of the mean, in nats), the estimator and the direction of the bound. Where datapoints have no finite
        bounds, also `finite_mean`, over the others, which all gaps are means of. Where datapoints share latents, also
        `total`, that of the data set, and the Monte Carlo error is that of the draws of these latents.
        """
        rows = {label: self._row(name, family) for label, name, family in self._bounds()}
        for name in ids(self.gaps):
            row = self.gaps.sel(gap=name)
            numbers = {column: float(row[column]) for column in ("mean", "standard_error", "mcse")}
            rows[name] = numbers | {column: str(row[column].item()) for column in ("estimator", "direction")}
            if "infinite" in self.provenance:
                rows[name]["finite_mean"] = numbers["mean"]
            if self.shared is not None:
                rows[name]["total"] = float(row["total"])
        for family in self.families[1:]:
            rows[f"approximation_gap[{family}]"] = self._row("family_approximation_gap", family)
        return Frame.from_dict(rows, orient="index").rename_axis("quantity")

    def diagnose(self) -> Diagnosis:
        """Which gap dominates and what usually closes it, ranked by nats.

        Errors combine the standard error over datapoints with the Monte Carlo error. Nothing is advised on a difference
        within two of them, and there is no verdict where fewer than nine in ten datapoints can be trusted. Where
        `families` were measured, it says what each would save. Take `.dominant` and `.findings`, or print it.
        """
        infinite = [*infinite_lines(self.per_datapoint, self.provenance)]
        warnings = [*infinite, *cautions(finite_part(self.per_datapoint), self.provenance)]
        if self.certificate is not None:
            inference_gap = float(self.gaps["mean"].sel(gap=root(self.gaps)))
            warnings += certificates.cautions(self.certificate, inference_gap, last_gap(self.provenance))
        data = finite_part(self.per_datapoint)
        found = diagnosis(
            self.gaps,
            tuple(warnings),
            finite=not infinite,
            remarks=tuple(self.provenance.get("remarks", [])),
            doubts={name: selection.doubts_on(data, name) for name in ids(self.gaps)},
            savings=savings_of(data, self.shared, self.provenance.get("same_families", [])),
            examined=is_examined(data),
        )
        return replace(found, of_trusted=self._verdict_on_trusted()) if found.doubts else found

    def _verdict_on_trusted(self) -> tuple[int, str] | None:
        """How many datapoints can be trusted, and the verdict on these; None for fewer than half, or no verdict."""
        trusted = np.logical_and.reduce([*selection.checks_of(self.per_datapoint).values()])
        if self.shared is not None or trusted.all() or 2 * trusted.sum() < max(len(trusted), 2):
            return None
        found = self.sel(trusted).diagnose()
        return None if found.doubts or not found.finite else (int(trusted.sum()), found.verdict)

    def to_datatree(self) -> xr.DataTree:
        """The ledger as an ArviZ DataTree: groups `per_datapoint`, `traces`, `observed_data`, `gaps`, `training_data`
        where the amortization gap is split, `certificate` and `shared_latents` where there are any, the provenance as
        one JSON string in the attribute "pyrogaps" and a checksum in "pyrogaps_sha256". `save` writes it to a file.
        """
        groups = dict(zip(GROUPS, (self.per_datapoint, self.traces, self.observed, self.gaps), strict=True))
        further = {TRAINING: self.training, CERTIFICATE: self.certificate, SHARED: self.shared}
        groups |= {name: dataset for name, dataset in further.items() if dataset is not None}
        return describe(xr.DataTree.from_dict(groups), groups, self.provenance)

    @checked()
    def report(
        self,
        path: File,
        data: Data | None = None,
        *,
        calibration: Calibration | None = None,
        command: str = "",
        title: str = "Inference gaps",
    ) -> Path:
        """Write the ledger as an interactive page: one HTML file that needs no network.

        The verdict comes first, with the reasons not to trust it. Then come the tree of gaps with error bars, the table
        of `summary()`, a scatter of the datapoints, a table of them to sort and filter, with a flag wherever a number
        cannot be trusted, the calibration, the traces and the provenance. The numbers are those of the ledger, in nats.
        Figures are drawn by Bokeh, whose script the page holds: 1.3 MB, where that of plotly has 4.8 MB. A page has
        about 4 MB for 10,000 datapoints, and never more than 8 MB. Of more datapoints it shows those with the largest
        gaps, and says so. The file is written whole or not at all.

        >>> import tempfile, torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.vae import VAE
        >>> x = (torch.rand(5, 16) < 0.5).float()
        >>> ledger = pg.decompose(VAE(16, 2, [8]), AmortizedNormal(16, 2, [8]), x, progress=False)
        >>> ledger.report(f"{tempfile.mkdtemp()}/gaps.html", x).name
        'gaps.html'

        Args:
            path: of the file, `.html`, which is replaced if there is one.
            data: what `decompose` was called with. The page then shows each datapoint beside its numbers: images as
                thumbnails, sequences as lines, rows as numbers. None shows them where the ledger holds them: where the
                data are one tensor of moderate size.
            calibration: what `calibrate` returned, for a section of its own.
            command: what made the ledger, for the page to show.
            title: of the page.

        Returns:
            The path.

        Raises:
            InputError: for data of another number of datapoints, an ending of another format, and a file that cannot be
                written.
        """
        from pyrogaps.report import write_report  # with Bokeh, which nothing else needs

        return write_report(self, path, data, calibration, command=command, title=title)

    @classmethod
    @checked()
    def from_datatree(cls, tree: Annotated[xr.DataTree, saved("ledger")]) -> "GapLedger":
        """A ledger back from `to_datatree`; raises `InputError` for a tree that is not one, or not as written."""
        missing = [name for name in GROUPS if name not in tree.children]
        if missing or PROVENANCE not in tree.attrs:
            raise InputError(f"ledger: not a tree written by GapLedger.to_datatree (missing {missing or PROVENANCE})")
        names = [name for name in (*GROUPS, TRAINING, CERTIFICATE, SHARED) if name in tree.children]
        groups = {name: tree.children[name].to_dataset() for name in names}
        provenance = provenance_of(tree, groups, "ledger")
        per_datapoint, traces, observed, gaps = (groups[name] for name in GROUPS)
        _check_columns(per_datapoint, gaps, provenance)
        further = (groups.get(name) for name in (TRAINING, CERTIFICATE, SHARED))
        return cls(selection.with_flags(per_datapoint), traces, observed, provenance, gaps, *further)

    @checked()
    def save(self, path: File) -> None:
        """Write the ledger to a netCDF file (`.nc`), whole or not at all.

        `GapLedger.load` reads it back, and so does anything that reads netCDF 4: it holds `to_datatree()`. Raises
        `InputError` for the ending of another format, and where the file cannot be written; a file that was there is
        then as before.
        """
        write_tree(self.to_datatree(), path, "ledger")

    @classmethod
    @checked()
    def load(cls, path: File) -> "GapLedger":
        """The ledger that `save` wrote, or the file `ledger.nc` of a run of the command.

        Raises `InputError`, which names the file, where there is none, or where it is damaged or holds no ledger: its
        values must have the checksum that it carries.
        """
        return read_tree(path, "ledger", cls.from_datatree)

    @checked()
    def worst(self, n: Count = 10, by: Name = INFERENCE) -> pd.DataFrame:
        """The `n` datapoints with the largest gap, the largest first; one row each, in nats.

        Args:
            n: how many; all, where there are fewer.
            by: a gap, or another quantity of `per_datapoint` such as "elbo"; "approximation_gap[flow]" is that of a
                further family. The largest values come first, those that are NaN or infinite before them.

        Returns:
            Over "datapoint": `by` with its Monte Carlo standard error, the other gaps, log p(x) and the ELBO, and
            `flags`: why the numbers of this datapoint cannot be trusted, or empty. Its index selects the datapoints:
            `ledger.sel(ledger.worst(10).index)`.

        Raises `InputError` for a quantity without values per datapoint.
        """
        return selection.worst(self.per_datapoint, self.gaps, n, by)

    @checked()
    def sel(self, datapoint: Any) -> "GapLedger":
        """The ledger of some datapoints: means, standard errors and gaps are over these.

        Datapoints keep their numbers. What needs all of them is left out, and the ledger says so: the parts of a split
        amortization gap, the certificate, and the traces. Statements about the whole ledger stay, marked as such.

        Args:
            datapoint: their numbers, as in `per_datapoint["datapoint"]`, in any order; or a boolean mask over all.

        Raises `InputError` for numbers that the ledger does not have, and where datapoints share latents: the gaps of
        some would need a posterior of these latents given those datapoints alone.
        """
        if self.shared is not None:
            raise InputError(
                f"datapoint: all datapoints share {self.provenance['shared']['names']}, so some of them have no ledger "
                "of their own. Take their values from ledger.per_datapoint.sel(datapoint=[...])"
            )
        places = selection.positions(self.per_datapoint, datapoint)
        per_datapoint = self.per_datapoint.isel(datapoint=places)
        gaps, dropped = selection.gaps_over(per_datapoint, self.gaps)
        dropped += ["certificate"] * (self.certificate is not None) + ["traces"] * bool(self.traces.data_vars)
        observed = self.observed.isel(datapoint=places) if "datapoint" in self.observed.dims else self.observed
        provenance = selection.provenance_over(per_datapoint, self.provenance, dropped)
        return GapLedger(per_datapoint, xr.Dataset(), observed, provenance, gaps)

    @checked()
    def table(self, form: Literal["short", "full"] = "short") -> Table:
        """The ledger as a table: `print` it, or let a notebook show it.

        Args:
            form: "short" is what `print(ledger)` shows: means ± standard error over datapoints, in nats, what each gap
                says, the verdict and the checks. "full" has all rows of `summary()`, with Monte Carlo errors,
                directions, estimators and flags, and how each was measured.

        Returns:
            A table with the methods `html()`, `markdown()` and `latex()`.
        """
        diagnosis = self.diagnose()
        parts = self._parts(diagnosis.warnings)
        return full_table(parts) if form == "full" else short_table(parts, diagnosis)

    def to_markdown(self) -> str:
        """The table in Markdown: mean ± standard error over datapoints in nats, Monte Carlo error, and direction.

        Warnings and notes follow below.
        """
        return paper_table(self._parts(self.diagnose().warnings)).markdown()

    @checked()
    def to_latex(self, *, caption: str | None = None, label: str | None = None) -> str:
        """The table for a paper, in LaTeX with the package booktabs: mean ± standard error over datapoints in nats.

        A line below it says so, and over how many. Reasons not to trust the numbers follow; remove these lines only
        with the reasons.

        Args:
            caption, label: LaTeX code; where one is given, a `table` stands around the `tabular`.
        """
        return paper_table(self._parts(self.diagnose().warnings)).latex(caption, label)

    @property
    def families(self) -> list[str]:
        """The families refined, the guide's own first."""
        return [str(name) for name in self.per_datapoint["family"].values]

    def _bounds(self) -> list[tuple[str, str, str | None]]:
        """(row label, variable, family) of the rows of the summary that are no gaps."""
        rows: list[tuple[str, str, str | None]] = [("log_evidence", "log_evidence", None)]
        if "log_evidence_upper" in self.per_datapoint:
            rows.append(("log_evidence_upper", "log_evidence_upper", None))
        rows += [(f"elbo_refined[{family}]", "elbo_refined", family) for family in self.families]
        names = [name for name in ("elbo_shared", "elbo_on_completions") if name in self.per_datapoint]
        return rows + [(name, name, None) for name in (*names, "iwae", "elbo")]

    def _row(self, name: str, family: str | None = None) -> dict[str, Any]:
        """A row of the summary, from a column."""
        data = self.per_datapoint if family is None else self.per_datapoint.sel(family=family)
        if name == "log_evidence_upper":  # which not every datapoint has
            data = data.isel(datapoint=np.isfinite(data[name].values))
        row = {**values_of(data, name).mean._asdict(), **self.provenance["quantities"][name]}
        if "infinite" in self.provenance:
            row["finite_mean"] = values_of(finite_part(data), name).mean.mean
        if self.shared is not None:
            draws = self.shared[name] if family is None else self.shared[name].sel(family=family)
            row["mcse"] = float(draws.values.std(ddof=1)) / len(draws) ** 0.5
            row["total"] = row["mean"] * len(finite_part(data)["datapoint"])
        return row

    def _parts(self, warnings: Sequence[str]) -> Parts:
        """What tables are made of."""
        lines = [] if self.certificate is None else certificates.lines_of(self.certificate)
        return Parts(self.summary(), self.gaps, self.per_datapoint, self.provenance, warnings, [*lines])

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        full = f"<details><summary>Full table</summary>{self.table('full').html()}</details>"
        return f'<div class="pyrogaps">{self.table().html()}{full}</div>'

    def __repr__(self) -> str:
        return str(self)


def _check_columns(per_datapoint: xr.Dataset, gaps: xr.Dataset, provenance: dict[str, Any]) -> None:
    """Refuse groups that are not those of a ledger, in a tree without a checksum."""
    needed: dict[str, tuple[set[str], Iterable[Any]]] = {
        "per_datapoint": ({"datapoint", "family", "log_evidence", "elbo", "elbo_refined"}, per_datapoint.variables),
        "gaps": ({"gap", "parent", "label", *Mean._fields}, gaps.variables),
        "provenance": ({"quantities", "num_datapoints", "dim", "amortized"}, provenance),
    }
    for group, (names, known) in needed.items():
        if missing := sorted(names - {*map(str, known)}):
            raise InputError(f"ledger: {', '.join(missing)} of {group} is missing. Restore a copy, or measure it again")
