"""`GuideDensity`: a Pyro guide as a density over the model's flat unconstrained vectors."""

from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyrogaps.density.arguments import check_same_order
from pyrogaps.density.autoguides import check_autoguide, is_autoguide, supports_at
from pyrogaps.density.bijective import BijectiveGuide, BijectiveMap
from pyrogaps.density.carried import carried, drawn, on_carried
from pyrogaps.density.data import Data, check_indices
from pyrogaps.density.forms import Given
from pyrogaps.density.given import original
from pyrogaps.density.joint import JointDensity, check_points
from pyrogaps.density.local import (
    Draws,
    FactorisedGuide,
    GuideSite,
    LocalGuide,
    PlaceValues,
    join_terms,
    no_inverse,
    score_term,
    scores_all,
)
from pyrogaps.density.mapped import MappedGuide, affine_map
from pyrogaps.density.plates import BoundPlate, whole_plates
from pyrogaps.density.reading import ANY_PLATE
from pyrogaps.density.remarks import on_modes, on_scales, scales_of
from pyrogaps.density.rows import rows_are_independent, same_density
from pyrogaps.density.runs import Program, RandomProgram, check_callable, evaluating
from pyrogaps.density.score import log_prob
from pyrogaps.density.structure import check_parameters, sample_sites
from pyrogaps.density.terms import Mapped, read_terms
from pyrogaps.errors import InputError, counted
from pyrogaps.guard import ProgramError, guarded
from pyrogaps.settings import Count, Plate, checked, conform
from pyrogaps.streams import seeded

INDEX_REMEDY = (
    "Index parameters that have a row per datapoint: loc[rows], with rows = torch.arange(N) among the data's tensors, "
    "or pyro.param(..., event_dim=0) in a plate with the size of the data set"
)


@dataclass(frozen=True)
class GuideStructure:
    """Structure of a guide, read once.

    Attributes:
        size: number of datapoints in the data set that the guide was made for.
        bound: whether it has parameters for each of these datapoints; None while not known.
        terms: its sites that carry density.
        mapped: where the terms lie in coordinates of the guide's own, the kind of map to the model's; else None.
        factorised: whether its site distributions are known before any draw.
        origin: for a part of the data, the indices of its datapoints in the guide's data set; else None.
        remarks: what of the guide is left out of the density, in short sentences.
    """

    size: int
    bound: bool | None
    terms: tuple[GuideSite, ...] = ()
    mapped: Mapped | None = None
    factorised: bool = False
    origin: Tensor | None = None
    remarks: tuple[str, ...] = ()


