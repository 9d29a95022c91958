"""The refinement of Gaussian guides: natural gradients in rounds, and Adam where these do not converge."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyrogaps.capture import GradientEvaluator
from pyrogaps.capture.slots import POINTS, Slots
from pyrogaps.gaussians import Curvature, Gaussian
from pyrogaps.refine.gaussian_form import GaussianForm
from pyrogaps.refine.gaussian_guides import GaussianGuides, Subset
from pyrogaps.refine.natural import NaturalGradient, fitted_to, rate
from pyrogaps.refine.optimise import NUM_TRACE, Optimisation, Progress, no_gain
from pyrogaps.refine.settings import Refinement
from pyrogaps.run import Run
from pyrogaps.streams import Chunk, Noise

# A round is followed by a third as many steps at the full rate again; each further round is twice as long.
NUM_ROUNDS, FURTHER = 3, 3
# The first round starts this far from the fit, in standard deviations: mirrored draws never leave a saddle.
NUDGE = 0.5
MEASURE_EVERY = 5


@dataclass(frozen=True)
class NaturalRefinement:
    r"""Maximise the ELBO over the Gaussians of a family, for every datapoint of a chunk.

    It starts at the family's best Gaussian for the anchor; where the anchor was cut, at the guide itself if its ELBO is
    higher. A round takes natural-gradient steps of `POINTS` mirrored draws, see `NaturalGradient`, and compares its end
    with that of further steps at the full rate: a datapoint whose ELBO these do not raise by more than the tolerance
    has converged, and takes no more gradients. The others go on from the better end. Those that have not converged
    after the last round, or are below the guide itself, are refined by Adam from the best that was found.

    All comparisons are on the same selection draws, and no bound that is reported uses these.

    Attributes:
        form: the guides, and what their family frees.
        anchor: the Gaussians with the curvature of log p(x, z), whose gradients were evaluated by `evaluator`.
        evaluator, settings, run: as for `Refiner`.
        name: of the refinement, after which streams are named.
    """

    form: GaussianForm
    anchor: Curvature
    evaluator: GradientEvaluator
    settings: Refinement
    run: Run
    name: str

    def maximise(self) -> Progress:
        """Refine the guides, where that raises their ELBO."""
        with torch.no_grad():
            chunk, own = self.form.chunk, self.form.read()
            parts = []
            for block in chunk.blocks():
                positions = torch.arange(block.start - chunk.start, block.stop - chunk.start)
                parts.append(_Block(self, own.at(positions), self.anchor.within(chunk, block), block).ascend())
                self.run.bar.advance(len(block) / len(chunk), parts[-1].history[-1])
        end, kept, converged = (torch.cat([getattr(part, name) for part in parts]) for name in ("loc", "kept", "converged"))
        best = replace(own, loc=end, scale=torch.cat([part.scale for part in parts]))
        history = torch.cat([part.history for part in parts], 1)
        doubtful = (~converged | kept).nonzero()[:, 0]
        if len(doubtful):
            best, progress = self._by_adam(best, doubtful)
            converged[doubtful] = progress.converged
            kept[doubtful] &= progress.kept_start
        self.form.write(best, ~kept)
        return Progress(converged, kept, _stretched(history))

    def _by_adam(self, start: Gaussian, positions: Tensor) -> tuple[Gaussian, Progress]:
        chunk = self.form.chunk
        subset = Subset(chunk.start, chunk.stop, chunk.indices[positions.cpu()])
        guides = GaussianGuides(self.form, start.at(positions), subset)
        density = self.evaluator.bind(subset.indices, self.settings.num_particles)
        progress = Optimisation(guides, density, subset, self.settings, self.run.quiet(), self.name).maximise()
        found, loc, scale = guides.gaussian(), start.loc.clone(), start.scale.clone()
        loc[positions], scale[positions] = found.loc, found.scale
        return replace(start, loc=loc, scale=scale), progress


@dataclass(frozen=True)
class _Ascended:
    """Where the B datapoints of a block ended: Gaussians, `kept`, `converged` `(B,)`, and ELBOs `(some, B)`."""

    loc: Tensor
    scale: Tensor
    kept: Tensor
    converged: Tensor
    history: Tensor


class _Block:
    """The natural-gradient rounds of a block of datapoints, which start at the guide's own Gaussians `own`."""

    def __init__(self, refinement: NaturalRefinement, own: Gaussian, anchor: Curvature, block: Chunk) -> None:
        self.settings, self.run, self.name = refinement.settings, refinement.run, refinement.name
        self.form, self.own, self.anchor, self.block = refinement.form, own, anchor, block
        self.slots = Slots(refinement.evaluator, block)
        self.everyone = torch.arange(len(block))
        self.history: list[Tensor] = []

    def ascend(self) -> _Ascended:
        own_scores = self._scores(self.own, self.everyone)
        best, natural = self._start(own_scores)
        best_scores = torch.full_like(own_scores, -math.inf)
        converged = torch.zeros(len(self.block), dtype=torch.bool, device=best.loc.device)
        num_steps, positions = self.settings.num_natural_steps, self.everyone
        self.history.append(own_scores.mean(0))
        noise, further_noise = self._noise("natural"), self._noise("natural further")
        best = self._nudged(best, noise)
        for _ in range(NUM_ROUNDS):
            at = natural.at(positions)
            end = self._steps(at, best.at(positions), positions, num_steps, noise)
            further = self._steps(at, end, positions, max(FURTHER + 1, num_steps // FURTHER), further_noise)
            ends = [self._scores(gaussian, positions) for gaussian in (end, further)]
            converged[positions] = no_gain(*ends, self.settings.tolerance)
            for gaussian, scores in zip((end, further), ends, strict=True):
                better = scores.mean(0) > best_scores[:, positions].mean(0)
                chosen = positions[better.cpu()]
                best = _with(best, chosen, gaussian, better)
                best_scores[:, chosen] = scores[:, better]
            positions = (~converged).nonzero()[:, 0].cpu()
            if not len(positions):
                break
            num_steps *= 2
        kept = own_scores.mean(0) > best_scores.mean(0)
        best = _with(best, kept.nonzero()[:, 0], self.own.at(kept.nonzero()[:, 0]), slice(None))
        self.history.append(torch.maximum(own_scores.mean(0), best_scores.mean(0)))
        return _Ascended(best.loc, best.scale, kept, converged, torch.stack(self.history))

    def _start(self, own_scores: Tensor) -> tuple[Gaussian, NaturalGradient]:
        """The first Gaussians, and the natural gradient by the curvature that they rest on."""
        anchor = self.anchor.gaussian
        start = fitted_to(self.form, self.own, anchor)
        cut = self.anchor.cut.nonzero()[:, 0].cpu()
        if len(cut):
            worse = cut[(self._scores(start.at(cut), cut).mean(0) < own_scores[:, cut].mean(0)).cpu()]
            anchor = anchor.with_replaced(worse, replace(self.own.at(worse), scale=self.own.at(worse).factor()))
            start = _with(start, worse, self.own.at(worse), slice(None))
        return start, NaturalGradient.about(self.form, self.own, anchor)

    def _nudged(self, start: Gaussian, noise: Noise) -> Gaussian:
        moved = start.draw(NUDGE * noise.normal(1, self.slots.dim))[0]
        return replace(start, loc=torch.where(self.form.free_loc, moved, start.loc))

    def _steps(
        self, natural: NaturalGradient, start: Gaussian, positions: Tensor, num_steps: int, noise: Noise
    ) -> Gaussian:
        first, q = len(self.history) < 2, start
        for step in range(num_steps):
            draws = noise.normal(POINTS // 2, self.slots.dim)[:, positions]
            if first and step % MEASURE_EVERY == 0:
                self.history.append(self._elbo(q, draws, positions).mean(0))
            q = natural.step(q, draws, lambda points: self.slots.gradients(positions, points), rate(step))
        return q

    def _scores(self, q: Gaussian, positions: Tensor) -> Tensor:
        """The ELBO on the selection draws: `(rounds, M)`, -inf where it is not finite."""
        noise, rounds = self._noise("select"), max(2, self.settings.num_selection // POINTS)
        draws = noise.normal(rounds * POINTS, self.slots.dim)[:, positions]
        scores = self._elbo(q, draws, positions).unflatten(0, (rounds, POINTS)).mean(1)
        return torch.where(torch.isfinite(scores), scores, torch.full_like(scores, -math.inf))

    def _elbo(self, q: Gaussian, noise: Tensor, positions: Tensor) -> Tensor:
        """log p(x, z) - log q(z) at the points of `noise` `(S, M, dim)`, `(S, M)`."""
        z = q.draw(noise)
        return (self.slots.values(positions, z) - q.peak + 0.5 * q.kept(noise).square().sum(-1)).double()

    def _noise(self, purpose: str) -> Noise:
        return self.slots.noise(self.run.stream(f"{purpose} {self.name}"), len(self.block), self.own.loc.dtype)


def _with(gaussian: Gaussian, positions: Tensor, other: Gaussian, which: Tensor | slice) -> Gaussian:
    """`gaussian` with rows `which` of `other` at `positions`."""
    loc, scale = gaussian.loc.clone(), gaussian.scale.clone()
    loc[positions], scale[positions] = other.loc[which], other.scale[which]
    return replace(gaussian, loc=loc, scale=scale)


def _stretched(history: Tensor) -> Tensor:
    """The mean over datapoints of ELBOs `(some, B)` as `NUM_TRACE` points."""
    places = torch.arange(NUM_TRACE) * len(history) // NUM_TRACE
    return history.double().mean(1)[places.to(history.device)]
