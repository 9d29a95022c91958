"""`Problem`: a model, a guide and data, whose structure is read once."""

import inspect
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Union, cast

import torch
from torch import Tensor

from pyrogaps.capture import GradientEvaluator, Mode
from pyrogaps.density import Data, GuideDensity, IndexedData, JointDensity
from pyrogaps.density.arguments import check_same_order
from pyrogaps.density.data import check_indices, rows_of, selected
from pyrogaps.density.drawn import drawn_by, with_drawn
from pyrogaps.density.draws import Posterior, is_posterior
from pyrogaps.density.estimates import PointEstimates
from pyrogaps.density.forms import Given, as_given, check_present, whole
from pyrogaps.density.hierarchy import Hierarchy, Inseparable
from pyrogaps.density.local import LocalGuide
from pyrogaps.density.read_estimates import estimates_of
from pyrogaps.density.remarks import on_drawn
from pyrogaps.density.runs import Program, check_callable
from pyrogaps.density.shared import SharedLatents
from pyrogaps.density.simulate import ToData, simulated_arguments
from pyrogaps.errors import InputError, counted
from pyrogaps.family import AmortizedGuide, augmented
from pyrogaps.guard import guarded
from pyrogaps.settings import Plate, Seed, checked, conform
from pyrogaps.streams import seeded


