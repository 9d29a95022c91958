"""`Ladder`: log p(x) where every datapoint gets the estimator and the number of draws that it needs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pyrogaps.density.draws import Posterior
from pyrogaps.errors import InputError
from pyrogaps.evidence.ais import AIS
from pyrogaps.evidence.climb import climb
from pyrogaps.evidence.ladder_check import LadderCheck, check_ladder
from pyrogaps.evidence.ladder_estimate import METHODS, LadderEstimate, by_number
from pyrogaps.evidence.ladder_settings import LadderSettings
from pyrogaps.evidence.plan import GUIDE
from pyrogaps.evidence.protocol import Columns, Evidence, Measured, Measurement, joined, settings_of
from pyrogaps.problem import Problem
from pyrogaps.refine import Refiner
from pyrogaps.run import Run
from pyrogaps.settings import checked
from pyrogaps.streams import Chunk

# The AIS whose reverse is the upper bound has 50 temperatures for a tolerance of 0.1, and more for less.
REVERSE_TEMPERATURES, REVERSE_TOLERANCE = 50, 0.1
# The share of the datapoints that may miss the tolerance without a caution: their errors are uncertain themselves.
MAX_SHARE_ABOVE = 0.2


@checked("evidence")
@dataclass(frozen=True)
class Ladder(LadderSettings, Evidence):
    r"""log p(x) by a ladder of estimators, each datapoint as far up as it needs.

    The rungs: importance sampling from the refined guide; from a Gaussian with the curvature of log p(x, z) there;
    AIS from that Gaussian over few temperatures; over more. A datapoint leaves the ladder at the first rung whose pilot
    can be trusted, and takes as many fresh draws there as bring its standard error to the tolerance. The pilot's draws
    are not used in the estimate, so that the estimate does not depend on what they decided (Stein, 1945,
    doi:10.1214/aoms/1177731088, of two-stage samples).

    Args:
        tolerance: the standard error of log p(x) to reach for every datapoint, nats.
        max_evaluations: evaluations of log p(x, z), or of its gradient, that a datapoint may cost on average over a
            block of 64. Where they do not suffice, all datapoints of the block are measured to a wider tolerance.
        num_pilot_draws: of each importance sampling pilot.
        max_khat: importance sampling is trusted up to this Pareto k-hat of its pilot, which is known to about 0.1.
            Below a third, weights have a third moment, on which the interval of their mean rests.
        min_ess: the effective share of its draws from which on importance sampling is trusted.
        temperatures: of the AIS pilots, increasing; the run that counts has four times as many.
        num_leapfrog: steps of each transition.
        max_log_variance: an AIS rung is left for a longer one where the variance of its pilot's log-weights is above.
        max_curvature_dim: latent dimension above which no curvature is measured (it takes 2 dim gradients).
        widen: factor on the scales of the Gaussian.
        target_acceptance: what the pilots aim at.
        num_simulated: datapoints drawn from the model, on which the ladder is checked: as long as log p(x) is there
            below an upper bound by more than the tolerance, its lowest rung is taken away. 0 checks nothing.

    Raises `InputError` for a setting out of range.
    """

    @property
    def needs_refined(self) -> bool:
        return True

    @property
    def reverse(self) -> AIS:
        longer = max(1, math.ceil(REVERSE_TOLERANCE / self.tolerance))
        return AIS(num_temperatures=REVERSE_TEMPERATURES * longer)

    def prepare(self, problem: Problem, run: Run, refine: Refiner | None = None) -> "LadderMeasurement":
        """Check the ladder on simulated data, where it is asked for and there is a family to refine there."""
        check: LadderCheck | str | None = None
        if refine is not None and self.num_simulated:
            own = run.derived("ladder")
            try:
                simulated, refiner = refine.simulated(problem, self.num_simulated, own)
                check = check_ladder(simulated, refiner, self, self.reverse, own)
            except InputError as error:
                check = str(error)
        return LadderMeasurement(self, problem, run, check)


@dataclass(frozen=True)
class LadderMeasurement(Measurement):
    """log p(x_n) by what each datapoint needs. `check` is the ladder on simulated data, or why there is no check."""

    evidence: Ladder
    check: LadderCheck | str | None

    @property
    def estimator(self) -> str:
        return "importance sampling or AIS from the refined guide"

    @property
    def lowest(self) -> int:
        """The lowest rung that is trusted."""
        return self.check.lowest if isinstance(self.check, LadderCheck) else GUIDE

    def measure(self, chunk: Chunk, refined: Posterior | None = None) -> Measured:
        if refined is None:
            raise InputError(
                "evidence: a Ladder starts from a refined guide. Pass a guide, or use evidence=AIS(initial='prior')"
            )
        blocks = climb(self.problem.evaluator, refined, chunk, self.evidence, self.run, self.lowest)
        draws = [column for block in blocks for column in block.log_weights]
        value, mcse, ess = torch.empty(3, len(draws), dtype=torch.float64)
        for positions, estimate in by_number(draws):
            assert estimate.ess is not None
            value[positions], mcse[positions] = estimate.value.cpu(), estimate.mcse.cpu()
            ess[positions] = estimate.ess.cpu()
        columns = {
            "log_evidence": value,
            "log_evidence_mcse": mcse,
            "log_evidence_ess": ess,
            "log_evidence_draws": torch.tensor([len(column) for column in draws]),
            "log_evidence_method": torch.cat([block.method for block in blocks]),
            "log_evidence_temperatures": torch.cat([block.num_temperatures for block in blocks]),
            "log_evidence_evaluations": torch.cat([block.evaluations for block in blocks]),
            "acceptance": torch.cat([block.acceptance for block in blocks]),
        }
        return Measured(columns, draws)

    def describe(self) -> dict[str, Any]:
        return {**settings_of(self.evidence), "check": self._described_check()}

    def _described_check(self) -> dict[str, Any] | str | None:
        check = self.check
        if not isinstance(check, LadderCheck):
            return check
        number = len(check.upper)
        return {"lowest": check.lowest, "width": check.width, "width_mcse": check.width_mcse, "num_simulated": number}

    def notes(self, columns: Columns) -> list[str]:
        method = columns["log_evidence_method"]
        shares = [(name, float((method == place).mean())) for place, name in enumerate(METHODS)]
        ways = ", ".join(f"{name} {share:.0%}" for name, share in shares if share)
        errors, costs = columns["log_evidence_mcse"], columns["log_evidence_evaluations"]
        lines = [
            f"log p(x) by {ways}; {costs.mean():,.0f} evaluations per datapoint on average, {costs.max():,.0f} at most",
            f"standard error of log p(x): median {np.median(errors):.3f}, 90th percentile "
            f"{np.quantile(errors, 0.9):.3f}, tolerance {self.evidence.tolerance:g}",
        ]
        check = self.check
        if isinstance(check, str):
            lines.append(f"no check on simulated data ({check})")
        elif check is not None:
            kept = "All rungs are kept" if check.lowest == GUIDE else f"The lowest {check.lowest} rungs are left out"
            lines.append(
                f"checked on {len(check.upper)} datapoints simulated from the model: log p(x) is at most "
                f"{check.width:.3f} ± {check.width_mcse:.3f} nats above its lower bound. {kept}"
            )
        return lines

    def cautions(self, columns: Columns) -> list[str]:
        tolerance, check, cautions = self.evidence.tolerance, self.check, []
        # Twice, because the error of few draws is itself uncertain.
        above = float((columns["log_evidence_mcse"] > 2 * tolerance).mean())
        if above > MAX_SHARE_ABOVE:
            cautions.append(
                f"the standard error of log p(x) exceeds twice the tolerance for {above:.0%} of the datapoints. Raise "
                "max_evaluations of Ladder"
            )
        if isinstance(check, LadderCheck) and check.width > tolerance:
            cautions.append(
                f"log p(x) of simulated data may be {check.width:.3f} nats higher than measured, even with only the "
                "last rung of the Ladder. The refined guide may miss parts of the posterior; try a richer family or "
                "AIS(initial='prior')"
            )
        return cautions

    def estimate(self, parts: Sequence[Measured]) -> LadderEstimate:
        draws = tuple(column for part in parts for column in part.log_weights or ())
        columns, khat = joined(parts), torch.empty(len(draws), dtype=torch.float64)
        for positions, estimate in by_number(draws):
            assert estimate.khat is not None
            khat[positions] = estimate.khat.cpu()
        return LadderEstimate(
            columns["log_evidence"],
            columns["log_evidence_mcse"],
            "lower bound",
            ess=columns["log_evidence_ess"],
            khat=khat,
            acceptance=columns["acceptance"],
            draws=draws,
            method=columns["log_evidence_method"],
            num_draws=columns["log_evidence_draws"],
            num_temperatures=columns["log_evidence_temperatures"],
            num_evaluations=columns["log_evidence_evaluations"],
            check=self.check if isinstance(self.check, LadderCheck) else None,
        )
