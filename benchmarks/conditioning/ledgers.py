"""The ledger of every test chorale under the three trained pairs: what the family, the future and the network cost.

A row a chorale and guide stands in `results/chorales.csv`. The references of the filter and of lookahead 2 are trained
on chorales that the model draws; a smoother is shown all, and has no conditioning gap.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch

import pyrogaps as pg
from benchmarks.conditioning.chorales import LOOKAHEADS, SETTING, Sequences, drawn, per_step, some_of, trained
from benchmarks.conditioning.rows import Options, Row, mean_row
from benchmarks.reporting import RESULTS, kept_ledger, machine
from pyrogaps.datasets import Chorales
from pyrogaps.guides.sequential import StructuredNormal
from pyrogaps.models.dmm import DeepMarkovModel

# Test chorales are measured in groups up to these lengths: a step costs the same whether or not it is padding.
GROUPS = (57, 90, 160)
QUANTITIES = (
    *("log_evidence", "elbo_refined", "elbo_shared", "elbo"),
    *("inference_gap", "approximation_gap", "conditioning_gap", "amortization_gap"),
)


def rows(options: Options) -> Iterator[Row]:
    """Means over the test chorales, nats per chorale, with their standard errors; and log p(x) per step."""
    chorales, tables = Chorales(), []
    for lookahead in LOOKAHEADS:
        folder = options.runs / "chorales" / f"lookahead-{lookahead}"
        model, guide = trained(chorales, lookahead, folder, options)
        reference = None if lookahead == math.inf else drawn(model, guide, lookahead, chorales, folder, options)
        table = ledger(model, guide, reference, some_of(chorales.test, options), folder, options)
        tables.append(table.assign(guide=f"lookahead {lookahead}"))
        told = f"trained with lookahead {lookahead}"
        nats, steps = (torch.tensor(table[name].values) for name in ("log_evidence", "length"))
        yield per_step("ledgers", told, "-log p(x) by AIS per step", -nats, steps)
        for name in (name for name in QUANTITIES if name in table):
            error = float(table[name].sem())
            yield Row("ledgers", SETTING, told, f"{name} per chorale", float(table[name].mean()), error)
        if reference is not None:
            yield bracket(model, guide, reference, chorales, folder, options)
    every = pd.concat(tables)[["guide", "chorale", "length", *tables[0].columns.drop(["guide", "chorale", "length"])]]
    every["machine"] = machine()
    every.to_csv((options.runs if options.quick else RESULTS) / "chorales.csv", index=False, float_format="%.5g")


def bracket(
    model: DeepMarkovModel,
    guide: StructuredNormal,
    reference: StructuredNormal,
    chorales: Chorales,
    folder: Path,
    options: Options,
) -> Row:
    """What the same network gains when it smooths: a conditioning gap without what all networks fall short by."""
    smoother, test = drawn(model, guide, math.inf, chorales, folder, options), some_of(chorales.test, options)
    above, below = (pg.elbo(model, q, test, num_particles=100).value for q in (smoother, reference))
    told = "ledgers", SETTING, f"trained with lookahead {guide.lookahead}"
    return mean_row(*told, "L[smoother] - L[reference] per chorale", above - below)


def ledger(
    model: DeepMarkovModel,
    guide: StructuredNormal,
    reference: StructuredNormal | None,
    test: Sequences,
    folder: Path,
    options: Options,
) -> pd.DataFrame:
    """A row for each test chorale: bounds, gaps and their Monte Carlo errors, in nats."""
    x, lengths = test
    tables = []
    for shortest, longest in zip((0, *GROUPS), GROUPS, strict=False):
        which = ((lengths > shortest) & (lengths <= longest)).nonzero()[:, 0]
        if not len(which):
            continue
        measured = kept_ledger(
            folder / f"ledger-{longest}{'-quick' if options.quick else ''}.nc",
            lambda which=which, longest=longest: pg.decompose(  # type: ignore[misc]
                pg.Problem.of(model, guide, (x[which, :longest], lengths[which]), mode="eager"),
                reference=reference,
                evidence=pg.AIS(
                    num_chains=2 if options.quick else 4,
                    num_temperatures=2 if options.quick else 60,
                    num_leapfrog=5,
                ),
                refinement=pg.Refinement(num_steps=3 if options.quick else 100, num_particles=4),
                num_particles=8 if options.quick else 500,
                seed=options.seed,
                cache=folder / "parts",
            ),
        )
        print(measured)
        found = measured.per_datapoint.sel(family="own")
        names = [name for name in QUANTITIES if name in found]
        columns = {name: found[name].values for quantity in names for name in (quantity, f"{quantity}_mcse")}
        tables.append(pd.DataFrame({"chorale": which.numpy(), "length": lengths[which].numpy(), **columns}))
    return pd.concat(tables).sort_values("chorale", ignore_index=True)
