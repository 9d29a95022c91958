"""Rounds of natural-gradient steps, for datapoints of a chunk."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyrogaps.capture.slots import POINTS, Slots
from pyrogaps.gaussians import Gaussian
from pyrogaps.refine.gaussian_form import GaussianForm
from pyrogaps.refine.natural import NUM_FAST, NaturalGradient, fitted_to, rate
from pyrogaps.refine.optimise import MEASURE_EVERY, no_gain, settled
from pyrogaps.refine.settings import Refinement
from pyrogaps.refine.unseen import Unseen, reaching, unseen
from pyrogaps.run import Run
from pyrogaps.streams import Noise

# A round is checked by a third as many further steps.
FURTHER = 3
# The start is moved by so many standard deviations, because mirrored draws never leave a saddle.
NUDGE = 0.1
# Of `Ends`, one entry for each datapoint.
COLUMNS = ("converged", "shortfall", "unseen", "steep")


@dataclass(frozen=True)
class Ends:
    """Where the rounds of M datapoints ended.

    Attributes:
        gaussian: the Gaussians.
        scores: their ELBOs on the selection draws, `(rounds, M)`, in nats; -inf where not finite. The draws reach
            along axes that are steep.
        converged: `(M,)`, where further steps at the full rate did not raise the ELBO.
        shortfall: `(M,)`, nats, by how much the noise of the steps lowers the ELBO, estimated from their spread.
        unseen: `(M,)`, nats that plain draws of these Gaussians do not see, see `unseen`.
        steep: `(M, dim)`, axes along which these Gaussians, or earlier ones of the same rounds, stood at a cliff.
    """

    gaussian: Gaussian
    scores: Tensor
    converged: Tensor
    shortfall: Tensor
    unseen: Tensor
    steep: Tensor

    @property
    def elbo(self) -> Tensor:
        """The mean over the selection draws, `(M,)`, in nats."""
        return self.scores.mean(0)

    def at(self, positions: Tensor) -> "Ends":
        """Those of the datapoints at `positions`."""
        columns = (getattr(self, name)[positions] for name in COLUMNS)
        return Ends(self.gaussian.at(positions), self.scores[:, positions], *columns)

    def with_replaced(self, positions: Tensor, other: "Ends") -> "Ends":
        """With `other` for the datapoints at `positions`."""
        scores = self.scores.clone()
        scores[:, positions] = other.scores
        columns = {name: getattr(self, name).clone() for name in COLUMNS}
        for name, column in columns.items():
            column[positions] = getattr(other, name)
        return Ends(self.gaussian.with_replaced(positions, other.gaussian), scores, **columns)

    def better(self, other: "Ends") -> "Ends":
        """Those of the same datapoints that have the higher ELBO."""
        places = (other.elbo > self.elbo).nonzero()[:, 0].cpu()
        return self.with_replaced(places, other.at(places))

    @classmethod
    def joined(cls, parts: Sequence["Ends"]) -> "Ends":
        """Those of all parts, one after the other."""
        first, gaussians = parts[0].gaussian, [part.gaussian for part in parts]
        active = None if first.active is None else torch.cat([each.active for each in gaussians])  # type: ignore[misc]
        loc, scale = (torch.cat([getattr(each, name) for each in gaussians]) for name in ("loc", "scale"))
        columns = (torch.cat([getattr(part, name) for part in parts]) for name in COLUMNS)
        return cls(Gaussian(loc, scale, active), torch.cat([part.scores for part in parts], 1), *columns)


@dataclass(frozen=True)
class Rounds:
    """Rounds of natural-gradient steps for datapoints of a chunk: see `NaturalGradient`.

    Attributes:
        slots: evaluates log p(x, z) of the datapoints of the chunk.
        form: what the family frees.
        settings, run: as for `Refiner`.
        name: of the refinement, after which streams are named.
        history: takes ELBOs along the first steps, `(M,)` each, for the trace.
        precision: times as many selection draws as the settings say.
    """

    slots: Slots
    form: GaussianForm
    settings: Refinement
    run: Run
    name: str
    history: list[Tensor]
    precision: int = 1

    @property
    def num_steps(self) -> int:
        """Steps of the first round; twice as many for a full covariance."""
        return self.settings.num_natural_steps * (1 if self.form.blocks is None else 2)

    def begin(self, purpose: str, own: Gaussian, curvature: Gaussian, positions: Tensor) -> Ends:
        """A first round for the datapoints at `positions`, from the family's best Gaussians for a curvature.

        `own` are their guides themselves, which stay in what the family does not free.
        """
        start, noise = fitted_to(self.form, own, curvature), self.noise(f"{purpose} start")
        nudged = start.draw(NUDGE * noise.normal(1, self.slots.dim)[:, positions])[0]
        start = replace(start, loc=torch.where(self.form.free_loc, nudged, start.loc))
        natural, steep = NaturalGradient.about(self.form, own, curvature), unseen(self.slots, start, positions).steep
        return self.round(purpose, start, natural, positions, self.num_steps, steep)

    def round(
        self,
        purpose: str,
        start: Gaussian,
        natural: NaturalGradient,
        positions: Tensor,
        num_steps: int,
        steep: Tensor,
    ) -> Ends:
        """A round at the full rate, and a third as many further steps at the full rate again.

        A datapoint has converged where further steps neither raise the ELBO by more than the tolerance nor lower it:
        steps that lower it are led by noise, and say nothing of what there is to gain. Their end is kept only if they
        raise it by more than the noise of the selection draws.
        """
        end = self.steps(purpose, start, natural, positions, (0, num_steps), steep)
        checks = max(FURTHER, num_steps // FURTHER)
        further = self.steps(f"{purpose} further", end.gaussian, natural, positions, (0, checks), end.steep, look=False)
        converged = settled(end.scores, further.scores, self.settings.tolerance)
        converged = converged & no_gain(further.scores, end.scores, self.settings.tolerance)
        # No two standard errors of grace: what is in doubt takes further rounds, and is compared on more draws.
        converged = converged & (further.elbo - end.elbo <= self.settings.tolerance)
        gained = (~no_gain(end.scores, further.scores, 0.0)).nonzero()[:, 0].cpu()
        if len(gained):
            further = self.looked_at(further.at(gained), positions[gained])
            end = end.with_replaced(gained, further)
        return replace(end, converged=converged)

    def looked_at(self, ends: Ends, positions: Tensor) -> Ends:
        """With what plain draws do not see of them."""
        known = unseen(self.slots, ends.gaussian, positions)
        return replace(ends, unseen=known.nats, steep=ends.steep | known.steep)

    def steps(
        self,
        purpose: str,
        start: Gaussian,
        natural: NaturalGradient,
        positions: Tensor,
        span: tuple[int, int],
        steep: Tensor,
        *,
        look: bool = True,
    ) -> Ends:
        """Steps number `span[0]` to `span[1] - 1`, which counts for the rate, and where they end.

        A step does not count where the mean is still far off and goes on as before. Draws reach along the axes that are
        `steep` `(M, dim)`; if asked to `look`, more of these are looked for at the end.
        """
        noise, choices, q, excess = self.noise(purpose), self.noise(f"{purpose} axes"), start, []
        before = torch.zeros_like(start.loc, dtype=torch.float64)
        age = torch.full_like(natural.mask.flatten(1)[:, 0], span[0])
        for step in range(*span):
            draws = reaching(noise, choices, POINTS // 2, positions, steep)
            if purpose == "natural" and step % MEASURE_EVERY == 0:
                self.history.append(self._elbo(q, draws.noise, positions).mean(0))
            taken = natural.step(q, draws, lambda points: self.slots.gradients(positions, points), rate(age))
            # A step far off that turns back was thrown there, by a cliff: only smaller steps end that.
            age += ~taken.far | ((taken.direction * before).sum(-1) < 0)
            q, before = taken.gaussian, taken.direction
            excess.append(taken.shortfall)
        # The end is a mean over all steps after the first, fast ones; the later half of them is near it.
        late = torch.stack(excess[-max(1, len(excess) // 2) :]).mean(0)
        known = unseen(self.slots, q, positions) if look else Unseen.none(q)
        scored = self.scored(q, positions, known._replace(steep=known.steep | steep))
        return replace(scored, shortfall=late / (age - NUM_FAST).clamp(min=1.0))

    def scored(self, q: Gaussian, positions: Tensor, known: Unseen) -> Ends:
        """Gaussians of the datapoints at `positions` with their ELBOs on the selection draws, the same for all."""
        rounds = max(2, self.settings.num_selection // POINTS)
        noise, steep, parts = self.noise("select"), known.steep, []
        for _ in range(self.precision):
            draws = noise.normal(rounds * POINTS, self.slots.dim)[:, positions]
            parts.append(self._elbo(q, draws, positions).unflatten(0, (rounds, POINTS)).mean(1))
        scores = torch.stack(parts).mean(0)
        if len(places := steep.any(1).nonzero()[:, 0].to(positions.device)):
            scores[:, places] = self._reaching_scores(q.at(places), positions[places], steep[places], rounds)
        scores = torch.where(torch.isfinite(scores), scores, torch.full_like(scores, -math.inf))
        nothing = torch.zeros_like(scores[0])
        return Ends(q, scores, nothing.bool(), nothing, known.nats, steep)

    def scored_again(self, ends: Ends, positions: Tensor) -> Ends:
        """With other scores for the datapoints at `positions` of all."""
        old = ends.at(positions)
        new = self.scored(old.gaussian, positions, Unseen(old.unseen, old.steep))
        return ends.with_replaced(positions, replace(old, scores=new.scores))

    def _reaching_scores(self, q: Gaussian, positions: Tensor, steep: Tensor, rounds: int) -> Tensor:
        """The ELBOs `(rounds, M)` of Gaussians on draws that reach along steep axes."""
        noise, choices, parts = self.noise("select far"), self.noise("select far axes"), []
        # The mean of the weights is 1 only in expectation: they are of differences from the value at the mean.
        level = self._elbo(q, torch.zeros_like(q.loc)[None], positions)
        for _ in range(self.precision):
            draws = reaching(noise, choices, rounds * POINTS, positions, steep)
            values = draws.weights * (self._elbo(q, draws.noise, positions) - level)
            parts.append(level + values.unflatten(0, (rounds, POINTS)).mean(1))
        return torch.stack(parts).mean(0)

    def noise(self, purpose: str) -> Noise:
        """Standard noise for the whole chunk, block by block."""
        chunk, loc = self.slots.block, self.form.free_loc
        return self.run.stream(f"{purpose} {self.name}").noise(chunk, dtype=self.form.joint.dtype, device=loc.device)

    def _elbo(self, q: Gaussian, noise: Tensor, positions: Tensor) -> Tensor:
        """log p(x, z) - log q(z) at the points of `noise` `(S, M, dim)`, `(S, M)`."""
        log_q = q.peak - 0.5 * q.kept(noise).square().sum(-1)
        return (self.slots.values(positions, q.draw(noise)) - log_q).double()