class GuideDensity:
    r"""log q(z | x_n) of a Pyro guide in the model's unconstrained space, one datapoint at a time, in nats.

    $$\log q(z \mid x_n) = \sum_{\text{sites}} \log q(\cdot) + \log |\partial \text{sites} / \partial z|$$

    Args:
        guide: a Pyro guide, called with the model's arguments. An initialised autoguide, or a guide whose data plate
            has the data set's full size, has parameters for each datapoint; those of the requested ones are used.
        data: as for `JointDensity`; not needed where `model` is one.
        model: the Pyro model, or its `JointDensity`, which defines the layout of `z`.
        plate: as for `JointDensity`.

    Raises:
        InputError: naming the site, for latents that model and guide do not share, a Delta, discrete sites,
            supports that differ, latents outside the data plate, NaN in parameters.

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> z, log_q = pg.GuideDensity(guide, x, model).at(torch.arange(6)).sample(10)
        >>> z.shape, log_q.shape
        (torch.Size([10, 6, 2]), torch.Size([10, 6]))
    """

    @guarded
    @checked()
    def __init__(
        self,
        guide: Program,
        data: Data | Given | None,
        model: Program | JointDensity,
        plate: Plate = None,
        *,
        structure: GuideStructure | None = None,
    ) -> None:
        self.guide = guide
        if structure is not None and isinstance(model, JointDensity):
            self.joint, self.structure = model, structure
            return
        check_callable(guide, "guide")
        check_parameters(guide)
        if isinstance(model, JointDensity):
            self.joint = model
        else:
            self.joint = JointDensity(model, data, plate)
        check_same_order(guide, self.joint.passed.names)
        check_autoguide(guide, self.joint)
        self.structure = _unread(guide, self.joint)
        with seeded(0, "guide structure"), evaluating(guide, self.joint.model), torch.no_grad():
            # On a number of rows other than the data set's, which reveals a plate of its full size.
            everything = self.first_run(self.joint.probe.indices)
            _check_plates(everything, self.joint)
            left_out, messages = carried(everything, self.joint), drawn(everything)
            terms, mapped = read_terms(messages, self.joint, self._place_at)
            self.structure = replace(self.structure, terms=tuple(terms), mapped=mapped)
            self._check_draws(messages)
            remarks = [*on_scales(scales_of(everything), "guide"), *on_modes(guide, "guide")]
            remarks += on_carried(left_out, self.run_on, self.joint)
            self.structure = replace(self.structure, remarks=tuple(remarks))

    @classmethod
    def unread(cls, guide: Program, joint: JointDensity) -> "GuideDensity":
        """A guide whose sites have not been matched with the model's, for its `first_run` alone."""
        return cls(guide, None, joint, structure=_unread(guide, joint))

    @property
    def bound(self) -> bool:
        """Whether the guide has parameters for each datapoint of its data set."""
        return bool(self.structure.bound)

    @property
    def terms(self) -> list[GuideSite]:
        """The guide's sites that carry density."""
        return [*self.structure.terms]

    @property
    def factorised(self) -> bool:
        """Whether the guide's site distributions are known before any draw, in the model's coordinates."""
        return self.structure.factorised and not self.structure.mapped

    @property
    def remarks(self) -> tuple[str, ...]:
        """What of the guide is left out of the density, in short sentences."""
        return self.structure.remarks

    @property
    def num_datapoints(self) -> int:
        """N, the number of datapoints."""
        return self.joint.num_datapoints

    @guarded
    def at(self, indices: Tensor) -> LocalGuide:
        """The guide at `indices`; run only once where no site distribution depends on earlier draws."""
        own = self._own(indices)
        if not self.structure.mapped:
            return own
        if self.structure.mapped == "bijective":
            return BijectiveGuide(own, BijectiveMap(self._evaluated_at, self.terms, self.joint, indices))
        with evaluating(self.guide):
            return MappedGuide(own, affine_map(partial(self._place_at, self.terms), self.terms, self.joint, indices))

    def _own(self, indices: Tensor) -> LocalGuide:
        """The guide at `indices` in the coordinates of its terms."""
        active = self.joint.active(indices)
        if not self.structure.factorised:
            return SequentialGuide(self, indices, active)
        with evaluating(self.guide):
            return self._factorised(self.messages(indices), indices, active)

    def _factorised(self, messages: dict[str, Any], indices: Tensor, active: Tensor | None) -> FactorisedGuide:
        distributions = {term.name: messages[term.name]["fn"] for term in self.terms}
        return FactorisedGuide(self.joint, indices, self.terms, distributions, active)

    @guarded
    def sample(self, num_particles: int, indices: Tensor | None = None) -> Draws:
        """Draws `z` `(S, N, dim)` and their log q in nats `(S, N)`, for `indices` (default: all datapoints)."""
        num_particles = conform("num_particles", Count, num_particles)
        return self.at(self._indices(indices)).sample(num_particles)

    @guarded
    def log_prob(self, z: Tensor, indices: Tensor | None = None) -> Tensor:
        """log q(z_sn | x_n) in nats `(S, N)` of any points `z` `(S, N, dim)`."""
        indices = self._indices(indices)
        check_points(z, len(indices), self.joint.dim)
        return self._log_prob(z, indices)

    def _log_prob(self, z: Tensor, indices: Tensor) -> Tensor:
        """As `log_prob`; of a guide with auxiliary elements also of its own draws, which include these."""
        return self.at(indices).log_prob(z)

    def _indices(self, indices: Tensor | None) -> Tensor:
        if indices is None:
            return torch.arange(self.num_datapoints)
        check_indices(indices)
        return indices

    def messages(self, indices: Tensor, num_particles: int = 1, handler: Messenger | None = None) -> dict[str, Any]:
        """Run the guide on `indices` repeated `num_particles` times; the sites that it draws by name."""
        return drawn(self._run(indices, num_particles, handler))

    def _run(self, indices: Tensor, num_particles: int = 1, handler: Messenger | None = None) -> dict[str, Any]:
        """As `messages`, with observed sites and factors."""
        guide, args = self.joint.given(self.guide, self.joint.fetch(indices, num_particles))
        rows = indices.repeat(num_particles)
        supports = supports_at(self.guide, self.joint.plate, self._origin(rows))
        with self.plates(rows), supports, handler or nullcontext():
            sites = sample_sites(guide, args, "guide")
        # A messenger runs the model, likelihood too.
        return drawn(sites) if isinstance(original(self.guide), GuideMessenger) else sites

    def plates(self, indices: Tensor) -> AbstractContextManager[None]:
        """A context in which the guide's data plate holds the rows of `indices`."""
        size, bound, rows = self.structure.size, self.structure.bound, self._origin(indices)
        plate = ANY_PLATE if self.joint.structure.make_whole else self.joint.plate
        return whole_plates(plate, rows, num_datapoints=size, bound=bound)

    def _origin(self, indices: Tensor) -> Tensor:
        """`indices` as they are counted in the data set that the guide was made for."""
        return indices if self.structure.origin is None else self.structure.origin[indices]

    def restrict(self, joint: JointDensity, origin: Tensor) -> "GuideDensity":
        """The same guide over `joint`, which holds only the datapoints `origin`, numbered from 0."""
        return GuideDensity(self.guide, None, joint, structure=replace(self.structure, origin=origin))

    def over(self, joint: JointDensity) -> "GuideDensity":
        """The same guide over `joint`, which holds other data of the same form; checks are not repeated.

        Raises `InputError` where the guide has parameters for each datapoint, and `joint` another number of them.
        """
        size = self.structure.size
        if self.bound and joint.num_datapoints != size:
            raise InputError(
                f"guide: it has parameters for {counted(size, 'datapoint')}, but the data have {joint.num_datapoints}. "
                "Use an amortized guide"
            )
        structure = replace(self.structure, origin=None, size=joint.num_datapoints)
        return GuideDensity(self.guide, None, joint, structure=structure)

    def first_run(self, indices: Tensor) -> dict[str, Any]:
        """The guide's sites, after which it is known whether its plate has the data set's full size."""
        try:
            messages = self._run_subset(indices)
        except BoundPlate:
            self.structure = replace(self.structure, bound=True)
            messages = self._run_subset(indices)
        self.structure = replace(self.structure, bound=self.bound)
        return messages

    def _run_subset(self, indices: Tensor) -> dict[str, Any]:
        """The guide's sites on a few rows; refuses a guide that runs only on the whole data set.

        One that makes a plate of the rows at hand around parameters for each datapoint runs with those of the rows.
        """
        try:
            return self.run_on(indices)
        except ProgramError as error:
            if not self._runs_on_all():
                raise
            unbound = self.structure
            if not self.bound and self.joint.plate is not None:
                self.structure = replace(unbound, bound=True)
                with suppress(ProgramError):
                    return self.run_on(indices)
                self.structure = unbound
            raise InputError(
                f"guide: it runs on the whole data set but not on other numbers of its rows ({error}). {INDEX_REMEDY}"
            ) from error

    def _runs_on_all(self) -> bool:
        try:
            self.run_on(torch.arange(self.num_datapoints))
        except ProgramError:
            return False
        return True

    def run_on(self, indices: Tensor) -> dict[str, Any]:
        """`_run`; parameters that the guide makes, perhaps of this size, do not stay for the next run."""
        with evaluating(self.guide):
            return self._run(indices)

    def _place_at(self, terms: list[GuideSite], flat: Tensor, rows: Tensor) -> dict[str, Any]:
        """A run on the datapoints `rows` `(R,)` with `terms` at the points `flat` `(R, dim)`."""
        return self.messages(rows, 1, PlaceValues(terms, flat, self.joint.plate is not None))

    def _evaluated_at(self, flat: Tensor, rows: Tensor) -> dict[str, Any]:
        """As `_place_at` of its own terms, in evaluation mode."""
        with evaluating(self.guide):
            return self._place_at(self.terms, flat, rows)

    def _check_draws(self, first: dict[str, Any]) -> None:
        """Find out whether site distributions depend on earlier draws, by a second run; check that rows do not depend
        on their position or on other rows.
        """
        indices = self.joint.probe.indices  # of all lengths, because later sites may be masked
        if any(not scores_all(first[term.name]["fn"]) for term in self.terms):
            self._check_own_draws(first)
            return
        second = self.messages(indices)
        factorised = all(
            torch.equal(
                *(log_prob(run[term.name]["fn"], first[term.name]["value"], term.name) for run in (first, second))
            )
            for term in self.terms
        )
        # Two runs may draw the same states, and then say nothing of what depends on these.
        factorised = factorised and not any(term.site.num_states for term in self.terms)
        self.structure = replace(self.structure, factorised=factorised and not self._reads_draws())
        if self.joint.plate is None and self.structure.factorised:
            return
        if self.factorised:
            local = self._factorised(second, indices, self.joint.active(indices))
            z = local.sample_extended(1)[0]
            together = local.log_prob(z)[0]
        else:
            z = self.at(indices).sample(1)[0]
            together = self._log_prob(z, indices)[0]

        def log_q(rows: Tensor) -> Tensor:
            return self._log_prob(z[:, rows], indices[rows])[0]

        everything = torch.arange(len(indices))
        alone = self.joint.plate is None
        if not (same_density(log_q(everything), together) if alone else rows_are_independent(log_q, together)):
            if not torch.equal(log_q(everything), log_q(everything)):
                raise RandomProgram(
                    "guide: it is random beyond its sample sites: log q of one draw changed between two identical "
                    "calls. Switch dropout off in evaluation mode (F.dropout(x, p, training=self.training)), and draw "
                    "other noise with pyro.sample"
                )
            raise InputError(
                "guide: log q of a datapoint changes with its position in the batch or with other rows. Treat rows "
                f"independently (no batch statistics). {INDEX_REMEDY}"
            )

    def _reads_draws(self) -> bool:
        """Whether a site distribution is computed from earlier draws, though these may have no effect yet: a network's
        weights may start at zero. True where autograd knows a path from a draw to the log-density of another site.
        """
        if self.structure.mapped or len(self.terms) == 1:
            return False
        indices, z = self.joint.probe.indices, self.joint.probe.z
        with torch.enable_grad():
            point = z.detach().requires_grad_()
            try:
                messages = self.messages(indices, 1, PlaceValues(self.terms, point, self.joint.plate is not None))
            except ProgramError:  # such as z.numpy(): what the run computes is no function that autograd knows
                return False
            sites = [messages[term.name] for term in self.terms]
            total = sum(log_prob(site["fn"], site["value"].detach(), site["name"]).sum() for site in sites)
            if not isinstance(total, Tensor) or not total.requires_grad:
                return False
            (path,) = torch.autograd.grad(total, point, allow_unused=True)
        return path is not None

    def _check_own_draws(self, first: dict[str, Any]) -> None:
        """As `_check_draws`, for a guide that scores its own draws alone: they may not change with other rows."""
        for term in self.terms:
            if len(self.terms) > 1 and not scores_all(fn := first[term.name]["fn"]):
                raise no_inverse(term.name, fn, "with several sites")
        self.structure = replace(self.structure, factorised=True)
        if self.joint.plate is None:
            return
        indices = self.joint.probe.indices
        others = torch.where(torch.arange(len(indices)) % 2 == 0, indices, indices.roll(2))
        pairs = zip(self._drawn(indices), self._drawn(others), strict=True)
        if not all(same_density(before[:, ::2], after[:, ::2]) for before, after in pairs):
            raise InputError("guide: log q of a datapoint changes with other rows. Treat rows independently")

    def _drawn(self, indices: Tensor) -> Draws:
        with seeded(0, "other rows", device=self.joint.device):
            return self.at(indices).sample(1)