@dataclass(frozen=True)
class Problem:
    r"""A model, a guide and data. Their programs have been run and checked; nothing that uses a problem does so again.

    Public functions make a problem of their first three arguments, and take one in place of these. Reading it once pays
    where several of them are called:

    >>> import torch, pyrogaps as pg
    >>> from pyrogaps.guides.amortized import AmortizedNormal
    >>> from pyrogaps.models.vae import VAE
    >>> problem = pg.Problem.of(VAE(16, 2, [8]), AmortizedNormal(16, 2, [8]), (torch.rand(5, 16) < 0.5).float())
    >>> problem.dim, problem.num_datapoints, problem.plate
    (2, 5, 'data')
    >>> bool((pg.elbo(problem).value <= pg.iwae(problem).value).all())
    True

    Attributes:
        model: the Pyro model, as it was given.
        guide: the Pyro guide, as it was given, or what `refine` returned; None where there is none.
        joint: log p(x_n, z), of latents `z` `(S, N, dim)` in unconstrained space, in nats.
        posterior: log q(z | x_n) of the guide; None without a guide. A guide with auxiliary variables brings
            `augment(model)`, the model extended by a reverse model for them, whose evidence is the model's own: see
            `scored`. Where it has a `local_family` too, that takes care of the auxiliary variables, and `joint` is of
            the model as it was given. Discrete latents are summed out of `joint`; those that the guide draws have
            columns in `scored`, whose evidence is the same.
        mode: how densities and their gradients are evaluated, see `GradientEvaluator`.
    """

    model: Program
    guide: Program | Posterior | None
    joint: JointDensity
    posterior: Posterior | None = None
    mode: Mode = "captured"
    # Of a posterior that is no Pyro program, where it is not `joint`.
    _scored: JointDensity | None = field(default=None, repr=False, compare=False)
    # Recorded densities, so that a shape is recorded once whoever asks for it.
    _evaluators: dict[tuple[JointDensity, bool], GradientEvaluator] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not isinstance(self.joint, JointDensity):
            raise InputError("Problem: it cannot be made of programs directly. Use Problem.of(model, guide, data)")

    @classmethod
    @guarded
    @checked()
    def of(
        cls,
        model: Union[Program, "Problem"],
        guide: Program | Posterior | None = None,
        data: Data | None = None,
        plate: Plate = None,
        mode: Mode = "captured",
    ) -> "Problem":
        """Read a model, a guide (None for none) and data; a problem is returned as it is.

        Args:
            model: a Pyro model, or a problem, which is passed alone.
            guide: a Pyro guide, or what `refine` returned for these data.
            data, plate: as for `JointDensity`.
            mode: see `GradientEvaluator`.

        Raises:
            InputError: for all that `JointDensity` and `GuideDensity` refuse, and for a problem with other arguments.
        """
        if isinstance(model, Problem):
            if guide is not None or data is not None or plate is not None:
                raise InputError("model: a Problem already contains guide, data and plate. Do not pass them separately")
            return model
        check_callable(model, "model")
        if guide is not None and not is_posterior(guide):
            check_callable(guide, "guide")
        check_present(model, data, "Pass what the model is called with, or a Problem alone")
        given = as_given(data, model)  # here, because a model with a reverse model beside it has no parameters to read
        if guide is not None and not is_posterior(guide):
            check_same_order(cast(Program, guide), given.names)
        estimates = estimates_of(model, guide, given, plate)
        extended = augmented(model, guide) if _extends_model(guide) else model
        try:
            joint = JointDensity(extended, given, plate, estimates=estimates)
        except SharedLatents as shared:
            joint = _as_one_datapoint(extended, guide, given, shared, estimates)
        if extended is model:
            return cls(model, None, joint, None, mode)._with(guide)
        return cls(model, guide, joint, GuideDensity(cast(Program, guide), None, joint), mode)

    @classmethod
    def without_guide(
        cls, model: Union[Program, "Problem"], guide: Any, data: Data | None = None, plate: Plate = None
    ) -> "Problem":
        """As `of` with no guide, but given the point estimates of `guide`, which is not read beyond them."""
        if isinstance(model, Problem):
            return cls.of(model, guide, data, plate).with_guide(None)
        check_callable(model, "model")
        check_present(model, data, "Pass what the model is called with, or a Problem alone")
        given = as_given(data, model)
        estimates = estimates_of(model, guide, given, plate)
        return cls(model, None, JointDensity(model, given, plate, estimates=estimates), None)

    @property
    def plate(self) -> str | None:
        """The data plate's name; None where the whole data set is one datapoint."""
        return self.joint.plate

    @property
    def dim(self) -> int:
        """The number of latent dimensions of a datapoint, in unconstrained space."""
        return self.joint.dim

    @property
    def num_datapoints(self) -> int:
        """N, the number of datapoints."""
        return self.joint.num_datapoints

    @property
    def remarks(self) -> tuple[str, ...]:
        """Short sentences about what the numbers are of: what of model and guide is left out of their densities."""
        guide = self.posterior.remarks if isinstance(self.posterior, GuideDensity) else ()
        drawn = (on_drawn(names),) if (names := self.scored.structure.drawn) else ()
        return tuple(dict.fromkeys([*self.joint.remarks, *guide, *drawn]))

    @property
    def scored(self) -> JointDensity:
        """The density that the guide's draws are scored with: `joint`, or that with the guide's reverse model, or with
        the discrete latents that the guide draws.
        """
        return self.posterior.joint if isinstance(self.posterior, GuideDensity) else self._scored or self.joint

    def density_of(self, posterior: Posterior) -> JointDensity:
        """The density of the space that `posterior` lies in: `scored` or `joint`."""
        sites = posterior.joint.sites
        return self.scored if [*sites] == [*self.scored.sites] else self.joint

    @property
    def evaluator(self) -> GradientEvaluator:
        """Evaluates `joint` and its gradients, recorded once for every shape."""
        return self.evaluator_of(self.joint)

    @property
    def scorer(self) -> GradientEvaluator:
        """As `evaluator`, of `scored`."""
        return self.evaluator_of(self.scored)

    def evaluator_of(self, joint: JointDensity, *, split: bool = False) -> GradientEvaluator:
        """As `evaluator`, of a density of the same data; `split` has the prior beside it, see `GradientEvaluator`."""
        if (joint, split) not in self._evaluators:
            self._evaluators[joint, split] = GradientEvaluator(joint, self.mode, split)
        return self._evaluators[joint, split]

    def compiled(self) -> "Problem":
        """The same problem with its densities given to `torch.compile`."""
        return replace(self, mode="compiled", _evaluators={})

    def guided(self) -> Posterior:
        """`posterior`; raises `InputError` where there is none."""
        if self.posterior is None:
            raise InputError(
                "guide: missing, and this function measures one. Pass it; log_evidence(model, None, data) needs none"
            )
        return self.posterior

    def guide_density(self) -> GuideDensity:
        """`posterior` of a guide that is a Pyro program; raises `InputError` where there is none."""
        posterior = self.guided()
        if not isinstance(posterior, GuideDensity):
            raise InputError("guide: it has been refined already. Pass the original guide or family")
        return posterior

    @guarded
    def with_guide(self, guide: Program | Posterior | None) -> "Problem":
        """The same model and data with another guide, or with none.

        The model is read again only where it is extended by the guide's reverse model, or where the guide has point
        estimates. Without a guide, or with one that draws the same latents, those of this problem remain.
        """
        if guide is not None and not is_posterior(guide):
            given = self.joint.structure.estimates
            data = self.joint.data if given is None else given.without(self.joint.data)
            if (estimates := estimates_of(self.model, guide, as_given(data), self.plate or False)) is not None:
                joint = JointDensity(self.model, data, self.plate or False, estimates=estimates)
                return replace(self, joint=joint, posterior=None, _scored=None, _evaluators={})._with(guide)
        return self._with(guide)

    def _with(self, guide: Program | Posterior | None) -> "Problem":
        """As `with_guide`, with the point estimates of this problem."""
        if is_posterior(guide):  # it belongs to the space that it was refined in
            space = cast(Posterior, guide).joint
            own = space.over(self.joint.data) if space.structure.drawn else None
            return replace(self, guide=guide, posterior=cast(Posterior, guide), _scored=own)
        scored = self._density_of(augmented(self.model, guide))
        joint = scored if _extends_model(guide) else self._density_of(self.model)
        density = None
        if guide is not None:
            program = cast(Program, guide)
            density = GuideDensity(program, None, with_drawn(scored, drawn_by(program, scored)))
        return replace(self, guide=guide, joint=joint, posterior=density, _scored=None)

    def _density_of(self, model: Program) -> JointDensity:
        """log p(x_n, z) of the same data under `model`, which is read where it has not been yet."""
        joint, given = self.joint, self.joint.structure.estimates
        own = joint.model if given is None else inspect.unwrap(joint.model, stop=lambda program: program is model)
        if own is model:
            return joint
        data, make_whole = joint.passed if given is None else given.without(joint.data), joint.structure.make_whole
        return JointDensity(model, data, joint.plate or False, make_whole=make_whole, estimates=given)

    def over(self, data: IndexedData) -> "Problem":
        """The same problem on other data of the same form. No program is run, nothing is checked again, and what has
        been recorded is used again.

        Raises `InputError` for a guide that holds parameters for each of other datapoints.
        """
        joint, posterior = self.joint.over(data), self.posterior
        if isinstance(posterior, GuideDensity):
            same = posterior.joint is self.joint
            posterior = posterior.over(joint if same else posterior.joint.over(data))
        elif posterior is not None:
            raise InputError("guide: a refined guide fits only the data it was refined on. Pass the original guide")
        return replace(self, joint=joint, posterior=posterior, _evaluators=self._recorded(joint))

    def at(self, indices: Tensor) -> "Problem":
        """The same problem at the datapoints `indices` `(M,)` alone, counted from 0. No program is run, and what has
        been recorded is used again. A guide that holds parameters for each datapoint keeps those of these.

        Raises `InputError` for indices that are none.
        """
        check_indices(indices, self.num_datapoints)
        if self.plate is None or torch.equal(indices, torch.arange(self.num_datapoints)):
            return self
        rows, own = selected(self.joint.data, indices), None
        joint, posterior = self.joint.over(rows), self.posterior
        if isinstance(posterior, GuideDensity) and not posterior.bound:
            same = posterior.joint is self.joint
            posterior = posterior.over(joint if same else posterior.joint.over(rows))
        elif posterior is not None:
            own = None if self.scored is self.joint else self.scored.over(rows)
            posterior = PosteriorAt(posterior, indices, own or joint)
        return replace(self, joint=joint, posterior=posterior, _scored=own, _evaluators=self._recorded(joint))

    def _recorded(self, joint: JointDensity) -> dict[tuple[JointDensity, bool], GradientEvaluator]:
        """Evaluators of `joint`, the density of the same model at other data, with what has been recorded."""
        evaluators = self._evaluators.items()
        return {(joint, split): its.over(joint) for (recorded, split), its in evaluators if recorded is self.joint}

    @guarded
    def simulated(self, seed: int, to_data: ToData | None = None) -> "Simulated":
        """The same problem on data drawn from the model in the shape of its own.

        With a guide that has auxiliary variables and no `local_family`, these are drawn too, from its reverse model.

        Raises `InputError` where the model cannot be simulated.
        """
        with seeded(conform("seed", Seed, seed), "simulate", device=self.joint.device):
            args, z = simulated_arguments(self.joint, to_data)
        drawn = whole(args) if self.plate is None else rows_of(args, self.num_datapoints, self.joint.data)
        data = self.joint.passed.restored(args[: len(args) - self.joint.num_given])
        return Simulated(self.over(drawn), data, z)


