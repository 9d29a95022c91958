"""`GapMonitor`: small ledgers along the way of a training."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray
from pyro.util import get_rng_state, set_rng_state

from pyrogaps.density import Data, GuideDensity
from pyrogaps.density.forms import as_given, as_indexed, check_present
from pyrogaps.density.runs import Program, check_callable
from pyrogaps.density.shared import SharedLatents
from pyrogaps.errors import InputError, counted
from pyrogaps.evidence import Evidence, Ladder
from pyrogaps.gaps import GapLedger, decompose
from pyrogaps.gaps.selection import UNTRUSTED, checks_of
from pyrogaps.gaps.table import warnings_of
from pyrogaps.gaps.terms import ids, root
from pyrogaps.guard import warn
from pyrogaps.problem import Problem
from pyrogaps.processes import is_reporting, world_size
from pyrogaps.refine import Refinement
from pyrogaps.settings import Count, Plate, Seed, Several, Whole, checked
from pyrogaps.shared import Shared
from pyrogaps.streams import derive_seed
from pyrogaps.tables import Table, with_error
from pyrogaps.writers import Writer

PREFIX = "gaps/"  # of the names that writers get
BOUNDS = {"log_evidence": "log p(x)", "elbo_refined[own]": "L[q*]", "elbo": "L[q]"}
ERRORS = ("standard_error", "mcse")
NAMED = ("elbo_refined[own]", "elbo_refined")  # a row of the summary, and its column in the history
# What a pair may raise whose weights are bad for now; of these, what all processes raise where one does.
FAILURES = (ValueError, ArithmeticError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
SHARED_FAILURES = (InputError, FloatingPointError)


@dataclass(frozen=True)
class Record:
    """What became of one step: a ledger, or the reason why there is none."""

    step: int
    seconds: float
    ledger: GapLedger | None = None
    failure: str = ""

    @property
    def cautions(self) -> list[str]:
        """Reasons not to trust the numbers of this step."""
        return [] if self.ledger is None else warnings_of(self.ledger.per_datapoint, self.ledger.provenance)

    @property
    def shares(self) -> dict[str, tuple[int, int]]:
        """Numbers of datapoints, of all of them, whose bounds are finite, log p(x) reliable, refinement converged."""
        if self.ledger is None:
            return {}
        checks = checks_of(self.ledger.per_datapoint)
        return {name: (int(passes.sum()), len(passes)) for name, passes in checks.items()}

    def row(self) -> dict[str, Any]:
        """The row of the history."""
        row: dict[str, Any] = {}
        if self.ledger is not None:
            rows = self.ledger.summary().to_dict("index")
            for name in (*BOUNDS, *ids(self.ledger.gaps)):
                column = name.replace(*NAMED)
                row[column] = float(rows[name]["mean"])
                row |= {f"{column}_{error}": float(rows[name][error]) for error in ERRORS}
            row |= {name: number / total for name, (number, total) in self.shares.items()}
        return {**row, "seconds": self.seconds, "cautions": "; ".join(self.cautions), "failure": self.failure}

    def scalars(self) -> dict[str, float]:
        """What writers get: the finite numbers of the row, and how many warnings there are."""
        row = self.row() | {"warnings": float(len(self.cautions)), "failed": float(self.ledger is None)}
        kept = {name: value for name, value in row.items() if isinstance(value, float) and np.isfinite(value)}
        return {PREFIX + name: value for name, value in kept.items()}

    @property
    def doubtful(self) -> bool:
        """Whether a number of this step is missing or cannot be trusted."""
        untrusted = any(number < total for number, total in self.shares.values())
        return self.ledger is None or untrusted or bool(self.cautions)

    def flags(self) -> str:
        """Why the numbers of this step need care, in a few words."""
        if self.ledger is None:
            return "not measured"
        words = UNTRUSTED | {"converged": "not converged"}
        shares = self.shares.items()
        flags = [f"{words[name]} {total - number}/{total}" for name, (number, total) in shares if number < total]
        flags += [] if "reliable" in self.shares else [UNTRUSTED["examined"]]
        return "; ".join([*flags, *["see warnings"] * bool(self.cautions)])


@checked("GapMonitor")
class GapMonitor:
    r"""Gaps during a training: a small ledger every few steps, of the same datapoints and with the same seed.

    It is called with the number of the step, and measures where that is a multiple of `every`:

    - `pg.train(model, guide, x, callback=monitor)` calls it after every epoch, counted from 1;
    - a loop of your own calls it after a step: `svi.step(x); monitor(step)`. Before the first step parameters may not
      exist yet, and what is measured are initial values that are thrown away.

    Training is not changed by it: random states, modes, gradients and parameters are put back, so the weights are bit
    for bit those of a training without a monitor. All numbers are in nats, means over the datapoints.

    `print(monitor)` shows the table, `plot_monitor(monitor)` the picture, `monitor.history` is the data frame. What
    cannot be trusted is flagged in all of them. A step at which model and guide cannot be measured, for example because
    a density is not finite early in training, is recorded as missing with the reason, which is also a Python warning
    the first time; training goes on.

    **Cost.** Of each datapoint, one measurement takes 8 natural-gradient steps for a Gaussian guide, or up to
    `refinement.num_steps` of Adam for another, at most `evidence.max_evaluations` evaluations of log p(x, z), and
    `num_particles` draws. For 32 datapoints and a VAE of 8 latents that is below a second on one core; the column
    `seconds` has what yours took. The budgets are a fraction of those of `decompose`: call that for final numbers.

    **Differences between steps.** Datapoints and random numbers are the same at every step, so a difference of two
    steps is known better than the errors of both suggest: `pg.compare(monitor.ledgers[20], monitor.ledgers[10])` pairs
    them.

    Args:
        model, guide: the pair in training.
        data: as for `decompose`; held-out data, if you have any.
        every: steps between measurements.
        datapoints: how many are measured, chosen at random once; all, where there are fewer. None: all.
        evidence: how log p(x) is measured. None: `Ladder(tolerance=0.2, max_evaluations=4000)`.
        refinement: of the guide for each datapoint. None: `Refinement(num_steps=300, num_selection=128)`.
        num_particles: draws for each ELBO.
        plate: the data plate's name, see `JointDensity`.
        seed: of the choice of datapoints, and of all measurements.
        writers: where each measurement goes, such as `pyrogaps.writers.TensorBoard("runs")`; see
            `pyrogaps.writers.Writer`. Names are those of `history`, as in "gaps/inference_gap".

    Attributes:
        ledgers: step -> `GapLedger`, without data and traces. Datapoint n of a ledger is `indices[n]` of `data`.
        indices: the datapoints measured, `(n,)`; empty before the first measurement.

    Where `torch.distributed` is initialised, all processes must call it, because they share the work; the first one
    writes. No other gap than those of the guide is measured: use `decompose` for further families, splits and modes
    missed (`referee`).

    Raises:
        InputError: for settings out of range, and data that are missing or no data.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(60, 4)
        >>> monitor = pg.GapMonitor(model, guide, x, every=2, datapoints=16)
        >>> result = pg.train(model, guide, x, num_epochs=4, callback=monitor, progress=False)
        >>> [*monitor.history.index]
        [2, 4]
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        data: Data | None = None,
        *,
        every: Count = 10,
        datapoints: Count | None = 64,
        evidence: Evidence | None = None,
        refinement: Refinement | None = None,
        num_particles: Several = 200,
        plate: Plate = None,
        seed: Seed = 0,
        writers: Sequence[Writer] = (),
    ) -> None:
        for program, what in ((model, "model"), (guide, "guide")):
            check_callable(program, what)
        check_present(model, data, "Pass the data to measure")
        as_given(data, model)  # refuses what is no data before a training begins
        self._pair, self._plate, self._data = (model, guide), plate, data
        self.every, self.datapoints, self.seed, self._writers = every, datapoints, seed, tuple(writers)
        self._options: dict[str, Any] = {
            "evidence": evidence or Ladder(tolerance=0.2, max_evaluations=4000),
            "refinement": refinement or Refinement(num_steps=300, num_selection=128),
            "num_particles": num_particles,
            "shared": Shared(num_draws=4, tolerance=1.0, max_evaluations=200_000),
            "seed": seed,
            "referee": False,
            "progress": False,
        }
        self.indices: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._records: dict[int, Record] = {}
        self._warned: set[str] = set()

    @checked()
    def __call__(self, step: Whole, history: Mapping[str, Any] | None = None) -> None:
        """Measure, if `step` is a multiple of `every`. The `history` that `train` passes is not used."""
        if step % self.every == 0:
            self.measure(step)

    @checked()
    def measure(self, step: Whole) -> GapLedger | None:
        """Measure now, whatever `every` is, and record it for `step`, in place of what was recorded for it.

        Returns the ledger; None where model and guide cannot be measured.
        """
        before, begun = get_rng_state(), time.perf_counter()
        ledger, failure = None, ""
        try:
            ledger = self._ledger()
        except FAILURES as error:
            if world_size() > 1 and not isinstance(error, SHARED_FAILURES):
                raise
            failure = " ".join(str(error).split()) or type(error).__name__
        finally:
            set_rng_state(before)
        record = self._records[step] = Record(step, time.perf_counter() - begun, ledger, failure)
        if failure and failure not in self._warned:
            self._warned.add(failure)
            warn(f"GapMonitor: step {step} could not be measured: {failure}")
        if is_reporting():
            for writer in self._writers:
                writer.log(step, record.scalars())
        return ledger

    def _ledger(self) -> GapLedger:
        model, guide = self._pair
        try:
            problem = Problem.of(model, guide, self._data, self._plate)
        except SharedLatents as shared:
            number = len(as_indexed(self._data, model))
            if len(self._chosen(number)) < number:
                names = ", ".join(map(repr, shared.names))
                raise InputError(
                    f"GapMonitor.datapoints: all datapoints share {names}, so some of them have no ledger of their "
                    "own. Pass datapoints=None to measure all"
                ) from shared
            return _light(decompose(model, guide, self._data, plate=self._plate, **self._options))
        number = problem.num_datapoints
        chosen = self._chosen(number)
        if len(chosen) < number and isinstance(problem.posterior, GuideDensity) and problem.posterior.bound:
            raise InputError(
                "GapMonitor.datapoints: the guide has parameters for each datapoint. Pass datapoints=None and the data "
                "that it is trained on"
            )
        return _light(decompose(problem.at(torch.from_numpy(chosen)), **self._options))

    def _chosen(self, number: int) -> NDArray[np.int64]:
        """The datapoints to measure, of so many, in order."""
        size = number if self.datapoints is None else min(self.datapoints, number)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "monitor", "datapoints"))
        self.indices = torch.randperm(number, generator=generator)[:size].sort().values.numpy()
        return self.indices

    @property
    def ledgers(self) -> dict[int, GapLedger]:
        """The ledgers by step, of the steps that could be measured."""
        return {record.step: record.ledger for record in self.records if record.ledger is not None}

    @property
    def records(self) -> list[Record]:
        """What became of every step, in order."""
        return [self._records[step] for step in sorted(self._records)]

    @property
    def history(self) -> pd.DataFrame:
        """One row for every measurement, over "step".

        `log_evidence`, `elbo_refined` (L[q*] of the guide's family), `elbo` and the gaps, means in nats, each with
        `<name>_standard_error` over datapoints and `<name>_mcse`; the shares of datapoints with `finite` bounds,
        `reliable` log p(x) (where the evidence examines that) and `converged` refinement; `seconds`; `cautions`,
        reasons not to trust the numbers; and `failure`, why there are none (values are then NaN).
        """
        index = pd.Index([record.step for record in self.records], name="step", dtype=np.int64)
        return pd.DataFrame([record.row() for record in self.records], index=index)

    def _table(self) -> Table:
        records = self.records
        measured = [record for record in records if record.ledger is not None]
        labels = dict(BOUNDS)
        for record in measured:
            assert record.ledger is not None
            gaps = record.ledger.gaps
            labels |= {name: str(gaps["label"].sel(gap=name).item()) for name in ids(gaps)}
        rows = [[str(record.step), *_cells(record, labels), record.flags()] for record in records]
        number = counted(len(self.indices), "datapoint")
        last, *before = reversed(measured) if measured else [None]
        cautions = [f"step {record.step}: {record.failure}" for record in records if record.failure]
        if last is not None:
            cautions += [f"step {last.step}: {line}" for line in last.cautions]
        if others := [str(record.step) for record in reversed(before) if record is not None and record.cautions]:
            cautions.append(
                f"earlier steps have warnings too ({', '.join(others)}). See the column cautions of monitor.history"
            )
        return Table(
            f"Gaps during training: {number}, the same at every step; means in nats ± standard error",
            ["step", *labels.values(), "flags"],
            [rows],
            cautions,
            notes=[_note(measured)] if measured else [],
        )

    def _repr_html_(self) -> str:
        return self._table().html()

    def __str__(self) -> str:
        if not self._records:
            return f"GapMonitor: nothing measured yet; a step is measured where {self.every} divides its number"
        return str(self._table())

    __repr__ = __str__


def _light(ledger: GapLedger) -> GapLedger:
    """A ledger without the data and the traces, many of which are kept."""
    return replace(ledger, observed=xr.Dataset(), traces=xr.Dataset())


def _cells(record: Record, names: Mapping[str, str]) -> list[str]:
    if record.ledger is None:
        return ["-"] * len(names)
    row = record.row()
    cells = []
    for name in names:
        column = name.replace(*NAMED)
        errors = [row.get(f"{column}_{error}", np.nan) for error in ERRORS]
        error = errors[0] if np.isfinite(errors[0]) else errors[1]
        cells.append(with_error(row.get(column, np.nan), error))
    return cells


def _note(measured: Sequence[Record]) -> str:
    ledger = measured[-1].ledger
    assert ledger is not None
    direction = str(ledger.gaps["direction"].sel(gap=root(ledger.gaps)).item())
    settings = (
        f"{ledger.provenance['num_particles']} draws, at most {ledger.provenance['refinement']['num_steps']} steps"
    )
    return (
        f"Small budgets ({settings}); inference gap: {direction}. Steps share datapoints and random numbers: "
        "pg.compare(monitor.ledgers[a], monitor.ledgers[b]) pairs them."
    )