def _unread(guide: Program, joint: JointDensity) -> GuideStructure:
    # An autoguide has parameters for each datapoint, whatever the size of its plates.
    return GuideStructure(joint.num_datapoints, True if is_autoguide(guide) and joint.plate is not None else None)


def _check_plates(sites: dict[str, Any], joint: JointDensity) -> None:
    """Refuse a guide with a plate of the data's rows beside a model that has none and so no datapoints."""
    if not joint.structure.unplated or joint.passed.held:
        return
    rows = {len(leaf) for leaf in tree_leaves(joint.passed.everything()) if isinstance(leaf, Tensor) and leaf.dim()}
    frames = [frame for site in sites.values() for frame in site["cond_indep_stack"]]
    name = next((frame.name for frame in frames if frame.full_size in rows - {1}), None)
    if name is not None:
        raise InputError(
            f"plate '{name}': the guide has it and the model has no plate, so the data set would be one datapoint. Put "
            f"the model's sites in `with pyro.plate('{name}', len(x))`, or pass plate=False if you mean one datapoint"
        )


class SequentialGuide:
    """A `LocalGuide` that runs the guide for every draw, because later sites depend on earlier ones."""

    def __init__(self, density: GuideDensity, indices: Tensor, active: Tensor | None) -> None:
        self.density, self.indices, self.joint, self.active = density, indices, density.joint, active

    mean_field = False

    def sample(self, num_particles: int, antithetic: bool = False) -> Draws:
        return self._run(num_particles, None, antithetic)

    def log_prob(self, z: Tensor) -> Tensor:
        return self._run(len(z), z)[1]

    def handler(self, num_particles: int, z: Tensor | None, antithetic: bool) -> Messenger | None:
        """What the guide runs under, with its draws at the rows `z` `(R, dim)`, or None for new draws.

        A subclass may mirror half of these if `antithetic`.
        """
        return None if z is None else PlaceValues(self.density.terms, z, self.joint.plate is not None)

    def _run(self, num_particles: int, z: Tensor | None, antithetic: bool = False) -> Draws:
        """All particles as rows of one run; one at a time where there is no plate."""
        if self.joint.plate is None:
            pairs = [self._run_rows(1, None if z is None else z[s : s + 1]) for s in range(num_particles)]
            return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
        return self._run_rows(num_particles, z, antithetic)

    def _run_rows(self, num_particles: int, z: Tensor | None, antithetic: bool = False) -> Draws:
        handler = self.handler(num_particles, None if z is None else z.reshape(-1, z.shape[-1]), antithetic)
        with evaluating(self.density.guide):
            messages = self.density.messages(self.indices, num_particles, handler)
        return self.scored(num_particles, {name: (site["fn"], site["value"]) for name, site in messages.items()})

    def scored(self, num_particles: int, sites: dict[str, tuple[Any, Tensor]]) -> Draws:
        """Draws and log q of a run, from the distribution and the value of each site."""
        terms, rows = self.density.terms, num_particles * len(self.indices)
        active = None if self.active is None else self.active.repeat(num_particles, 1)
        scored = [
            score_term(t, fn, value[None], active, self.joint.plate is not None, (1, rows))
            for t in terms
            for fn, value in [sites[t.name]]
        ]
        flat, log_q = join_terms(terms, scored, active)
        shape = (num_particles, len(self.indices))
        return flat.reshape(*shape, -1), log_q.reshape(shape)
