"""Annealed importance sampling of log p(x) per datapoint, forward and reverse, tuned by a pilot run."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyrogaps.anneal import (
    AnnealResult,
    GaussianStart,
    Schedule,
    Tuning,
    anneal,
    joined,
    moments_start,
    pilot,
    schedule,
    starting_at,
    tune,
)
from pyrogaps.bounds import over_chunks, refuse_nan
from pyrogaps.capture import GradientEvaluator, Mode
from pyrogaps.density import Data, GuideDensity, JointDensity
from pyrogaps.density.draws import BlockedGuide, Posterior
from pyrogaps.density.runs import Program
from pyrogaps.density.simulate import ToData
from pyrogaps.errors import InputError, at_least, between_0_and_1
from pyrogaps.hmc import Evaluate, Evaluation, HMCState
from pyrogaps.log_weights import Estimate, log_mean_exp_estimate
from pyrogaps.problem import Plate, Problem, Simulated, is_posterior
from pyrogaps.refine import OwnFamily, Refinement, is_family, own_family, refine_chunk
from pyrogaps.refine.families import Family
from pyrogaps.streams import BLOCK, Chunk, Noise, reseed

Initial = Literal["refined", "guide", "prior"]
NUM_ANCHOR_DRAWS = 1024
# Chains at a time; many take their turns, so that the memory they need does not grow with their number.
CHAINS = 64


@dataclass(frozen=True)
class AIS:
    """Settings of annealed importance sampling.

    Attributes:
        num_chains: chains per datapoint; the estimate is the log-mean-exp of their weights.
        num_temperatures: T, the steps from b = 0 to b = 1.
        num_leapfrog: leapfrog steps of each transition, one transition per temperature.
        schedule: "linear", "sigmoid", or "thermodynamic" (equal steps of thermodynamic length, set by the pilot).
        initial: where paths start: at the "refined" guide, at the "guide" as it is, or at the "prior".
        widen: factor on the scales of the Gaussian fitted to the guide, at least 1: an anchor narrower than the
            posterior has weights of infinite variance.
        target_acceptance: what the pilot aims at.
        num_pilot_chains, num_pilot_temperatures: the pilot's size; its chains are thrown away, so that the step sizes
            of the run that counts do not depend on it.
        mode: how gradients are evaluated, see `GradientEvaluator`.
    """

    num_chains: int = 16
    num_temperatures: int = 50
    num_leapfrog: int = 3
    schedule: Schedule = "linear"
    initial: Initial = "refined"
    widen: float = 1.2
    target_acceptance: float = 0.9
    num_pilot_chains: int = 4
    num_pilot_temperatures: int = 20
    mode: Mode = "captured"

    def __post_init__(self) -> None:
        positive = ("num_chains", "num_temperatures", "num_leapfrog", "num_pilot_temperatures", "widen")
        at_least("evidence", self, dict.fromkeys(positive, 1) | {"num_pilot_chains": 2})
        between_0_and_1("evidence.target_acceptance", self.target_acceptance)
        _one_of("schedule", self.schedule, ("linear", "sigmoid", "thermodynamic"))
        _one_of("initial", self.initial, ("refined", "guide", "prior"))
        _one_of("mode", self.mode, ("eager", "captured", "compiled"))


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"evidence.{name}: must be one of {', '.join(allowed)}, got '{value}'")


@dataclass(frozen=True)
class Path:
    """A path for the datapoints of a chunk: draws of its start, its evaluation, and the preconditioner of its moves.

    `draw(num_chains, purpose)` gives points `(S, B, dim)` of f_0; `evaluate(num_chains)` a function of such points.
    """

    draw: Callable[[int, str], Tensor]
    evaluate: Callable[[int], Evaluate]
    scale: Tensor


def anchored_path(evaluator: GradientEvaluator, start: GaussianStart, chunk: Chunk, seed: int) -> Path:
    """The path from a Gaussian fitted to a guide."""
    dtype, device, dim = evaluator.joint.dtype, evaluator.joint.device, evaluator.joint.dim

    def draw(num_chains: int, purpose: str) -> Tensor:
        return start.draw(Noise(seed, f"{purpose} start", chunk, dtype=dtype, device=device).normal(num_chains, dim))

    def evaluate(num_chains: int) -> Evaluate:
        bound = evaluator.bind(chunk.indices, num_chains)
        return starting_at(start, bound, bound.gradients)

    return Path(draw, evaluate, start.moves)


def prior_path(evaluator: GradientEvaluator, chunk: Chunk, seed: int) -> Path:
    """The path from the model's own latent distribution; `evaluator` must have been made with `split=True`."""
    joint = evaluator.joint

    def draw(num_chains: int, purpose: str) -> Tensor:
        parts = []
        for block in chunk.blocks():
            reseed(seed, f"{purpose} prior", block.start // BLOCK)
            parts.append(joint.sample_prior(num_chains, block.indices))
        return torch.cat(parts, 1)

    def evaluate(num_chains: int) -> Evaluate:
        bound = evaluator.bind(chunk.indices, num_chains)
        return Evaluation(lambda position: HMCState(position, *bound(position)), bound.gradients)

    spread = draw(256, "scale").std(0)
    scale, active = torch.where(spread > 0, spread, torch.ones_like(spread)), joint.active(chunk.indices)
    return Path(draw, evaluate, scale if active is None else torch.where(active, scale, torch.zeros_like(scale)))


def anchor(joint: JointDensity, posterior: Posterior, chunk: Chunk, widen: float, seed: int) -> GaussianStart:
    """The Gaussian with a guide's moments, widened; they are exact, or of draws that are used for nothing else."""
    guide, active = BlockedGuide(posterior, chunk), joint.active(chunk.indices)
    other = posterior.joint if isinstance(posterior, GuideDensity) and posterior.joint is not joint else None
    if other is None and active is None and (known := guide.exact_moments()) is not None:
        return GaussianStart(known[0], widen * known[1])
    blocks = (z for z, _ in guide.in_blocks(NUM_ANCHOR_DRAWS, seed, "anchor"))
    drawn = blocks if other is None else (other.columns_of(z, joint) for z in blocks)
    # The full covariance takes ten draws to a dimension.
    diagonal = guide.mean_field or 10 * joint.dim > NUM_ANCHOR_DRAWS
    return moments_start(drawn, diagonal=diagonal, widen=widen, active=active)


def run_pilot(path: Path, evaluator: GradientEvaluator, chunk: Chunk, settings: AIS, seed: int) -> Tuning:
    """Adapt the schedule and the step sizes on chains of their own."""
    joint = evaluator.joint
    noise = Noise(seed, "pilot", chunk, dtype=joint.dtype, device=joint.device)
    betas = schedule(settings.schedule, max(settings.num_pilot_temperatures, 2))
    evaluate = path.evaluate(settings.num_pilot_chains)
    state = evaluate(path.draw(settings.num_pilot_chains, "pilot"))
    steps, spreads = pilot(state, evaluate, betas, settings.num_leapfrog, path.scale, noise, settings.target_acceptance)
    return tune(settings.schedule, settings.num_temperatures, betas, steps, spreads)


def run_path(
    path: Path,
    tuning: Tuning,
    evaluator: GradientEvaluator,
    chunk: Chunk,
    settings: AIS,
    seed: int,
    exact: Tensor | None = None,
    *,
    together: bool = False,
) -> AnnealResult:
    """The run that counts: forward, or in reverse from `exact` posterior draws `(B, dim)`, which all chains share.

    Many chains take their turns, unless they are to run `together`, for who needs to know where they end.
    """
    joint, reverse = evaluator.joint, exact is not None
    runs, most = [], settings.num_chains if together else CHAINS
    for group, first in enumerate(range(0, settings.num_chains, most)):
        number = min(most, settings.num_chains - first)
        purpose = ("reverse ais" if reverse else "ais") + (f" {group}" if group else "")
        noise = Noise(seed, purpose, chunk, dtype=joint.dtype, device=joint.device)
        evaluate = path.evaluate(number)
        position = path.draw(number, purpose) if exact is None else exact.expand(number, -1, -1)
        state = evaluate(position.contiguous())
        runs.append(anneal(state, evaluate, tuning, settings.num_leapfrog, path.scale, noise, reverse=reverse))
        refuse_nan(runs[-1].log_weights, chunk.indices)
    return joined(runs)


def ais_chunk(
    path: Path, evaluator: GradientEvaluator, chunk: Chunk, settings: AIS, seed: int, *, together: bool = False
) -> AnnealResult:
    """Pilot, then run."""
    tuning = run_pilot(path, evaluator, chunk, settings, seed)
    return run_path(path, tuning, evaluator, chunk, settings, seed, together=together)


def ais(
    model: Program | Problem,
    guide: Program | Posterior | None = None,
    data: Data | None = None,
    *,
    settings: AIS | None = None,
    initial: Initial | None = None,
    refinement: Refinement | None = None,
    plate: Plate = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Estimate:
    r"""log p(x_n) of every datapoint by annealed importance sampling along

    $$\log f_b(z) = (1 - b) \log f_0(z) + b \log p(x_n, z), \quad 0 = b_0 < \dots < b_T = 1$$

    with one HMC transition per temperature. $\mathbb E[w] = p(x_n)$ exactly, whatever the step sizes and the number of
    temperatures, because they are set by a pilot run; the value, a log-mean-exp, is a lower bound in expectation.

    Args:
        model, guide, data, plate: as for `JointDensity` and `GuideDensity`, or a `Problem` alone; no guide is used with
            `initial="prior"`.
        settings: see `AIS`; `initial` overrides its field of that name.
        refinement: settings of the refinement that "refined" starts need.
        batch_size: datapoints held at once; it does not change the result.
        seed: of all the randomness.

    Returns:
        An `Estimate` in nats with `value`, `mcse`, `ess`, `khat`, `acceptance` `(N,)` and `log_weights` `(S, N)`.

    Source: Neal (2001), arXiv:physics/9803008; Wu et al. (2017), arXiv:1611.04273.
    """
    settings = settings or AIS()
    settings = settings if initial is None else replace(settings, initial=initial)
    from_prior = settings.initial == "prior"
    problem = Problem.of(model, None if from_prior and not isinstance(model, Problem) else guide, data, plate)
    evaluator = GradientEvaluator(problem.joint, settings.mode, split=from_prior)
    path_of = _paths(evaluator, None if from_prior else problem.guided(), settings, refinement or Refinement(), seed)

    def one(chunk: Chunk) -> Weighed:
        return _weighed(ais_chunk(path_of(chunk), evaluator, chunk, settings, seed))

    return _estimate(over_chunks(one, problem.joint, batch_size, seed))


# Log-weights `(S, B)` and acceptance `(B,)`: what of a run goes from process to process.
Weighed = tuple[Tensor, Tensor]


def _weighed(ran: AnnealResult) -> Weighed:
    return ran.log_weights.cpu(), ran.acceptance.cpu()


def _estimate(weighed: list[Weighed], sign: int = 1) -> Estimate:
    log_weights, acceptance = (torch.cat(parts, -1) for parts in zip(*weighed, strict=True))
    return log_mean_exp_estimate(sign * log_weights, acceptance=acceptance)


def _paths(
    evaluator: GradientEvaluator,
    anchored_at: Posterior | OwnFamily | Family | None,
    settings: AIS,
    refinement: Refinement,
    seed: int,
) -> Callable[[Chunk], Path]:
    """Paths from the prior (None), from a guide or its own family refined, or from a family refined."""
    if isinstance(anchored_at, GuideDensity) and settings.initial == "refined":
        anchored_at = own_family(anchored_at)

    def path(chunk: Chunk) -> Path:
        if anchored_at is None:
            return prior_path(evaluator, chunk, seed)
        if is_posterior(anchored_at):
            start = anchor(evaluator.joint, cast(Posterior, anchored_at), chunk, settings.widen, seed)
        else:
            refined, _ = refine_chunk(cast(OwnFamily | Family, anchored_at), evaluator, chunk, refinement, seed)
            start = anchor(evaluator.joint, refined, chunk, settings.widen, seed)
        return anchored_path(evaluator, start, chunk, seed)

    return path


@dataclass(frozen=True)
class SimulatedBounds:
    """Stochastic lower and upper bounds of log p(x) on data simulated from the model, nats, `(N,)` each.

    `width` is the mean of `upper - lower` over datapoints and `width_mcse` its standard error across them.
    """

    lower: Tensor
    upper: Tensor

    @property
    def width(self) -> float:
        return float((self.upper - self.lower).mean())

    @property
    def width_mcse(self) -> float:
        gaps = self.upper - self.lower
        return float(gaps.std() / len(gaps) ** 0.5) if len(gaps) > 1 else float("nan")

    def interval(self, probability: float = 0.95) -> tuple[Tensor, Tensor]:
        r"""Ends `(N,)` between which log p(x_n) lies with at least this probability, whatever the settings of AIS.

        $\mathbb E[e^{\text{lower} - \log p(x)}] = \mathbb E[e^{\log p(x) - \text{upper}}] = 1$, so by Markov's
        inequality either side is beyond the truth by $\log \frac{2}{1 - P}$ with probability at most $(1 - P) / 2$.
        """
        slack = _slack(probability)
        return self.lower - slack, self.upper + slack

    def mean_interval(self, probability: float = 0.95) -> tuple[float, float]:
        r"""As `interval`, of the mean of log p(x_n) over the N simulated datapoints: their runs are independent, so
        that the product of those ratios has mean 1 too, and the mean needs only $\frac1N \log \frac{2}{1 - P}$.
        """
        slack = _slack(probability) / len(self.lower)
        return float(self.lower.mean()) - slack, float(self.upper.mean()) + slack


def _slack(probability: float) -> float:
    between_0_and_1("probability", probability)
    return math.log(2 / (1 - probability))


@dataclass(frozen=True)
class Sandwich(SimulatedBounds):
    """What `bdmc` finds: within its `width` the AIS settings are certified.

    `data` are the simulated data, `z` `(N, dim)` their exact posterior draws. `reverse` has no error per datapoint: its
    chains share their start, so the spread among them says too little.
    """

    forward: Estimate
    reverse: Estimate
    data: Any
    z: Tensor


def bdmc(
    model: Program | Problem,
    data: Data | None = None,
    *,
    guide_or_family: Any = AutoNormal,
    settings: AIS | None = None,
    initial: Initial | None = None,
    refinement: Refinement | None = None,
    to_data: ToData | None = None,
    plate: Plate = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Sandwich:
    """Bidirectional Monte Carlo: bound log p(x) from both sides on data simulated from the model.

    The latent behind a simulated datapoint is an exact posterior draw; AIS run in reverse from it gives
    E[1/w] = 1/p(x), so -log-mean-exp(-log w) is an upper bound in expectation. Every reverse chain of a datapoint
    starts at that one draw.

    Args:
        model, plate: as for `JointDensity`; or a `Problem`, whose guide, where it has one, anchors the paths.
        data: what to simulate in the shape of.
        guide_or_family: what anchors the paths, refined on the simulated data; unused from the prior. To certify an
            evidence give the guide that it was measured with: another anchor's width is another's.
        settings, initial, refinement, batch_size, seed: as for `ais`.
        to_data: from drawn values by observed site to the model's arguments, where that is not plain.

    Raises:
        InputError: where the model cannot be simulated (see `JointDensity.simulate`).

    Source: Grosse, Ghahramani and Adams (2015), arXiv:1511.02543.
    """
    settings = settings or AIS()
    settings = settings if initial is None else replace(settings, initial=initial)
    guide = None if settings.initial == "prior" or is_family(guide_or_family) else guide_or_family
    simulated = Problem.of(model, guide, data, plate).simulated(seed, to_data)
    anchored_at = simulated.problem.posterior or guide_or_family
    return sandwich(simulated, anchored_at, settings, refinement or Refinement(), batch_size, seed)


def sandwich(
    simulated: Simulated,
    anchored_at: Posterior | OwnFamily | Family,
    settings: AIS,
    refinement: Refinement,
    batch_size: int,
    seed: int,
) -> Sandwich:
    """AIS forward and in reverse on simulated data, on paths from the prior or from a guide or family."""
    problem, data, z = simulated
    from_prior = settings.initial == "prior"
    evaluator = GradientEvaluator(problem.joint, settings.mode, split=from_prior)
    path_of = _paths(evaluator, None if from_prior else anchored_at, settings, refinement, seed)

    def one(chunk: Chunk) -> tuple[Weighed, Weighed]:
        path = path_of(chunk)
        tuning = run_pilot(path, evaluator, chunk, settings, seed)
        exact = z[chunk.start : chunk.stop]
        forward = run_path(path, tuning, evaluator, chunk, settings, seed)
        back = run_path(path, tuning, evaluator, chunk, settings, seed, exact)
        return _weighed(forward), _weighed(back)

    results = over_chunks(one, problem.joint, batch_size, seed)
    forward, inverse = (_estimate([result[side] for result in results], sign) for side, sign in ((0, 1), (1, -1)))
    unknown = torch.full_like(inverse.mcse, torch.nan)
    reverse = replace(inverse, value=-inverse.value, mcse=unknown, direction="upper bound", log_weights=None)
    return Sandwich(forward.value, reverse.value, forward, reverse, data, z)