@dataclass(frozen=True)
class PosteriorAt:
    """A posterior at some of its datapoints, `indices`, counted from 0."""

    posterior: Posterior
    indices: Tensor
    joint: JointDensity

    def at(self, indices: Tensor) -> LocalGuide:
        """The guide at `indices` of these datapoints."""
        return self.posterior.at(self.indices[indices])


def _as_one_datapoint(
    model: Program, guide: Any, data: Given, shared: SharedLatents, estimates: PointEstimates | None
) -> JointDensity:
    """log p(x, z) of the data set, where a guide draws `shared` latents and those of datapoints jointly.

    Raises `SharedLatents` where it does not, with the parts of model and guide, or where there is no guide.
    """
    if guide is None or is_posterior(guide):
        raise shared
    if estimates is not None:
        why = f"the guide sets {', '.join(map(repr, estimates.names))} to values beside latents that datapoints share"
        given = estimates_of(model, guide, data, False)
        return JointDensity(model, data, False, make_whole=True, why=why, estimates=given)
    if data.held:
        return JointDensity(model, data, False, make_whole=True, why="the model holds its data")
    try:
        hierarchy = Hierarchy.of(model, guide, data, shared)
    except Inseparable as reason:
        return JointDensity(model, data, False, make_whole=True, why=str(reason))
    raise shared.split_by(hierarchy) from None


def _extends_model(guide: Any) -> bool:
    """Whether the guide's auxiliary variables are latents of the problem: no local family takes care of them."""
    declared = AmortizedGuide.of(guide)
    return declared.augment is not None and declared.local_family is None


class Simulated(NamedTuple):
    """A problem on simulated data, these data in the form of the caller's, and the latents behind them.

    `z` `(N, dim)` is an exact posterior draw for each datapoint.
    """

    problem: Problem
    data: Any
    z: Tensor

    def __repr__(self) -> str:
        return f"Simulated({counted(len(self.z), 'datapoint')}, {counted(self.z.shape[-1], 'latent dimension')})"
