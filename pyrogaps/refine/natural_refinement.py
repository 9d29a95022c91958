"""The refinement of Gaussian guides: by natural gradients, and by Adam where these do not converge."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyrogaps.capture import GradientEvaluator
from pyrogaps.gaussians import Curvature, Gaussian
from pyrogaps.refine.gaussian_form import GaussianForm
from pyrogaps.refine.gaussian_guides import GaussianGuides, Subset
from pyrogaps.refine.natural_rounds import Ends, NaturalRounds
from pyrogaps.refine.optimise import NUM_TRACE, Optimisation, Progress
from pyrogaps.refine.settings import Refinement
from pyrogaps.run import Run
from pyrogaps.streams import Chunk


@dataclass(frozen=True)
class NaturalRefinement:
    """Maximises the ELBO over the Gaussians of a family, for every datapoint of a chunk.

    Natural gradients start at the curvature Gaussians, see `NaturalRounds`. The datapoints for which they do not
    converge are refined by Adam, from the best that was found. All that is compared is compared on the same selection
    draws; no bound that is reported uses these.

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
            chunk, own = self.form.chunk, self.form.read()
            ends, histories = zip(*(self._ascended(block, own) for block in chunk.blocks()), strict=True)
            gaussians = [end.gaussian for end in ends]
            loc, scale = (torch.cat([getattr(each, name) for each in gaussians]) for name in ("loc", "scale"))
            best, converged = replace(own, loc=loc, scale=scale), torch.cat([end.converged for end in ends])
        left = (~converged).nonzero()[:, 0]
        if len(left):
            best, converged[left] = self._by_adam(best, left)
        kept = (best.loc == own.loc).all(-1) & (best.scale == own.scale).flatten(1).all(-1)
        self.form.write(best, ~kept)
        return Progress(converged, kept, _stretched(torch.cat(histories, 1)))

    def _ascended(self, block: Chunk, own: Gaussian) -> tuple[Ends, Tensor]:
        chunk = self.form.chunk
        positions = torch.arange(block.start - chunk.start, block.stop - chunk.start)
        rounds = NaturalRounds(self.evaluator, self.form, self.settings, self.run, self.name, own.at(positions), block)
        ends = rounds.ascend(self.curvature.within(chunk, block))
        self.run.bar.advance(len(block) / len(chunk), ends.elbo)
        return ends, torch.stack(rounds.history)

    def _by_adam(self, start: Gaussian, positions: Tensor) -> tuple[Gaussian, Tensor]:
        """The Gaussians with those at `positions` refined by Adam, and whether that converged."""
        chunk = self.form.chunk
        subset = Subset(chunk.start, chunk.stop, chunk.indices[positions.cpu()])
        guides = GaussianGuides(self.form, start.at(positions), subset)
        density = self.evaluator.bind(subset.indices, self.settings.num_particles)
        progress = Optimisation(guides, density, subset, self.settings, self.run.quiet(), self.name).maximise()
        found, moved = guides.gaussian(), ~progress.kept_start
        loc, scale = start.loc.clone(), start.scale.clone()
        loc[positions[moved]], scale[positions[moved]] = found.loc[moved], found.scale[moved]
        return replace(start, loc=loc, scale=scale), progress.converged


def _stretched(history: Tensor) -> Tensor:
    """The mean over datapoints of ELBOs `(some, B)` as `NUM_TRACE` points."""
    places = torch.arange(NUM_TRACE) * len(history) // NUM_TRACE
    return history.double().mean(1)[places.to(history.device)]
