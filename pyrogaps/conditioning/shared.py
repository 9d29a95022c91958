r"""The shared posterior: one q for all completions of what is shown, refined per datapoint without any network.

$$q^*_C = \arg\max_{q \in Q} \mathbb E_{p(\bar C | C)} [\mathcal L[q](C, \bar C)], \quad
  q_C(z) \propto \exp \mathbb E_{p(\bar C | C)} [\log p(z | C, \bar C)] \text{ where } Q \text{ holds it}$$

Bayer et al., "Mind the Gap when Conditioning Amortised Inference in Sequential Latent-Variable Models" (ICLR 2021,
arXiv:2101.07046).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyrogaps.ais import AIS
from pyrogaps.bounds import chunk_log_weights
from pyrogaps.capture import BoundDensity, GradientEvaluator
from pyrogaps.conditioning.completions import Completions, completed
from pyrogaps.conditioning.conditions import Shown
from pyrogaps.conditioning.latents import LatentsGiven
from pyrogaps.conditioning.partial import partially_observed
from pyrogaps.conditioning.settings import Conditioning
from pyrogaps.density import GuideDensity, JointDensity
from pyrogaps.density.draws import BlockedGuide, Posterior
from pyrogaps.log_weights import Estimate, mean_estimate
from pyrogaps.refine import OwnFamily, Refinement, own_family, refine_chunk
from pyrogaps.refine.families import Family, Start
from pyrogaps.refine.local import Refinable
from pyrogaps.refine.optimise import Progress
from pyrogaps.refine.own import moments
from pyrogaps.streams import Chunk, derive_seed, particle_blocks


class OnCompletions:
    """Binds the mean of log p(x_nk, z) over completions k in the place of log p(x_n, z); see `refine.Evaluator`.

    At every step each particle meets one completion; steps go through all of them in turn.
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
    """The shared posterior of the datapoints of a block, in two halves, and what it is worth.

    `elbo` is L[q_C](x) of the datapoints themselves, the mean of the halves, its error that of the completions and of
    the draws; `on_completions` the mean ELBO on completions of the half that was not fitted to them; `overfitting` by
    how much the halves are better on their own. Shapes `(B,)`, nats.
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
    """How the shared posterior of a block is found: densities, family and settings.

    `evaluator` is of the model's density; `latents` are drawn given what is shown.
    """

    density: GuideDensity
    family: OwnFamily | Family
    evaluator: GradientEvaluator
    latents: LatentsGiven
    settings: Conditioning
    refinement: Refinement
    num_particles: int
    seed: int

    def fit(self, block: Chunk) -> SharedBlock:
        """Draw completions, refine, judge; with twice as many completions while the halves overfit them."""
        number = self.settings.num_completions
        while True:
            seed = derive_seed(self.seed, "completions", number)
            shared = self._judge(block, self._draw(block, number, seed), seed)
            overfits = float(shared.overfitting.mean()) > self.settings.tolerance
            if not overfits or 2 * number > self.settings.max_completions:
                return shared
            number *= 2

    def _draw(self, block: Chunk, number: int, seed: int) -> Completions:
        start = Start(*moments(self.density, block, seed), fitted=False)
        z, ess = self.latents.draw(block, start, number, seed)
        return Completions(completed(self.evaluator.joint, self.latents.partial, block, z, seed), z, ess)

    def _judge(self, block: Chunk, completions: Completions, seed: int) -> SharedBlock:
        names, evaluator = ("first half", "second half"), self.evaluator
        both = dict(zip(names, torch.arange(len(completions)).chunk(2), strict=True))
        halves, progress, at_data = [], [], []
        for name, which in both.items():
            on = OnCompletions(evaluator, completions, which)
            guide, how = refine_chunk(self.family, on, block, self.refinement, seed, f"shared {name}")
            weights = chunk_log_weights(evaluator, guide, block, self.num_particles, seed, name)
            halves.append(guide)
            progress.append(how)
            at_data.append(mean_estimate(weights))

        # The same noise for both guides on a half, so that their difference is known best.
        def judged(guide: Refinable, name: str) -> Estimate:
            stream = f"completions, {name}"
            return mean_estimate(
                _on_completions(evaluator, guide, block, completions, both[name], self.num_particles, seed, stream)
            )

        (own_1, other_1), (other_2, own_2) = [[judged(guide, name) for guide in halves] for name in names]
        return SharedBlock(
            _of_halves(*at_data),
            _of_halves(other_1, other_2),
            (own_1.value - other_1.value + own_2.value - other_2.value) / 2,
            progress[0].converged & progress[1].converged,
            completions,
            halves,
            progress,
        )


def sharing_of(
    density: GuideDensity,
    evaluator: GradientEvaluator,
    conditions: Shown,
    settings: Conditioning,
    evidence: AIS,
    refinement: Refinement,
    num_particles: int,
    seed: int,
) -> Sharing:
    """How shared posteriors of the guide's own family are found under `conditions`."""
    latents = LatentsGiven(partially_observed(evaluator.joint, conditions), evidence, refinement)
    family = own_family(density)
    return Sharing(density, family, evaluator, latents, settings, refinement, num_particles, seed)


def _of_halves(first: Estimate, second: Estimate) -> Estimate:
    """The mean of two independent estimates; what sets them apart is their error, that of the completions too."""
    value = (first.value + second.value) / 2
    mcse = (first.value - second.value).abs() / 2
    # One difference may be small by chance: the error of the draws is known better.
    least = torch.hypot(first.mcse, second.mcse) / 2
    return Estimate(value, torch.maximum(mcse, least), "lower bound")


def _on_completions(
    evaluator: GradientEvaluator,
    posterior: Posterior,
    block: Chunk,
    completions: Completions,
    which: Tensor,
    num_particles: int,
    seed: int,
    stream: str,
) -> Tensor:
    """log p(x_nk, z) - log q(z) `(S, B)`, each draw of z with one completion, all of them in turn."""
    guide, parts, met = BlockedGuide(posterior, block), [], 0
    with torch.no_grad():
        for first, size in enumerate(particle_blocks(num_particles)):
            z, log_q = guide.sample(size, seed, stream, first)
            turn = (met + torch.arange(size)) % len(which)
            (log_joint,) = evaluator.bind(block.indices, size, whole=True).on(completions.rows(which[turn])).values(z)
            parts.append(log_joint.double() - log_q.double())
            met += size
    return torch.cat(parts)
