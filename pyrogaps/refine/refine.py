"""`refine`: per-datapoint guides for a whole data set."""

from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrogaps.density import Data, JointDensity
from pyrogaps.density.local import LocalGuide
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError, counted
from pyrogaps.guard import guarded
from pyrogaps.modes import Gain
from pyrogaps.problem import Problem
from pyrogaps.refine.examined import can_be_taken, refined_from_modes
from pyrogaps.refine.families import is_family
from pyrogaps.refine.local import Refinable
from pyrogaps.refine.optimise import Progress
from pyrogaps.refine.own import own_family
from pyrogaps.refine.refiner import Refiner
from pyrogaps.refine.settings import Refinement
from pyrogaps.run import Run
from pyrogaps.settings import Count, Plate, Sample, Seed, checked
from pyrogaps.streams import BLOCK, Chunk


class RefinedGuide:
    """The refined guides of a data set: a posterior per datapoint, and a Pyro guide for those data.

    `elbo`, `iwae` and `ais(initial="guide")` take it as a guide. Called as Pyro calls guides, with the model's
    arguments for all N datapoints, it makes the `pyro.sample` statements, so that `Trace_ELBO` and `Predictive` take
    it too; log q then stands at the auxiliary site "_refined".

    Attributes:
        converged: whether each datapoint's refinement settled, `(N,)`.
        kept_start: where the start was no worse than what refinement found, and was kept, `(N,)`.
        traces: the ELBO along the refinement, a mean over the datapoints of each chunk, `(chunks, points)`, in nats.
        examined: which datapoints were examined for modes, and refined from each that was found, `(N,)`. `converged` of
            others says that the refinement settled, not that it would end there from other starts.
        gain: by how much that raised the ELBO of those with several modes.
    """

    def __init__(
        self,
        joint: JointDensity,
        chunks: list[Chunk],
        parts: list[Refinable],
        progress: list[Progress],
        examined: Tensor | None = None,
        gain: Gain | None = None,
    ) -> None:
        self.joint, self.chunks, self.parts = joint, chunks, parts
        self.converged = torch.cat([part.converged for part in progress])
        self.kept_start = torch.cat([part.kept_start for part in progress])
        self.traces = torch.stack([part.trace for part in progress])
        self.examined, self.gain = torch.zeros(len(self.converged), dtype=torch.bool), gain or Gain.none()
        if examined is not None:
            self.examined[examined] = True

    def __repr__(self) -> str:
        number, examined = len(self.converged), int(self.examined.sum())
        better = f"; other starts improved {self.gain.count} of {examined:,} examined" if examined else ""
        settled = f"refinement settled for {int(self.converged.sum()):,}"
        return f"RefinedGuide({counted(number, 'datapoint')}: {settled}{better})"

    def at(self, indices: Tensor) -> LocalGuide:
        """The guide at `indices`, which must lie in one chunk."""
        for chunk, part in zip(self.chunks, self.parts, strict=True):
            if chunk.start <= int(indices.min()) and int(indices.max()) < chunk.stop:
                return part.at(indices)
        raise InputError(
            "indices: they span several chunks of the refinement, but must lie in one. Request the indices of each "
            "chunk separately"
        )

    @guarded
    def sample(self, num_particles: int) -> tuple[Tensor, Tensor]:
        """Draws `z` `(S, N, dim)` and their log q in nats `(S, N)`, in the model's unconstrained space."""
        with torch.no_grad():
            draws = [part.at(c.indices).sample(num_particles) for c, part in zip(self.chunks, self.parts, strict=True)]
        return torch.cat([z for z, _ in draws], 1), torch.cat([log_q for _, log_q in draws], 1)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        with pyro.poutine.block(), torch.no_grad():
            z, log_q = self.sample(1)
            indices = torch.arange(self.joint.num_datapoints)
            handler = self.joint.run(z[0], self.joint.fetch(indices), indices)
        # Values are handed over constrained, where the density is smaller by the Jacobian.
        log_density = (log_q[0] - handler.log_jacobian).sum()
        pyro.sample("_refined", dist.Delta(log_density, log_density), infer={"is_auxiliary": True})
        values = {}
        frames = {frame.name: frame for name in handler.values for frame in handler.frames[name]}
        # One of each: a plate announces itself when it is made, once in a trace.
        known = {name: pyro.plate(name, frame.size, dim=frame.dim) for name, frame in frames.items()}
        for name, value in handler.values.items():
            with ExitStack() as plates:
                for frame in handler.frames[name]:
                    plates.enter_context(known[frame.name])
                values[name] = pyro.sample(name, dist.Delta(value, event_dim=self.joint.sites[name].event_dim))
        return values


@guarded
@checked()
def refine(
    model: Program | Problem,
    guide_or_family: Any = None,
    data: Data | None = None,
    *,
    settings: Refinement | None = None,
    referee: Sample = 32,
    plate: Plate = None,
    batch_size: Count = BLOCK,
    seed: Seed = 0,
    progress: bool = True,
) -> RefinedGuide:
    r"""Fit a guide of a family to every datapoint: $q^*_n = \arg\max_{q \in Q} \mathcal L[q](x_n)$.

    Args:
        model, data, plate: as for `JointDensity`; or a `Problem`, with a family or with its own guide.
        guide_or_family: a guide, whose own family is refined from its output; or `family(model) -> guide`, a class such
            as `AutoNormal`, a partial of one, or a function whose first argument is called `model`.
        settings: see `Refinement`.
        referee: how many datapoints are examined for modes other than the one at the guide's output, and refined from
            each: a random sample, or all if there are no more; False examines none.
        batch_size: datapoints refined at once.
        seed: of all the randomness.
        progress: whether to show a progress bar once the call has taken two seconds.

    Raises:
        InputError: where the family is not local under the data plate, or has no reparameterised draws.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> refined = pg.refine(model, guide, x)
        >>> bool((pg.elbo(model, refined, x).value > pg.elbo(model, guide, x).value).all())
        True
    """
    family = guide_or_family if is_family(guide_or_family) else None
    problem = Problem.of(model, guide_or_family if family is None else None, data, plate)
    refiner = Refiner(family or own_family(problem.guide_density()), settings or Refinement())
    return refine_all(problem, refiner, Run(seed, batch_size, progress), int(referee))


def refine_all(problem: Problem, refiner: Refiner, run: Run, referee: int = 0) -> RefinedGuide:
    """The family of `refiner` fitted to every datapoint of `problem`, and from other starts to some of them."""

    def measure(chunk: Chunk, run: Run) -> tuple[Chunk, Refinable, Progress]:
        return chunk, *refiner.fit(problem, chunk, run)

    chunks, parts, progress = zip(*run.map_shown(measure, problem.joint, "refining", alone=True), strict=True)
    examined = gain = None
    if referee and can_be_taken(refiner):
        examined, gain = refined_from_modes(problem, refiner, run, referee, [*zip(chunks, parts, strict=True)])
    return RefinedGuide(problem.density_of(parts[0]), [*chunks], [*parts], [*progress], examined, gain)
