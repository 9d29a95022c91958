"""Rounds of natural-gradient steps for a block of datapoints."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyrogaps.capture import GradientEvaluator
from pyrogaps.capture.slots import POINTS, Slots
from pyrogaps.gaussians import Curvature, Gaussian
from pyrogaps.refine.gaussian_form import GaussianForm
from pyrogaps.refine.natural import NaturalGradient, fitted_to, rate
from pyrogaps.refine.optimise import MEASURE_EVERY, no_gain
from pyrogaps.refine.settings import Refinement
from pyrogaps.run import Run
from pyrogaps.streams import Chunk, Noise

# A round is checked by a third as many further steps; the next one is twice as long.
NUM_ROUNDS, FURTHER = 3, 3
# The start is moved by so many standard deviations, because mirrored draws never leave a saddle.
NUDGE = 0.1


@dataclass(frozen=True)
class Ends:
    """Where M datapoints ended: Gaussians, their ELBOs on the selection draws `(rounds, M)`, and `converged` `(M,)`."""

    gaussian: Gaussian
    scores: Tensor
    converged: Tensor

    @property
    def elbo(self) -> Tensor:
        """The mean over the selection draws, `(M,)`, in nats."""
        return self.scores.mean(0)

    def improved(self, positions: Tensor, other: "Ends") -> "Ends":
        """With those of `other`, which are of the datapoints at `positions`, where their ELBOs are higher."""
        better = (other.elbo > self.elbo[positions]).cpu()
        places, which = positions[better], better.nonzero()[:, 0]
        loc, scale = self.gaussian.loc.clone(), self.gaussian.scale.clone()
        loc[places], scale[places] = other.gaussian.loc[which], other.gaussian.scale[which]
        scores, converged = self.scores.clone(), self.converged.clone()
        scores[:, places], converged[places] = other.scores[:, which], other.converged[which]
        return Ends(replace(self.gaussian, loc=loc, scale=scale), scores, converged)


class NaturalRounds:
    """Natural-gradient ascent for the datapoints of a block, whose guides are the Gaussians `own`.

    A round takes steps of `POINTS` mirrored draws, see `NaturalGradient`, and compares their end with that of further
    steps at the full rate. A datapoint whose ELBO these do not raise by more than the tolerance has converged, and
    takes no more gradients. The others go on from the better end, for twice as long. Streams are named after `name`.
    """

    def __init__(
        self,
        evaluator: GradientEvaluator,
        form: GaussianForm,
        settings: Refinement,
        run: Run,
        name: str,
        own: Gaussian,
        block: Chunk,
    ) -> None:
        self.form, self.settings, self.run, self.name, self.own, self.block = form, settings, run, name, own, block
        self.slots, self.everyone = Slots(evaluator, block), torch.arange(len(block))
        self.history: list[Tensor] = []

    def ascend(self, curvature: Curvature) -> Ends:
        """The best of the guides themselves and the ends of the ascent. `history` then holds ELBOs along the way.

        It starts at the family's best Gaussians for the curvature. Where that was cut, it starts at the guide as well.
        """
        own = self._scored(self.own, self.everyone)
        self.history.append(own.elbo)
        best = self._rounds(self.everyone, curvature.gaussian, "natural")
        cut = curvature.cut.nonzero()[:, 0].cpu()
        if len(cut):
            best = best.improved(cut, self._rounds(cut, self.own, "natural from guide"))
        # Where the guide itself is better by more than the tolerance, the ascent has failed.
        failed = (own.elbo > best.elbo) & ~no_gain(best.scores, own.scores, self.settings.tolerance)
        converged = best.converged & ~failed
        best = best.improved(self.everyone, replace(own, converged=converged))
        self.history.append(best.elbo)
        return replace(best, converged=converged)

    def _rounds(self, positions: Tensor, curvature: Gaussian, purpose: str) -> Ends:
        """Rounds for the datapoints at `positions`, by Gaussians with the curvature of all datapoints of the block."""
        own, curvature = self.own.at(positions), curvature.at(positions)
        natural = NaturalGradient.about(self.form, own, curvature)
        noises = [self._noise(purpose), self._noise(f"{purpose} further")]
        start = self._nudged(fitted_to(self.form, own, curvature), noises[0], positions)
        num_steps = self.settings.num_natural_steps
        best = self._round(start, natural, positions, noises, num_steps)
        for _ in range(NUM_ROUNDS - 1):
            left = (~best.converged).nonzero()[:, 0].cpu()
            if not len(left):
                break
            num_steps *= 2
            ends = self._round(best.gaussian.at(left), natural.at(left), positions[left], noises, num_steps)
            converged = best.converged.clone()
            converged[left] = ends.converged
            best = replace(best.improved(left, ends), converged=converged)
        return best

    def _round(
        self, start: Gaussian, natural: NaturalGradient, positions: Tensor, noises: list[Noise], num_steps: int
    ) -> Ends:
        end = self._steps(start, natural, positions, noises[0], num_steps)
        further = self._steps(end, natural, positions, noises[1], max(FURTHER, num_steps // FURTHER))
        before, after = (self._scored(gaussian, positions) for gaussian in (end, further))
        converged = no_gain(before.scores, after.scores, self.settings.tolerance)
        return replace(before.improved(torch.arange(len(positions)), after), converged=converged)

    def _steps(
        self, start: Gaussian, natural: NaturalGradient, positions: Tensor, noise: Noise, num_steps: int
    ) -> Gaussian:
        q, watched = start, len(self.history) == 1  # the first steps of all datapoints
        for step in range(num_steps):
            draws = noise.normal(POINTS // 2, self.slots.dim)[:, positions]
            if watched and step % MEASURE_EVERY == 0:
                self.history.append(self._elbo(q, draws, positions).mean(0))
            q = natural.step(q, draws, lambda points: self.slots.gradients(positions, points), rate(step))
        return q

    def _nudged(self, start: Gaussian, noise: Noise, positions: Tensor) -> Gaussian:
        moved = start.draw(NUDGE * noise.normal(1, self.slots.dim)[:, positions])[0]
        return replace(start, loc=torch.where(self.form.free_loc, moved, start.loc))

    def _scored(self, q: Gaussian, positions: Tensor) -> Ends:
        """With ELBOs on the selection draws, the same for all that are compared, -inf where not finite."""
        rounds = max(2, self.settings.num_selection // POINTS)
        draws = self._noise("select").normal(rounds * POINTS, self.slots.dim)[:, positions]
        scores = self._elbo(q, draws, positions).unflatten(0, (rounds, POINTS)).mean(1)
        scores = torch.where(torch.isfinite(scores), scores, torch.full_like(scores, -math.inf))
        return Ends(q, scores, torch.zeros(len(positions), dtype=torch.bool, device=scores.device))

    def _elbo(self, q: Gaussian, noise: Tensor, positions: Tensor) -> Tensor:
        """log p(x, z) - log q(z) at the points of `noise` `(S, M, dim)`, `(S, M)`."""
        log_q = q.peak - 0.5 * q.kept(noise).square().sum(-1)
        return (self.slots.values(positions, q.draw(noise)) - log_q).double()

    def _noise(self, purpose: str) -> Noise:
        return self.slots.noise(self.run.stream(f"{purpose} {self.name}"), len(self.block), self.own.loc.dtype)
