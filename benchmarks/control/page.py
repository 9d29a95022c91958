"""The page of the results: what was done, the table, and what holds of the claim."""

import argparse
import math
from collections.abc import Mapping, Sequence

from benchmarks.control import judge
from benchmarks.control.learning import LOOKAHEADS, Row
from benchmarks.control.settings import COST, MIN_EMISSION_SCALE, SETTINGS, STEPS

NAMES = {0: "filter", 1: "lookahead 1", 3: "lookahead 3", math.inf: "smoother"}


def percent(value: float | None) -> str:
    """A regret of 0.1 as "10%"."""
    if value is None:
        return ""
    return "unstable" if math.isinf(value) else f"{100 * value:.3g}%" if value < 10 else f"{100 * value:,.0f}%"


def table(found: Sequence[Row], setting: str) -> list[list[str]]:
    """A row for each lookahead."""
    lines = []
    for lookahead in LOOKAHEADS:
        of = judge.summary(found, setting, lookahead)
        versus = ""
        if lookahead < math.inf:
            comparison = judge.compared(found, setting, lookahead)
            versus = f"{comparison.verdict} ({comparison.worse} worse, {comparison.better} better)"
        lines.append(
            [
                setting,
                NAMES[lookahead],
                f"{percent(of.median)} ({percent(of.low)} to {percent(of.high)})",
                f"{of.unstable} of {of.number}",
                percent(of.infinite_data),
                f"{of.model_loss:.3f}",
                f"{of.gap:.2f}",
                f"{of.gap_at_truth:.2f}",
                versus,
            ]
        )
    return lines


COLUMNS = (
    "setting",
    "guide",
    "median regret (95% interval)",
    "unstable",
    "infinite data",
    "model's loss",
    "gap, own model",
    "gap, true model",
    "against the smoother's",
)


def lines_of(setting: str, found: Sequence[Row]) -> str:
    """The rows of a setting as plain text."""
    return "\n".join("  ".join(line) for line in table(found, setting))


def markdown(found: Sequence[Row]) -> str:
    settings = dict.fromkeys(row.setting for row in found)
    lines = [line for setting in settings for line in table(found, setting)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [COLUMNS, ["---"] * len(COLUMNS), *lines])


def verdict(found: Sequence[Row]) -> str:
    """For each setting, what its filter's models do beside its smoother's."""
    by_verdict: dict[str, list[str]] = {}
    for setting in dict.fromkeys(row.setting for row in found):
        by_verdict.setdefault(judge.compared(found, setting, 0).verdict, []).append(setting)
    words = {
        "worse": "**holds** (the filter's model controls worse)",
        "better": "**does not hold** (the filter's model controls better)",
        "undecided": "**undecided**",
    }
    return "\n".join(f"- {words[kind]}: {', '.join(by_verdict[kind])}." for kind in words if kind in by_verdict)


def text(found: Sequence[Row], machines: Mapping[str, str], options: argparse.Namespace) -> str:
    """The whole page; `machines` are those that its rows were made on, by setting."""
    steep = [row.slope for row in found]
    floor = [row for row in found if row.lookahead == 0]
    at_floor = sum(row.emission_scale < 1.05 * MIN_EMISSION_SCALE for row in floor)
    few = {setting.name: setting.num_trajectories for setting in SETTINGS}
    return PAGE.format(
        command=f"python -m benchmarks.control --sets {options.sets} --steps {options.steps} --seed {options.seed}",
        machine="; ".join(dict.fromkeys(machines.values())),
        sets=options.sets,
        steps=STEPS,
        bfgs=options.steps,
        seed=options.seed,
        trajectories=max(few.values()),
        output=float(COST.output[0, 0]),
        action=float(COST.action[0, 0]),
        floor=MIN_EMISSION_SCALE,
        at_floor=at_floor,
        filters=len(floor),
        steep_filters=sum(row.slope > 0.01 for row in floor),
        steep=sum(slope > 0.01 for slope in steep),
        number=len(steep),
        verdict=verdict(found),
        table=markdown(found),
    )


PAGE = """# Control with learned models

The claim (Kayalibay, Mirchev and van der Smagt 2021): a model that is learned with a filter is a worse model, and a
controller that is planned in it is worse, than one learned with a smoother. In linear-quadratic-Gaussian control all of
it can be computed.

Command: `{command}`. {machine}.

- **Data.** {sets} data sets a setting, {trajectories} trajectories of {steps} steps each (50 in "50 trajectories"),
  random standard Normal actions. Data set n has the seed {seed} + n. The four models of a data set see the same
  trajectories.
- **Models.** x' = A x + B u + w, y = C x + v with two states (one in "scalar" and "too small a state"). All of A, B, C
  and the scales are learned, the scale of v from {floor} up; the true one is 0.3, or 0.5 in "scalar".
- **Learning.** The ELBO of linear-Gaussian guides of lookahead 0 (filter), 1, 3 and infinity (smoother), at the best
  guide of its kind for the data, in closed form: where SVI with such a guide ends, without its noise. BFGS, at most
  {bfgs} steps. The smoother's model is learned first, and the others start from it: each ends at a higher bound of its
  own than the smoother's model has. They need not end at the highest: after the last step {steep} of {number} models,
  of filters {steep_filters} of {filters}, had a slope above 0.01 nats.
- **Control.** The stationary Kalman filter and Riccati gain of the learned model, run on the true system. The cost is
  {output:g} y^2 + {action:g} u^2, its long-run mean by a Lyapunov equation. Regret is relative to the least cost that
  any controller has. Unstable loops have infinite regret; none is left out of a median.

## What holds

A model is called worse or better than the smoother's where an exact sign test over data sets says so at 5%.

{verdict}

{at_floor} of {filters} models of filters end at the least scale of v. Their bound rises as the model takes the noise of
the outputs for movement: then an observation says where the state is, and the future tells no more. The least scale was
not varied, so that how large a filter's regret is holds for this one.

![Regret against lookahead](control.png)

{table}

*Infinite data*: the same with exact moments of the data. *Model's loss*: KL(true model || learned model), nats a
trajectory. *Gap*: conditioning gap of the guide, nats a trajectory, under its own model and under the true one. Medians
over data sets; the interval of the regret is of order statistics and holds the median with at least 95% (a bootstrap's
of 20 values covers about 91%).
"""
