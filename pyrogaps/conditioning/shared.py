r"""The shared posterior: one q for all completions of what is shown, refined per datapoint without any network.

$$q^*_C = \arg\max_{q \in Q} \mathbb E_{p(\bar C | C)} [\mathcal L[q](C, \bar C)], \quad
  q_C(z) \propto \exp \mathbb E_{p(\bar C | C)} [\log p(z | C, \bar C)] \text{ where } Q \text{ holds it}$$

Bayer et al., "Mind the Gap when Conditioning Amortised Inference in Sequential Latent-Variable Models" (ICLR 2021,
arXiv:2101.07046).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.bounds import chunk_log_weights
from pyrogaps.capture import BoundDensity, GradientEvaluator
from pyrogaps.conditioning.completions import Completions, completed
from pyrogaps.conditioning.conditions import Shown
from pyrogaps.conditioning.errors import FitError, completions_error, mean_of_halves, mean_over_completions
from pyrogaps.conditioning.latents import LatentsGiven
from pyrogaps.conditioning.partial import partially_observed
from pyrogaps.conditioning.settings import Conditioning
from pyrogaps.density import JointDensity
from pyrogaps.density.draws import BlockedGuide, Posterior
from pyrogaps.evidence import AIS
from pyrogaps.log_weights import Estimate, mean_estimate
from pyrogaps.problem import Problem
from pyrogaps.refine import Refiner
from pyrogaps.refine.families import Start
from pyrogaps.refine.local import Refinable
from pyrogaps.refine.optimise import Progress
from pyrogaps.refine.own import moments
from pyrogaps.run import Run
from pyrogaps.streams import Chunk, Stream, particle_blocks


class OnCompletions:
    """Evaluates the mean of log p(x_nk, z) over completions k instead of log p(x_n, z); see `refine.Evaluator`.

    At every step each particle is scored with one completion; the steps cycle through all of them.
    """

    def __init__(self, evaluator: GradientEvaluator, completions: Completions, which: Tensor) -> None:
        self.evaluator, self.completions, self.which = evaluator, completions, which

    @property
    def joint(self) -> JointDensity:
        return self.evaluator.joint

    def bind(self, indices: Tensor, num_particles: int) -> "MeanOverCompletions":
        return MeanOverCompletions(self, self.evaluator.bind(indices, num_particles, whole=True), num_particles)


class MeanOverCompletions:
    """An unbiased estimate of the mean over completions at every step."""

    def __init__(self, of: OnCompletions, density: BoundDensity, num_particles: int) -> None:
        self.of, self.density, self.num_particles = of, density, num_particles

    def at_step(self, step: int) -> BoundDensity:
        which = self.of.which
        turn = (step * self.num_particles + torch.arange(self.num_particles)) % len(which)
        return self.density.on(self.of.completions.rows(which[turn]))


@dataclass(frozen=True)
class SharedBlock:
    """The shared posteriors of a block, one for each half of the completions, and their ELBOs.

    `elbo` is L[q_C](x) of the datapoints themselves, the mean of the halves; its error includes that of the
    completions and of the draws. `on_completions` is the mean ELBO of each half on the other's completions,
    `overfitting` how much higher the ELBO of a half is on its own completions. Shapes `(B,)`, nats.
    """

    elbo: Estimate
    on_completions: Estimate
    overfitting: Tensor
    converged: Tensor
    completions: Completions
    halves: list[Refinable]
    progress: list[Progress]


@dataclass(frozen=True)
class Sharing:
    """Fits the shared posterior of a block.

    Attributes:
        problem: model, guide and data.
        refiner: fits the guide's own family.
        latents: draws given what is shown.
        settings: number of completions and tolerance.
        num_particles: draws for each ELBO.
        run: source of all random streams.
    """

    problem: Problem
    refiner: Refiner
    latents: LatentsGiven
    settings: Conditioning
    num_particles: int
    run: Run

    def fit(self, block: Chunk) -> SharedBlock:
        """Draw completions, refine and evaluate; double the completions while the halves overfit."""
        number = self.settings.num_completions
        while True:
            run = self.run.derived("completions", number)
            shared = self._evaluate(block, self._draw(block, number, run), run)
            overfits = float(shared.overfitting.mean()) > self.settings.tolerance
            if not overfits or 2 * number > self.settings.max_completions:
                return shared
            number *= 2

    def _draw(self, block: Chunk, number: int, run: Run) -> Completions:
        start = Start(*moments(self.problem.guide_density(), block, run), fitted=False)
        z, ess = self.latents.draw(block, start, number, run)
        args = completed(self.problem.joint, self.latents.partial, block, z, run.stream("complete"))
        return Completions(args, z, ess)

    def _evaluate(self, block: Chunk, completions: Completions, run: Run) -> SharedBlock:
        names, evaluator = ("first half", "second half"), self.problem.evaluator
        both = dict(zip(names, torch.arange(len(completions)).chunk(2), strict=True))
        halves, progress, at_data, errors = [], [], [], []
        for name, which in both.items():
            guide, half_progress = self.refiner(
                OnCompletions(evaluator, completions, which), block, run, f"shared {name}"
            )
            weights = chunk_log_weights(evaluator, guide, block, self.num_particles, run.stream(name))
            halves.append(guide)
            progress.append(half_progress)
            at_data.append(mean_estimate(weights))
            errors.append(completions_error(evaluator, guide, completions, which, block, run.stream(f"error, {name}")))

        # Both guides use the same noise on a half, which reduces the error of their difference.
        def elbo_on(guide: Refinable, name: str) -> Estimate:
            on, stream = OnCompletions(evaluator, completions, both[name]), run.stream(f"completions, {name}")
            weights = _on_completions(on, guide, block, self.num_particles, stream)
            return mean_over_completions(weights, len(on.which))

        nothing = [FitError(*[torch.zeros_like(error.bias)] * 2) for error in errors]
        (own_1, other_1), (other_2, own_2) = [[elbo_on(guide, name) for guide in halves] for name in names]
        return SharedBlock(
            mean_of_halves(at_data[0], at_data[1], errors, completions.ess, len(completions)),
            mean_of_halves(other_1, other_2, nothing, completions.ess, len(completions)),
            (own_1.value - other_1.value + own_2.value - other_2.value) / 2,
            progress[0].converged & progress[1].converged,
            completions,
            halves,
            progress,
        )


def sharing_of(
    problem: Problem,
    conditions: Shown,
    evidence: AIS,
    refiner: Refiner,
    settings: Conditioning,
    num_particles: int,
    run: Run,
) -> Sharing:
    """The `Sharing` that fits the guide's own family under `conditions`."""
    partial = partially_observed(problem.joint, conditions)
    latents = LatentsGiven(partial, evidence, refiner.settings, problem.mode)
    return Sharing(problem, refiner, latents, settings, num_particles, run)


def _on_completions(
    on: OnCompletions, posterior: Posterior, block: Chunk, num_particles: int, stream: Stream
) -> Tensor:
    """log p(x_nk, z) - log q(z) `(S, B)`, each draw of z with one completion, cycling through all."""
    guide, parts, first_completion = BlockedGuide(posterior, block), [], 0
    with torch.no_grad():
        for first, size in enumerate(particle_blocks(num_particles)):
            z, log_q = guide.sample(size, stream, first)
            turn = (first_completion + torch.arange(size)) % len(on.which)
            bound = on.evaluator.bind(block.indices, size, whole=True)
            (log_joint,) = bound.on(on.completions.rows(on.which[turn])).values(z)
            parts.append(log_joint.double() - log_q.double())
            first_completion += size
    return torch.cat(parts)
