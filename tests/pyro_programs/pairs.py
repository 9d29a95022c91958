"""A program as its author would bring it, the twin that the ledger is of, and Pyro's own ELBO of either."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor

import pyrogaps as pg
from pyrogaps.density.given import ReplaySites
from pyrogaps.density.shared import SharedLatents
from pyrogaps.streams import Stream

Program = Callable[..., Any]
# The largest standard error of a comparison, in nats per datapoint, and the number of them that pass.
MAX_ERROR, WIDTH = 0.02, 4.0
# Runs of Pyro's ELBO: until its standard error is this small, in nats per datapoint.
MIN_RUNS, MAX_RUNS, TARGET = 20, 2000, 0.013


class Mean(NamedTuple):
    """A mean per datapoint and its standard error, in nats."""

    value: float
    error: float


def mean_of(values: list[float]) -> Mean:
    return Mean(float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values)))


@dataclass(frozen=True)
class Pair:
    """A model and a guide written from the description of one of Pyro's examples, and data for them.

    Attributes:
        model, guide, args: what the author brings. `data` is what `decompose` takes, `args` unless given.
        plate: the data plate's name, where it needs to be named.
        clean: model and guide without what is no part of a density per datapoint: scales, observed sites and factors
            of the guide, and sites at point estimates. None where there is nothing of that kind.
        nesting: `TraceEnum_ELBO`'s max_plate_nesting where sites are enumerated; None: `Trace_ELBO`.
        surplus: what `TraceEnum_ELBO` adds for masked enumerated sites, log(cardinality) each, over all the data, nats.
        num_datapoints: N.
        repeats: how often the rows of `args` are repeated, for so many draws in one run; for tensors in a data plate.
    """

    model: Program
    guide: Program
    args: tuple[Any, ...]
    num_datapoints: int
    plate: Any = None
    clean: tuple[Program, Program] | None = None
    nesting: int | None = None
    surplus: float = 0.0
    repeats: int = 1
    data: Any = None

    @property
    def objective(self) -> Any:
        """Pyro's own."""
        return Trace_ELBO() if self.nesting is None else TraceEnum_ELBO(max_plate_nesting=self.nesting)

    def elbo_of_pyro(self, *, raw: bool = False) -> Mean:
        """Pyro's own ELBO per datapoint of the twin, or of the program as it is."""
        model, guide = (self.model, self.guide) if raw or self.clean is None else self.clean
        args = tuple(arg.repeat(self.repeats, *[1] * (arg.dim() - 1)) for arg in self.args)
        pyro.set_rng_seed(1)
        with torch.no_grad():
            values: list[float] = []
            while len(values) < MAX_RUNS and (len(values) < MIN_RUNS or mean_of(values).error > TARGET):
                loss = self.objective.loss(model, guide, *args) / self.repeats
                values.append((-loss - self.surplus) / self.num_datapoints)
        return mean_of(values)

    def problem(self, mode: Any = "eager") -> pg.Problem:
        data = self.args if self.data is None else self.data
        return pg.Problem.of(self.model, self.guide, data, self.plate, mode)

    def ledger(self, mode: Any = "eager", num_particles: int = 2000) -> pg.GapLedger:
        """A ledger with tiny settings, without recording the density where `mode` is eager, which is faster here."""
        return pg.decompose(
            self.problem(mode),
            refinement=pg.Refinement(num_steps=30, num_selection=32),
            evidence=pg.AIS(num_chains=8, num_temperatures=8),
            num_particles=num_particles,
            referee=False,
            progress=False,
        )


def assert_same_draws(pair: Pair, draws: int = 5) -> None:
    """Every draw of log p(x, z) - log q(z | x) is Pyro's, to 1e-4 relative; of guides that draw nothing discrete."""
    problem = pair.problem()
    z, log_q = problem.guide_density().sample(draws)
    with torch.no_grad():
        ours = (problem.scored(z) - log_q).sum(1)
    values = problem.scored.constrain(z)
    model, guide = pair.clean or (pair.model, pair.guide)
    for draw in range(draws):
        rows = {name: value[draw] if problem.plate else value[draw, 0] for name, value in values.items()}
        theirs = -pair.objective.loss(model, ReplaySites(rows)(guide), *pair.args) - pair.surplus
        assert abs(float(ours[draw]) - theirs) < 1e-4 * abs(theirs), f"draw {draw}: {float(ours[draw])} is not {theirs}"


def elbo_of(ledger: pg.GapLedger, number: int = 0) -> Mean:
    """The ELBO per datapoint of a ledger, and its Monte Carlo standard error. Where the data set of `number` datapoints
    is one, its total is divided.
    """
    rows = ledger.per_datapoint
    if number:
        return Mean(float(rows.elbo.sum()) / number, float(rows.elbo_mcse.sum()) / number)
    return Mean(float(rows.elbo.mean()), float(np.sqrt((rows.elbo_mcse**2).sum())) / rows.sizes["datapoint"])


def elbo_in_parts(pair: Pair, draws: int = 400) -> Mean:
    """The ELBO per datapoint of a program with shared latents, taken apart: of theta, and of datapoints given it."""
    with pytest.raises(SharedLatents) as caught:
        pair.problem()
    hierarchy = caught.value.hierarchy
    assert hierarchy is not None
    drawn = hierarchy.draw(draws, Stream(0, "shared latents"))
    local = pg.Problem.of(hierarchy.model, hierarchy.guide, hierarchy.at(drawn.values[0]), hierarchy.plate)
    totals = []
    for seed, (values, log_ratio) in enumerate(zip(drawn.values, drawn.log_ratio.tolist(), strict=True)):
        given = pg.elbo(local.over(hierarchy.at(values)), num_particles=4, seed=seed)
        totals.append((log_ratio + float(given.value.sum())) / pair.num_datapoints)
    return mean_of(totals)


def left_out(ledger: pg.GapLedger) -> float:
    """What the ledger says that sites of the guide, left out of log q, add to it: nats per datapoint."""
    return sum(float(nats) for nats in re.findall(r"adds (-?[\d.]+)(?: ± [\d.]+)? nats per datapoint", str(ledger)))


def assert_same(ours: Mean, theirs: Mean) -> None:
    """Equal to 1e-4 relative, or within 4 standard errors of at most 0.02 nats."""
    error = math.hypot(ours.error, theirs.error)
    assert error < MAX_ERROR, f"{ours} and {theirs} are too rough to compare"
    tolerance = max(WIDTH * error, 1e-4 * abs(theirs.value))
    assert abs(ours.value - theirs.value) < tolerance, f"{ours} is not {theirs}: {ours.value - theirs.value:.4f} nats"


def joined(*tensors: Tensor) -> Tensor:
    """`tensors` beside one another along the last axis, broadcast along all others: one may be enumerated."""
    shape = torch.broadcast_shapes(*(tensor.shape[:-1] for tensor in tensors))
    return torch.cat([tensor.expand(*shape, tensor.shape[-1]) for tensor in tensors], -1)


def fixed(program: Program, values: dict[str, Tensor]) -> Program:
    """`program` with its sites in `values` at these, and without their terms."""
    return poutine.block(poutine.condition(program, data=values), hide=list(values))
