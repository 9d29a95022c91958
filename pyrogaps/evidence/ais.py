"""Annealed importance sampling of log p(x) per datapoint, forward and reverse, tuned by a pilot run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from pyrogaps.annealing.loop import (
    AdaptedStepSizes,
    Annealed,
    Schedule,
    StepSizes,
    Tuning,
    anneal,
    pilot,
    schedule,
    tune,
)
from pyrogaps.bounds import refuse_nan
from pyrogaps.density.draws import Posterior
from pyrogaps.errors import InputError, counted
from pyrogaps.evidence.paths import Path, anchored_path, prior_path
from pyrogaps.evidence.protocol import MAX_CHAINS, Columns, Evidence, Measured, Measurement, joined
from pyrogaps.evidence.reliability import RELIABLE, enough_trusted, number_unreliable
from pyrogaps.gaussians import Gaussian, anchor_of, gaussian_of
from pyrogaps.hmc import HMCState
from pyrogaps.log_weights import (
    MIN_DRAWS_ALONE,
    Estimate,
    effective_sample_size,
    log_mean_exp,
    log_mean_exp_estimate,
    mcse_of_log_mean_exp,
)
from pyrogaps.problem import Problem
from pyrogaps.refine import Refiner
from pyrogaps.run import Run
from pyrogaps.settings import Count, Probability, checked, within
from pyrogaps.streams import Chunk

Initial = Literal["curvature", "refined", "guide", "prior"]
STARTS = {
    "curvature": "a fitted Gaussian",
    "refined": "the refined guide",
    "guide": "the guide",
    "prior": "the prior distribution",
}
MIN_EFFECTIVE_SHARE = 0.2
# Each has numbers of its own for every datapoint, which no memory limit counts.
Temperatures = Annotated[int, within("of at least 1 and at most 1000000")]


@checked("evidence")
@dataclass(frozen=True)
class AIS(Evidence):
    """Settings of annealed importance sampling.

    Attributes:
        num_chains: chains per datapoint; the estimate is the log-mean-exp of their weights.
        num_temperatures: T, the steps from b = 0 to b = 1.
        num_leapfrog: leapfrog steps of each transition, one transition per temperature.
        schedule: "linear", "sigmoid", or "thermodynamic" (equal steps of thermodynamic length, set by the pilot).
        initial: where paths start: at the Gaussian with the "curvature" of log p(x, z) about the guide, at one with the
            moments of the "refined" guide or of the "guide" as it is, or at the "prior".
        widen: factor on the scales of that Gaussian, at least 1: an anchor narrower than the posterior has weights of
            infinite variance.
        target_acceptance: what the pilot aims at.
        num_pilot_chains, num_pilot_temperatures: the size of the pilot run, which chooses step sizes and schedule. Its
            chains are not used in the estimate, so that the weights of the run that counts are unbiased.

    Raises `InputError` for a setting out of range.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> short = pg.AIS(num_chains=8, num_temperatures=10)
        >>> pg.log_evidence(model, guide, x, evidence=short, referee=False).value.shape
        torch.Size([6])
    """

    num_chains: Count = 16
    num_temperatures: Temperatures = 50
    num_leapfrog: Count = 3
    schedule: Schedule = "linear"
    initial: Initial = "curvature"
    widen: Annotated[float, within("of at least 1")] = 1.2
    target_acceptance: Probability = 0.9
    num_pilot_chains: Annotated[int, within("of at least 2 and at most 10000")] = 4
    num_pilot_temperatures: Temperatures = 20

    more: ClassVar[str] = "Raise num_temperatures of AIS"

    @property
    def num_chains_at_once(self) -> int:
        return min(MAX_CHAINS, self.num_chains)

    @property
    def num_log_weights(self) -> int:
        return self.num_chains

    @property
    def needs_refined(self) -> bool:
        return self.initial == "refined"

    def prepare(self, problem: Problem, run: Run, refine: Refiner | None = None) -> "AISMeasurement":
        return AISMeasurement(self, problem, run)

    @property
    def reverse(self) -> "AIS":
        return self


@dataclass(frozen=True)
class AISMeasurement(Measurement):
    """log p(x_n) by AIS with the same settings for every datapoint."""

    evidence: AIS

    @property
    def estimator(self) -> str:
        return f"AIS from {STARTS[self.evidence.initial]}"

    def measure(self, chunk: Chunk, refined: Posterior | None = None) -> Measured:
        path = self.path(chunk, refined)
        return self._forward(path, run_pilot(path, chunk, self.evidence, self.run), chunk)

    def two_sided(self, chunk: Chunk, refined: Posterior | None, exact: Tensor, above: Any) -> tuple[Measured, Tensor]:
        if above.evidence != self.evidence:
            return super().two_sided(chunk, refined, exact, above)
        path = self.path(chunk, refined)
        tuning = run_pilot(path, chunk, self.evidence, self.run)
        return self._forward(path, tuning, chunk), self._reverse(path, tuning, chunk, exact)

    def negative_log_weights(self, chunk: Chunk, refined: Posterior | None, exact: Tensor) -> Tensor:
        """-log w `(S, B)` of reverse chains from exact posterior draws `(B, dim)`: E[1/w] = 1/p(x)."""
        path = self.path(chunk, refined)
        return self._reverse(path, run_pilot(path, chunk, self.evidence, self.run), chunk, exact)

    def _forward(self, path: Path, tuning: Tuning, chunk: Chunk) -> Measured:
        ran = run_path(path, tuning, chunk, self.evidence, self.run)
        columns = {
            "log_evidence": log_mean_exp(ran.log_weights),
            "log_evidence_mcse": mcse_of_log_mean_exp(ran.log_weights),
            "log_evidence_ess": effective_sample_size(ran.log_weights),
            "log_evidence_draws": torch.full((len(chunk),), self.evidence.num_chains),
            "acceptance": ran.acceptance,
            **self._judged(ran.log_weights),
        }
        traces = {
            "acceptance_by_temperature": ran.acceptance_by_temperature,
            "ess_by_temperature": ran.ess_by_temperature,
            "inverse_temperature": tuning.inverse_temperatures[1:].mean(1),
        }
        return Measured(columns, ran.log_weights, traces)

    def _reverse(self, path: Path, tuning: Tuning, chunk: Chunk, exact: Tensor) -> Tensor:
        return -run_path(path, tuning, chunk, self.evidence, self.run, exact).log_weights

    def path(self, chunk: Chunk, refined: Posterior | None) -> Path:
        """Where the chains of a chunk start, and what they climb."""
        problem, settings, run = self.problem, self.evidence, self.run
        if settings.initial == "prior":
            evaluator = problem.evaluator_of(problem.joint, split=True)
            return prior_path(evaluator, chunk, run.stream("scale prior"))
        if settings.initial == "curvature":
            return self._anchored(anchor_of(problem, chunk, run).gaussian, chunk)
        posterior = refined if settings.initial == "refined" else problem.guided()
        if posterior is None:
            raise InputError(
                "evidence.initial: 'refined' needs a guide or a family to refine. Pass one, or use 'prior'"
            )
        return self._anchored(gaussian_of(problem.joint, posterior, chunk, run.stream("anchor")), chunk)

    def _anchored(self, start: Gaussian, chunk: Chunk) -> Path:
        return anchored_path(self.problem.evaluator, start.widened(self.evidence.widen), chunk)

    def _judged(self, log_weights: Tensor) -> dict[str, Tensor]:
        """Where log p(x) can be trusted, if there are enough chains to judge."""
        if len(log_weights) < MIN_DRAWS_ALONE:
            return {}
        return {RELIABLE: log_mean_exp_estimate(log_weights).reliable}

    def notes(self, columns: Columns) -> list[str]:
        share = columns["log_evidence_ess"].mean() / self.evidence.num_chains
        rate = columns["acceptance"].mean()
        return [f"AIS: mean acceptance rate {rate:.2f}, effective sample size {share:.0%} of the chains"]

    def cautions(self, columns: Columns) -> list[str]:
        share = columns["log_evidence_ess"].mean() / self.evidence.num_chains
        cautions, number = [], len(columns["log_evidence"])
        if share < MIN_EFFECTIVE_SHARE:
            cautions.append(
                f"the effective sample size of AIS is {share:.0%} of its chains, so log p(x) and the gaps measured "
                "from it may be too small. Raise num_temperatures of AIS"
            )
        unreliable = number_unreliable(columns) if self.evidence.num_chains >= MIN_DRAWS_ALONE else 0
        if not enough_trusted(number - unreliable, number):
            cautions.append(
                f"log p(x), and the gaps measured from it, cannot be trusted for {unreliable:,} of "
                f"{counted(number, 'datapoint')}: the weights of the chains are too uneven. Raise num_temperatures of "
                "AIS"
            )
        return cautions

    def estimate(self, parts: Sequence[Measured]) -> Estimate:
        log_weights = torch.cat([torch.as_tensor(part.log_weights).cpu() for part in parts], -1)
        return log_mean_exp_estimate(log_weights, acceptance=joined(parts)["acceptance"])


class AISRun(NamedTuple):
    """A run along a path: log-weights `(S, B)`, mean acceptance `(B,)`, where the chains ended `(S, B, dim)`, and
    traces `(T,)`, means over chains and datapoints.
    """

    log_weights: Tensor
    acceptance: Tensor
    position: Tensor
    acceptance_by_temperature: Tensor
    ess_by_temperature: Tensor


def run_pilot(path: Path, chunk: Chunk, settings: AIS, run: Run) -> Tuning:
    """Adapt the schedule and the step sizes on chains of their own."""
    joint, number = path.joint, settings.num_pilot_chains
    noise = run.stream("pilot").noise(chunk, dtype=joint.dtype, device=joint.device)
    betas = schedule(settings.schedule, max(settings.num_pilot_temperatures, 2))
    move = path.move(number, settings.num_leapfrog)
    state = move.evaluate(path.draw(number, run.stream(f"pilot {path.start}")))
    steps = AdaptedStepSizes(move.adaptation, settings.target_acceptance, state.position)
    sizes, spreads = [], []
    for reached in pilot(move, state, betas, steps, noise):
        sizes.append(steps.current)
        spreads.append(move.difference(reached.state).std(0))
    return tune(settings.schedule, settings.num_temperatures, betas, torch.stack(sizes), torch.stack(spreads))


def run_path(
    path: Path,
    tuning: Tuning,
    chunk: Chunk,
    settings: AIS,
    run: Run,
    exact: Tensor | None = None,
    max_chains: int | None = None,
) -> AISRun:
    """The run that counts: forward, or in reverse from `exact` posterior draws `(B, dim)`, which all chains share.

    No more than `max_chains` chains, by default `MAX_CHAINS`, run at a time. The final positions are known only where
    all run at once.
    """
    joint, reverse, runs, most = path.joint, exact is not None, [], max_chains or MAX_CHAINS
    for group, first in enumerate(range(0, settings.num_chains, most)):
        number = min(most, settings.num_chains - first)
        purpose = ("reverse ais" if reverse else "ais") + (f" {group}" if group else "")
        noise = run.stream(purpose).noise(chunk, dtype=joint.dtype, device=joint.device)
        move = path.move(number, settings.num_leapfrog)
        start = (
            path.draw(number, run.stream(f"{purpose} {path.start}")) if exact is None else exact.expand(number, -1, -1)
        )
        state = move.evaluate(start.contiguous())
        steps = StepSizes(tuning.step_sizes)
        annealing = anneal(move, state, tuning.inverse_temperatures, steps, noise, reverse=reverse)
        runs.append(_summary(annealing, reverse=reverse))
        refuse_nan(runs[-1].log_weights, chunk.indices)
    return _joined(runs)


def _summary(annealing: Iterable[Annealed[HMCState]], *, reverse: bool) -> AISRun:
    acceptance, ess = [], []
    for reached in annealing:
        acceptance.append(reached.acceptance.mean(0))
        ess.append(_relative_ess(-reached.log_weights if reverse else reached.log_weights))
    by_temperature = torch.stack(acceptance)
    return AISRun(
        reached.log_weights,
        by_temperature.mean(0),
        reached.state.position,
        by_temperature.mean(1),
        torch.stack(ess),
    )


def _joined(runs: list[AISRun]) -> AISRun:
    """Runs of the same datapoints by chains of their own, as one; traces are means over runs.

    The final positions are left out: `(S, B, dim)` of all chains may be too much.
    """
    if len(runs) == 1:
        return runs[0]
    shares = torch.tensor([len(run.log_weights) for run in runs], dtype=torch.float64)
    shares = (shares / shares.sum()).to(runs[0].log_weights.device)

    def mean(parts: list[Tensor]) -> Tensor:
        weighted: Tensor = torch.tensordot(shares.to(parts[0].dtype), torch.stack(parts), 1)
        return weighted

    return AISRun(
        torch.cat([run.log_weights for run in runs]),
        mean([run.acceptance for run in runs]),
        runs[0].position[:0],
        mean([run.acceptance_by_temperature for run in runs]),
        mean([run.ess_by_temperature for run in runs]),
    )


def _relative_ess(log_weights: Tensor) -> Tensor:
    weights = torch.softmax(log_weights, 0)
    return (1 / weights.square().sum(0) / len(weights)).mean()
