"""`Ladder`: log p(x) where every datapoint gets the estimator and the number of draws that it needs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from pyrogaps.capture.slots import Slots
from pyrogaps.density.draws import Posterior
from pyrogaps.errors import counted
from pyrogaps.evidence.ais import AIS
from pyrogaps.evidence.climb import COLUMNS, Climb, Climbed
from pyrogaps.evidence.components import climbed_by_components
from pyrogaps.evidence.ladder_estimate import METHODS, LadderEstimate, ladder_estimate
from pyrogaps.evidence.ladder_settings import LadderSettings
from pyrogaps.evidence.protocol import Columns, Evidence, Measured, Measurement, joined
from pyrogaps.evidence.reliability import enough_trusted, number_unreliable
from pyrogaps.gaussians import anchor_of
from pyrogaps.log_weights import MIN_DRAWS_ALONE
from pyrogaps.problem import Problem
from pyrogaps.refine import Refiner
from pyrogaps.run import Run
from pyrogaps.settings import checked
from pyrogaps.streams import Chunk

# The AIS whose reverse is the upper bound has 50 temperatures for a tolerance of 0.1, and more for less.
REVERSE_TEMPERATURES, REVERSE_TOLERANCE = 50, 0.1
# The share of the datapoints that may miss the tolerance without a caution: their errors are uncertain themselves.
MAX_SHARE_ABOVE = 0.2
# The tolerance with which weights alone are trusted: well below the standard error that this takes.
TOLERANCE_ALONE = 0.015
# The effective sample size below which weights say nothing of the value, not even how wrong it is.
MIN_ESS = 2.0


@checked("evidence")
@dataclass(frozen=True)
class Ladder(LadderSettings, Evidence):
    r"""log p(x) by a ladder of estimators, each datapoint as far up as it needs.

    Every datapoint gets a Gaussian with the curvature of log p(x, z) over the breadth of its posterior, which takes
    6 dim gradients and starts from the guide's output; nothing is refined. Above 256 latents its covariance is of low
    rank plus diagonal and takes 960 gradients; where that is not enough, up to 512 latents, 6 dim more. The rungs:
    importance sampling from that Gaussian; AIS from it, over more and more temperatures. Importance sampling is left
    out where no Gaussian could be fitted. A datapoint leaves the ladder at the first rung whose pilot shows that it
    will do, and takes as many fresh draws, or temperatures, there as bring its standard error to the tolerance. The
    pilot's draws are not used in the estimate, so that the estimate does not depend on what they decided (Stein, 1945,
    doi:10.1214/aoms/1177731088, of two-stage samples).

    Args:
        tolerance: the standard error of log p(x) to reach for every datapoint, nats.
        max_evaluations: evaluations of log p(x, z), or of its gradient, that a datapoint may cost. Where they do not
            suffice, its standard error is larger than the tolerance.
        num_pilot_draws: of the importance sampling pilot.
        max_khat: importance sampling is trusted up to this Pareto k-hat of its pilot, which is known to about 0.1.
            Below a third, weights have a third moment, on which the interval of their mean rests.
        min_ess: the effective share of its draws from which on importance sampling is trusted.
        num_chains: of AIS.
        temperatures: of the AIS pilots, increasing; the run that counts has up to eight times as many.
        num_leapfrog: steps of each transition.
        target_acceptance: what the pilots aim at.

    Raises `InputError` for a setting out of range.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> estimate = pg.log_evidence(model, guide, x, evidence=pg.Ladder(tolerance=0.05))
        >>> bool((estimate.mcse < 0.1).all()), bool(estimate.reliable.all())
        (True, True)
    """

    more: ClassVar[str] = "Lower tolerance of Ladder, or raise its max_evaluations"

    @property
    def num_chains_at_once(self) -> int:
        return self.num_chains

    @property
    def reverse(self) -> AIS:
        longer = max(1, math.ceil(REVERSE_TOLERANCE / self.tolerance))
        return AIS(num_temperatures=REVERSE_TEMPERATURES * longer)

    def prepare(self, problem: Problem, run: Run, refine: Refiner | None = None) -> "LadderMeasurement":
        return LadderMeasurement(self, problem, run)


@dataclass(frozen=True)
class LadderMeasurement(Measurement):
    """log p(x_n) by what each datapoint needs."""

    evidence: Ladder

    @property
    def estimator(self) -> str:
        return "importance sampling or AIS"

    def measure(self, chunk: Chunk, refined: Posterior | None = None) -> Measured:
        blocks = self._climbed(chunk)
        draws = tuple(column for block in blocks for column in block.log_weights)
        columns = {name: torch.cat([block.columns[name] for block in blocks]) for name in COLUMNS}
        estimate = ladder_estimate(draws, columns)
        low, high = estimate.interval()
        assert estimate.ess is not None
        measured = {
            "": estimate.value,
            "mcse": estimate.mcse,
            "ess": estimate.ess,
            "low": low,
            "high": high,
            "reliable": estimate.reliable,
            "draws": estimate.num_draws,
            **{name: column for name, column in columns.items() if name != "acceptance"},
        }
        named = {f"log_evidence_{name}".removesuffix("_"): column for name, column in measured.items()}
        return Measured({**named, "acceptance": columns["acceptance"]}, draws)

    def _climbed(self, chunk: Chunk) -> list[Climbed]:
        problem, evaluator = self.problem, self.problem.evaluator
        if problem.joint.enumerated:
            return [climbed_by_components(problem, chunk, block, self.evidence, self.run) for block in chunk.blocks()]
        anchor = anchor_of(problem, chunk, self.run)
        return [
            Climb(Slots(evaluator, block), anchor.within(chunk, block), self.evidence, self.run).climbed()
            for block in chunk.blocks()
        ]

    def notes(self, columns: Columns) -> list[str]:
        method = columns["log_evidence_method"]
        shares = [(name, float((method == place).mean())) for place, name in enumerate(METHODS)]
        ways = ", ".join(f"{name} {share:.0%}" for name, share in shares if share)
        errors, costs = columns["log_evidence_mcse"], columns["log_evidence_evaluations"]
        return [
            f"log p(x) by {ways}; {costs.mean():,.0f} evaluations per datapoint on average, {costs.max():,.0f} at most",
            f"standard error of log p(x): median {np.median(errors):.3f}, 90th percentile "
            f"{np.quantile(errors, 0.9):.3f}, tolerance {self.evidence.tolerance:g}",
        ]

    def cautions(self, columns: Columns) -> list[str]:
        # Twice, because the error of few draws is itself uncertain.
        cautions, number = [], len(columns["log_evidence"])
        above = float((columns["log_evidence_mcse"] > 2 * self.evidence.tolerance).mean())
        if above > MAX_SHARE_ABOVE:
            cautions.append(
                f"the standard error of log p(x) exceeds twice the tolerance for {above:.0%} of the datapoints. Raise "
                "max_evaluations of Ladder"
            )
        unreliable = number_unreliable(columns)
        if not enough_trusted(number - unreliable, number):
            cautions.append(
                f"log p(x), and the gaps measured from it, cannot be trusted for {unreliable:,} of "
                f"{counted(number, 'datapoint')}: their posteriors are far from Gaussian, or their weights too uneven. "
                f"{self._remedy()}, and compare with a richer guide"
            )
        collapsed = int((columns["log_evidence_ess"] < MIN_ESS).sum())
        if collapsed:
            cautions.append(
                f"log p(x) may be far too low for {collapsed:,} of {counted(number, 'datapoint')}, where fewer than "
                f"{MIN_ESS:g} weights count, and so may its mean. Raise max_evaluations of Ladder or use a better guide"
            )
        unbounded = int(np.isinf(columns["log_evidence_upper"]).sum())
        if unbounded:
            cautions.append(
                f"log p(x) has no upper bound for {unbounded:,} of {counted(number, 'datapoint')}, which the mean of "
                "the upper bounds leaves out. Raise max_evaluations of Ladder"
            )
        return cautions

    def _remedy(self) -> str:
        """Settings with which weights alone are trusted, or, where these are met, more evaluations."""
        tolerance, number = self.evidence.tolerance, self.evidence.num_chains
        if tolerance <= TOLERANCE_ALONE and number >= MIN_DRAWS_ALONE:
            return f"Raise max_evaluations of Ladder, now {self.evidence.max_evaluations:,}"
        tolerance, number = min(tolerance, TOLERANCE_ALONE), max(number, 512)
        return f"Use evidence=Ladder(tolerance={tolerance:g}, num_chains={number})"

    def estimate(self, parts: Sequence[Measured]) -> LadderEstimate:
        columns = {name.removeprefix("log_evidence_"): column for name, column in joined(parts).items()}
        return ladder_estimate(tuple(column for part in parts for column in part.log_weights or ()), columns)
