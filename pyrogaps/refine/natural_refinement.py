"""The refinement of Gaussian guides: by natural gradients, and by Adam where these do not converge."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyrogaps.capture import GradientEvaluator
from pyrogaps.capture.slots import Slots
from pyrogaps.gaussians import Curvature, Gaussian
from pyrogaps.refine.gaussian_form import GaussianForm
from pyrogaps.refine.gaussian_guides import GaussianGuides, Subset
from pyrogaps.refine.natural import NaturalGradient, fitted_to
from pyrogaps.refine.natural_rounds import Ends, Rounds
from pyrogaps.refine.optimise import MAX_ERROR, NUM_TRACE, Optimisation, Progress, error_of, no_gain
from pyrogaps.refine.settings import Refinement
from pyrogaps.refine.unseen import Unseen, unseen
from pyrogaps.run import Run
from pyrogaps.streams import Chunk

# Further rounds, in units of the first; what has not converged is scored on so many times as many draws.
LENGTHS, PRECISION = (2, 4), 16


@dataclass(frozen=True)
class NaturalRefinement:
    """Maximises the ELBO over the Gaussians of a family, for every datapoint of a chunk.

    Natural gradients start at the family's best Gaussians for the curvature of log p(x, z); where that was cut, at the
    guide itself if its ELBO is higher. A datapoint that has converged in the first round takes no more gradients,
    unless the noise of its steps still costs more than the tolerance; then its steps continue. The others take
    further, longer rounds, compared on more draws. Those that have not converged then, or are below the guide itself,
    are refined by Adam from the best that was found; what Adam's draws do not see, such as a cliff, counts when its end
    is compared.

    All comparisons are on the same selection draws, which no reported bound uses. An end that loses more than the
    tolerance where plain draws do not reach, see `unseen`, has not converged.

    Attributes:
        form: the guides, and what their family frees.
        curvature: the Gaussians with the curvature of log p(x, z), fitted by gradients of `evaluator`.
        evaluator, settings, run: as for `Refiner`.
        name: of the refinement, after which streams are named.
    """

    form: GaussianForm
    curvature: Curvature
    evaluator: GradientEvaluator
    settings: Refinement
    run: Run
    name: str

    def maximise(self) -> Progress:
        """Refine the guides where that raises their ELBO."""
        with torch.no_grad():
            own = self.form.read()
            before, ends, history = self._first(own)
            before, ends = self._lasting(own, before, ends)
            # Where the guide itself is better by more than the tolerance, the rounds have failed.
            failed = (before.elbo > ends.elbo) & ~no_gain(ends.scores, before.scores, self.settings.tolerance)
            higher = ends.better(before)
            if len(kept := (before.elbo > ends.elbo).nonzero()[:, 0].cpu()):
                looked = self._rounds(self.form.chunk).looked_at(higher.at(kept), kept)
                higher = higher.with_replaced(kept, looked)
            converged = ends.converged & ~failed
            history = torch.cat([history, higher.elbo[None]])
            left = (~converged).nonzero()[:, 0]
            converged, best = converged & self._seen(higher), higher.gaussian
        if len(left):
            best, converged[left] = self._by_adam(best, left)
        kept = (best.loc == own.loc).all(-1) & (best.matrix == own.matrix).flatten(1).all(-1)
        self.form.write(best, ~kept)
        return Progress(converged, kept, _stretched(history))

    def _first(self, own: Gaussian) -> tuple[Ends, Ends, Tensor]:
        """The guides themselves, and the ends of the first rounds, block by block; ELBOs along the way `(some, B)`."""
        chunk, before, ends, histories = self.form.chunk, [], [], []
        for block in chunk.blocks():
            rounds, everyone = self._rounds(block), torch.arange(len(block))
            its_own = own.at(everyone + block.start - chunk.start)
            before.append(rounds.scored(its_own, everyone, Unseen.none(its_own)))
            curvature = self._curvature(rounds, before[-1], self.curvature.within(chunk, block))
            ends.append(rounds.begin("natural", its_own, curvature, everyone))
            histories.append(torch.stack([before[-1].elbo, *rounds.history]))
            self.run.bar.advance(len(block) / len(chunk), ends[-1].elbo)
        return Ends.joined(before), Ends.joined(ends), torch.cat(histories, 1)

    def _curvature(self, rounds: Rounds, own: Ends, curvature: Curvature) -> Gaussian:
        """Gaussians with the curvature to start at: the guide itself where it was cut and the guide is better."""
        cut = curvature.cut.nonzero()[:, 0].cpu()
        if not len(cut):
            return curvature.gaussian
        fitted = fitted_to(self.form, own.gaussian.at(cut), curvature.gaussian.at(cut))
        start = rounds.scored(fitted, cut, unseen(rounds.slots, fitted, cut))
        worse = cut[(start.elbo < own.elbo[cut]).cpu()]
        guide = own.gaussian.at(worse)
        return curvature.gaussian.with_replaced(worse, replace(guide, scale=guide.factor()))

    def _seen(self, ends: Ends) -> Tensor:
        """Where the ELBO lies within reach of its draws, `(M,)`."""
        return ends.unseen <= self.settings.tolerance

    def _lasting(self, own: Gaussian, before: Ends, ends: Ends) -> tuple[Ends, Ends]:
        """The guides themselves and the ends, compared on more draws and after further rounds where that is needed."""
        noisy = ends.converged & (ends.shortfall > self.settings.tolerance)
        error, gain = error_of(before.scores, ends.scores), ends.elbo - before.elbo
        vague = ~ends.converged | ~((error <= MAX_ERROR) | (gain > 2 * error))
        if not bool((noisy | vague).any()):
            return before, ends
        rounds = self._rounds(self.form.chunk)
        precise = replace(rounds, precision=PRECISION)
        if len(positions := vague.nonzero()[:, 0].cpu()):
            before, ends = (precise.scored_again(each, positions) for each in (before, ends))
        for length in LENGTHS:
            number = length * rounds.num_steps
            noisy = ends.converged & (ends.shortfall > self.settings.tolerance)
            for which, name in ((noisy, "longer"), (~ends.converged, "again")):
                positions = which.nonzero()[:, 0].cpu()
                if not len(positions):
                    continue
                old, curvature = ends.at(positions), self.curvature.gaussian.at(positions)
                natural = NaturalGradient.about(self.form, own.at(positions), curvature)
                purpose = f"natural {name} {length}"
                if name == "again":
                    new = precise.round(purpose, old.gaussian, natural, positions, number, old.steep)
                else:
                    new = rounds.steps(purpose, old.gaussian, natural, positions, (number // 2, number), old.steep)
                    new = replace(new, converged=old.converged)
                best = replace(old.better(new), converged=new.converged, shortfall=new.shortfall)
                ends = ends.with_replaced(positions, best)
        return before, ends

    def _rounds(self, chunk: Chunk) -> Rounds:
        return Rounds(Slots(self.evaluator, chunk), self.form, self.settings, self.run, self.name, [])

    def _by_adam(self, start: Gaussian, positions: Tensor) -> tuple[Gaussian, Tensor]:
        """The Gaussians with those at `positions` refined by Adam, and whether that converged."""
        chunk = self.form.chunk
        subset = Subset(chunk.start, chunk.stop, chunk.indices[positions.cpu()])
        guides = GaussianGuides(self.form, start.at(positions), subset)
        density = self.evaluator.bind(subset.indices, self.settings.num_particles)
        settings = replace(self.settings, num_selection=PRECISION * self.settings.num_selection)
        progress = Optimisation(guides, density, subset, settings, self.run.quiet(), self.name).maximise()
        with torch.no_grad():
            rounds = replace(self._rounds(chunk), precision=PRECISION)
            before, after = (
                rounds.scored(each, positions.cpu(), unseen(rounds.slots, each, positions.cpu()))
                for each in (start.at(positions), guides.gaussian())
            )
            # Adam's own choice was made on other draws; here what they do not see counts too.
            lost = (before.elbo > after.elbo) & ~no_gain(after.scores, before.scores, 0.0)
            end = after.with_replaced(places := lost.nonzero()[:, 0].cpu(), before.at(places))
        loc, scale = start.loc.clone(), start.matrix.clone()
        loc[positions], scale[positions] = end.gaussian.loc, end.gaussian.matrix
        return replace(start, loc=loc, scale=scale), progress.converged & ~lost & self._seen(end)


def _stretched(history: Tensor) -> Tensor:
    """The mean over datapoints of ELBOs `(some, B)` as `NUM_TRACE` points."""
    places = torch.arange(NUM_TRACE) * len(history) // NUM_TRACE
    return history.double().mean(1)[places.to(history.device)]
