"""The family a guide itself belongs to."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide, AutoGuideList, AutoNormal
from torch import Tensor

from pyrogaps.density import GuideDensity, JointDensity
from pyrogaps.density.data import evenly_spaced
from pyrogaps.density.draws import BlockedGuide
from pyrogaps.density.given_states import Cells, GivenStatesGuide, StatesDensity, columns_of
from pyrogaps.density.guide_states import GuideStates, listed_states, read_states
from pyrogaps.density.local import FactorisedGuide
from pyrogaps.density.runs import evaluating
from pyrogaps.errors import InputError
from pyrogaps.family import AmortizedGuide, LocalFamily
from pyrogaps.problem import Problem
from pyrogaps.refine.enumerated import EnumeratedGuide
from pyrogaps.refine.families import Family, Start, restrict
from pyrogaps.refine.family_guide import FamilyGuide
from pyrogaps.refine.finetune import FinetunedGuide, learned_weights, substituted, used_weights
from pyrogaps.refine.freed import FreedGuide, can_be_freed, is_learned, varying_parameters
from pyrogaps.refine.freedom import Freedom, freedom_of, ties_of
from pyrogaps.refine.local import Refinable
from pyrogaps.refine.structured import StructuredGuide, can_be_structured, without_parameters
from pyrogaps.run import Run
from pyrogaps.streams import Chunk, seeded

NUM_MOMENTS = 1024


@dataclass
class OwnFamily:
    """How to free a guide for the datapoints of a chunk, starting at the guide itself.

    `kind` is "autoguide" (a fresh one of its class), "local_family" (what its class brings), "freed" (its site
    distributions with free parameters), "structured" (the same where they depend on earlier draws), "enumerated" (the
    same with discrete sites that do, of joint `states` `(K, E)`) or "fine-tuned" (its own weights, datapoint by
    datapoint). `freedom` says what stays tied.
    """

    density: GuideDensity
    kind: str
    family: Callable[[Any], Any] | None = None
    varies: dict[str, set[str]] = field(default_factory=dict)
    freedom: Freedom | None = None
    states: Tensor | None = None

    @property
    def fresh(self) -> Family | None:
        """What to fit to other data in place of a guide that has parameters for its own datapoints alone: a fresh
        autoguide of its class, or the family that it brings. None for other guides, and where there is no such family.
        """
        guide = self.density.guide
        if self.kind == "freed" and isinstance(guide, AutoGuide) and not isinstance(guide, AutoGuideList):
            kind: Any = type(guide)
            return partial(kind, rank=guide.rank) if hasattr(guide, "rank") else kind
        return self.family if self.kind == "autoguide" or self.density.bound else None

    @property
    def amortized(self) -> bool:
        """Whether one network, or one set of parameters, serves all datapoints."""
        own_parameters = self.density.bound or isinstance(self.density.guide, AutoGuide)
        return self.density.joint.plate is not None and not own_parameters

    @property
    def on_other_data(self) -> bool:
        """Whether there is something to refine on other data."""
        return self.fresh is not None or not self.density.bound

    def for_other_data(self, problem: Problem) -> Problem:
        """`problem` as it can be taken to other data: without a guide that has parameters for its own alone."""
        return problem if self.fresh is None else problem.with_guide(None)

    def over(self, problem: Problem) -> "OwnFamily | Family":
        """This family for the guide of `problem`, the same on other data; for a problem without one, `fresh`."""
        if isinstance(problem.posterior, GuideDensity):
            return replace(self, density=problem.posterior)
        assert self.fresh is not None
        return self.fresh

    def start(self, joint: JointDensity, chunk: Chunk, run: Run) -> Refinable:
        """A refinable guide for `chunk` of `joint`, the model's own density, at the guide's own output there."""
        if self.family is not None:
            guide = FamilyGuide(self.family, joint, chunk, run)
            start_local = AmortizedGuide.of(self.density.guide).start_local
            if start_local is None:
                guide.start_at(Start(*moments(self.density, chunk, run), fitted=False))
            else:
                guide.start_by(start_local)
            return guide
        joint = restrict(joint, chunk.indices)
        if self.kind == "freed":
            with torch.no_grad():
                local = self.density.at(chunk.indices)
            assert isinstance(local, FactorisedGuide)
            return FreedGuide(local, joint, chunk.start, self.varies, self.freedom)
        if self.kind == "enumerated":
            assert self.freedom is not None and self.states is not None
            return EnumeratedGuide(self.density, joint, chunk.indices, self.freedom, self.states)
        if self.kind == "structured":
            assert self.freedom is not None
            return StructuredGuide(self.density, joint, chunk.indices, self.freedom)
        return FinetunedGuide(self.density, joint, chunk.indices)

    def start_at(self, start: Start, joint: JointDensity, chunk: Chunk, run: Run) -> Refinable | None:
        """A refinable guide for `chunk` at the Gaussian `start`; None where it cannot start there."""
        if self.family is not None:
            guide = FamilyGuide(self.family, joint, chunk, run)
            guide.start_at(start)
            return guide
        freed = self.start(joint, chunk, run)
        return freed if isinstance(freed, FreedGuide | StructuredGuide) and freed.start_at(start) else None


@dataclass
class StatesFamily(OwnFamily):
    """A guide that draws discrete sites: what depends on what in it, and the family of z given these.

    `graphs` are records of densities of z, used by all chunks.
    """

    read: GuideStates | None = None
    inner: OwnFamily | None = None
    graphs: dict[Any, Any] = field(default_factory=dict)


def own_family(density: GuideDensity) -> OwnFamily:
    """Find the family that a guide belongs to; the choice rests on the guide and the data set, not on a chunk of it."""
    return _states_family(density) if density.joint.structure.drawn else _own_family(density)


def _states_family(density: GuideDensity) -> OwnFamily:
    read, scored = read_states(density), density.joint
    if read is None:
        return _enumerated_family(density)
    cells = Cells(read.states[read.cells[0]])
    joint = StatesDensity.of(scored, cells, torch.ones(()).expand(scored.num_datapoints, *cells.states.shape[:2]))
    inner = _own_family(GivenStatesGuide(density, joint, factorised=read.factorised)) if joint.dim else None
    return StatesFamily(density, "states", read=read, inner=inner)


def _enumerated_family(density: GuideDensity) -> OwnFamily:
    """That of a guide with discrete sites which depend on continuous latents; `InputError` where it cannot be freed."""
    weights, site = learned_weights(density), density.joint.structure.drawn[0]
    why = "and its sites have no parameters in the model's coordinates"
    for name, kind in without_parameters(density).items():
        why = f"and the parameters of site '{name}' ({kind}) cannot be freed"
    if can_be_structured(density):
        states = listed_states(density)
        freedom = freedom_of(density, weights, states)
        if freedom.any:
            return OwnFamily(density, "enumerated", freedom=freedom, states=states)
        why = "and no parameter of its sites is learned"
    raise InputError(
        f"site '{site}': its distribution in the guide depends on continuous latents, {why}, so that there is nothing "
        "to refine. Draw the discrete sites first, or leave them out of the guide: they are then summed out exactly"
    )


def _own_family(density: GuideDensity) -> OwnFamily:
    guide = density.guide
    if (local_family := AmortizedGuide.of(guide).local_family) is not None:
        return OwnFamily(density, "local_family", local_family)
    starts_at = LocalFamily.of(guide).start_at is not None
    if isinstance(guide, AutoNormal) or (isinstance(guide, AutoGuide) and starts_at):
        return OwnFamily(density, "autoguide", type(guide))
    if density.factorised:
        subset = evenly_spaced(density.num_datapoints, 64)
        with seeded(0, "own family"), evaluating(guide), torch.enable_grad():
            local = density.at(subset)
            assert isinstance(local, FactorisedGuide)
            if can_be_freed(local) and not is_learned(local):  # perhaps because it is frozen
                weights = used_weights(density)
                with substituted(weights, [weight.value.detach().requires_grad_() for weight in weights]):
                    local = density.at(subset)
        assert isinstance(local, FactorisedGuide)
        if can_be_freed(local):
            varies = varying_parameters(local)
            if any(varies.values()):
                return OwnFamily(density, "freed", None, varies, ties_of(density, local, varies))
    if isinstance(guide, AutoGuide):
        return OwnFamily(density, "autoguide", type(guide))
    if can_be_structured(density) and (weights := used_weights(density)):
        freedom = freedom_of(density, weights)
        if freedom.any:
            return OwnFamily(density, "structured", freedom=freedom)
    return OwnFamily(density, "fine-tuned")


def moments(density: Any, chunk: Chunk, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation `(B, dim)` of a posterior in unconstrained space, whatever its discrete latents."""
    with torch.no_grad():
        loc, scale = BlockedGuide(density, chunk).moments(NUM_MOMENTS, run.stream("moments"))
    if not (joint := density.joint).structure.drawn:
        return loc, scale
    kept = columns_of(joint, drawn=False)
    return loc[:, kept], scale[:, kept]


def start_of(refined: Any, chunk: Chunk, run: Run) -> Start:
    """The start that the refined guide of a chunk gives further families."""
    fitted = BlockedGuide(refined, chunk).mean_field
    return Start(*moments(refined, chunk, run), fitted=fitted)
