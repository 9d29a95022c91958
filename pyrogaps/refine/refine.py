"""`refine`: per-datapoint guides for a whole data set."""

from typing import Any

import torch
from torch import Tensor

from pyrogaps.bounds import Plate, densities, over_chunks
from pyrogaps.capture import GradientEvaluator
from pyrogaps.density import Data, JointDensity
from pyrogaps.density.local import LocalGuide
from pyrogaps.density.runs import Program
from pyrogaps.errors import InputError
from pyrogaps.refine.families import Family, FamilyGuide, restrict
from pyrogaps.refine.local import Refinable
from pyrogaps.refine.optimise import Progress, optimise
from pyrogaps.refine.own import OwnFamily, own_family
from pyrogaps.refine.settings import Refinement
from pyrogaps.streams import BLOCK, Chunk

Start = tuple[Tensor, Tensor] | None


def refine_chunk(
    family: OwnFamily | Family,
    evaluator: GradientEvaluator,
    chunk: Chunk,
    settings: Refinement,
    seed: int,
    name: str = "own",
    start: Start = None,
) -> tuple[Refinable, Progress]:
    """Refine one chunk: q* of its datapoints, counted from 0, and how it went.

    A further family starts at the Gaussian `start` (means and standard deviations `(B, dim)`), the guide's own at the
    guide's output.
    """
    if isinstance(family, OwnFamily):
        refinable = family.start(chunk, seed)
    else:
        guide = FamilyGuide(family, restrict(evaluator.joint, chunk.indices), seed)
        if start is not None:
            guide.start_at(*start)
        refinable = guide
    evaluate = evaluator.bind(chunk.indices, settings.num_particles)
    progress = optimise(refinable, evaluate, chunk, settings, seed, name)
    for parameter in refinable.parameters:
        parameter.requires_grad_(False)
    return refinable, progress


class RefinedGuide:
    """The refined guides of a data set: a posterior per datapoint, and a Pyro guide for those data.

    `at(indices)` gives the guide at some datapoints, for the estimators; calling it makes the `pyro.sample` statements
    for the whole data set, in program order, as `pyro.infer.Predictive` or `Trace_ELBO` want them.
    """

    def __init__(self, joint: JointDensity, chunks: list[Chunk], parts: list[Refinable], progress: list[Progress]) -> None:
        self.joint, self.chunks, self.parts = joint, chunks, parts
        self.converged = torch.cat([part.converged for part in progress])
        self.kept_start = torch.cat([part.kept_start for part in progress])
        self.traces = torch.stack([part.trace for part in progress])

    def at(self, indices: Tensor) -> LocalGuide:
        """The guide at `indices`, which must lie in one chunk."""
        for chunk, part in zip(self.chunks, self.parts, strict=True):
            if chunk.start <= int(indices.min()) and int(indices.max()) < chunk.stop:
                return part.at(indices - chunk.start)
        raise InputError("indices: they span several chunks of the refinement; ask for fewer at a time")


def refine(
    model: Program,
    guide_or_family: Any,
    data: Data,
    *,
    settings: Refinement | None = None,
    plate: Plate = None,
    batch_size: int = BLOCK,
    seed: int = 0,
) -> RefinedGuide:
    r"""Fit a guide of a family to every datapoint: $q^*_n = \arg\max_{q \in Q} \mathcal L[q](x_n)$.

    Args:
        model, data, plate: as for `JointDensity`.
        guide_or_family: a guide, whose own family is refined from its output; or `family(model) -> guide`, a class such as
            `AutoNormal` or a function marked by `pyrogaps.family`.
        settings: see `Refinement`.
        batch_size: datapoints refined at once.
        seed: of all the randomness.

    Raises:
        InputError: where the family is not local under the data plate, or has no reparameterised draws.
    """
    settings = settings or Refinement()
    family: Any
    if isinstance(guide_or_family, type):
        joint, family = JointDensity(model, data, plate), guide_or_family
    else:
        joint, density = densities(model, guide_or_family, data, plate)
        family = own_family(density)
    evaluator = GradientEvaluator(joint)
    parts: list[tuple[Chunk, Refinable, Progress]] = over_chunks(
        lambda chunk: (chunk, *refine_chunk(family, evaluator, chunk, settings, seed)), joint, batch_size, seed
    )
    return RefinedGuide(joint, [p[0] for p in parts], [p[1] for p in parts], [p[2] for p in parts])


