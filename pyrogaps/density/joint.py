"""`JointDensity`: a Pyro model as a density over one flat unconstrained vector per datapoint."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyrogaps.density.contraction import BoundedStates, TooManyStates, too_many
from pyrogaps.density.data import Data, HeldData, IndexedData, check_indices
from pyrogaps.density.discrete import Discrete
from pyrogaps.density.enumeration import Enumerate
from pyrogaps.density.estimates import PointEstimates
from pyrogaps.density.forms import Given, as_given, check_present, held, whole
from pyrogaps.density.given import given
from pyrogaps.density.layout import Site
from pyrogaps.density.particles import Particles, mapped_rows, one_by_one_note, seconds_of
from pyrogaps.density.plates import whole_plates
from pyrogaps.density.reading import ANY_PLATE, ModelStructure, finite_arguments, read_model
from pyrogaps.density.rows import PAD_REMEDY, probe_rows, rows_are_independent, same_density
from pyrogaps.density.runs import Program, RandomProgram, check_callable, evaluating
from pyrogaps.density.score import ScoreModel, first_dim, stack_runs
from pyrogaps.density.states import DrawStates, SetStates, random_states
from pyrogaps.density.structure import check_parameters, refuse_other_shapes, sample_sites
from pyrogaps.density.supports import bijection
from pyrogaps.errors import InputError
from pyrogaps.guard import ProgramError, failures_named, guarded, warn
from pyrogaps.settings import Count, Plate, checked, conform
from pyrogaps.streams import seeded

BROADCAST_REMEDY = (
    "An enumerated value has a dimension of its own left of all plates: use operations that broadcast it and act on "
    "the last dimensions only, pyro.ops.indexing.Vindex to index by it, and pyro.markov(history=) as long as a chain "
    "looks back"
)
NUM_STATES = 3  # states of discrete latents at which their enumeration is checked
# Ways to evaluate particles together, as they are tried.
TOGETHER: tuple[Particles, ...] = ("broadcast", "mapped", "mapped buffers")


class Probe(NamedTuple):
    """Points `z` `(R, dim)` at datapoints `indices` `(R,)`, the latent sites' values and log p(x, z) `(R,)` there."""

    indices: Tensor
    z: Tensor
    values: dict[str, Tensor]
    log_density: Tensor


class JointDensity:
    r"""log p(x_n, z) of a Pyro model, one datapoint n of the data plate at a time.

    Latent sites are moved to unconstrained space with `biject_to` (log-Jacobian included), flattened and concatenated
    to a vector of length `dim`:

    $$\log p(x_n, z) = \sum_{\text{sites}} \log p(\cdot) + \log |\partial \text{sites} / \partial z| \;\text{[nats]}$$

    Discrete latents y are summed out exactly, $\log p(x_n, z) = \log \sum_y p(x_n, y, z)$, and have no columns in `z`;
    `infer={"enumerate": ...}` is not needed. See `enumeration`.

    Args:
        model: a Pyro model, called with the positional arguments that `data` gives.
        data: what the model is called with. A tensor, an array, a DataFrame or a list of numbers is one argument; a
            tuple or a list holds several. A dictionary whose keys are the model's parameters fills these, another is
            one argument. A `Dataset`, or that of a `DataLoader`, gives items of these forms. The first axis of all
            tensors is the data plate; numbers, flags and None belong to all datapoints. None or `()` is for a model
            that holds its data. Anything else fits in an `IndexedData`.
        plate: the data plate's name. None finds it: the one plate that encloses every observed site and some latent.
            False, or a model without any plate or latents in such a plate, makes the whole data set one datapoint
            (N = 1).
        make_whole: with `plate=False`, use the full size of subsampled plates, which are refused otherwise.
        drawn: discrete sites that have columns in `z`, because a guide draws them: the numbers of their states, in the
            order of `enumerate_support`.
        estimates: latents that are given; `model` and `data` are the caller's own.
        why: why the whole data set is one datapoint, for `remarks`, where that was not asked for.
        structure: that of a density of the same model on data of the same form; the model is not read again.

    Raises:
        InputError: naming the site, plate or argument, where the density per datapoint is not defined or not
            supported (a latent outside the data plate, a discrete latent with too many states, a hard-coded plate
            size, data outside the likelihood's support, NaN in data or parameters, ...).

    Example:
        >>> import torch, pyrogaps as pg
        >>> from pyrogaps.guides.amortized import AmortizedNormal
        >>> from pyrogaps.models.linear_gaussian import LinearGaussian
        >>> model, guide, x = LinearGaussian.random(4, 2), AmortizedNormal(4, 2, (8,)), torch.randn(6, 4)
        >>> joint = pg.JointDensity(model, x)
        >>> joint(torch.zeros(10, 6, 2), torch.arange(6)).shape
        torch.Size([10, 6])
    """

    @guarded
    @checked()
    def __init__(
        self,
        model: Program,
        data: Data | Given | None,
        plate: Plate = None,
        *,
        make_whole: bool = False,
        drawn: tuple[str, ...] = (),
        estimates: PointEstimates | None = None,
        why: str = "",
        structure: ModelStructure | None = None,
    ) -> None:
        check_callable(model, "model")
        check_present(model, data, "Pass the data that the model is called with")
        passed = as_given(data, model)
        if estimates is not None:
            model, passed = estimates.conditioned(model), estimates.beside(passed)
        self.model, self.passed = model, passed
        if structure is None:
            check_parameters(model)
            with seeded(0, "structure"), evaluating(model), pyro.validation_enabled(True), passed.misread_named():
                read = read_model(model, passed, plate, make_whole=make_whole, drawn=drawn, why=why)
            self.structure = replace(read, estimates=estimates)
        else:
            self.structure = structure
        number = self.structure.num_held if passed.held else None
        if self.plate is None:
            self.data = whole(passed)
        else:
            self.data = passed.indexed() if number is None else held(passed, number)
        if structure is None:
            with seeded(0, "structure"), evaluating(model), torch.no_grad():
                self._check_rows()

    @property
    def plate(self) -> str | None:
        """The data plate's name; None where the whole data set is one datapoint."""
        return self.structure.plate

    @property
    def sites(self) -> dict[str, Site]:
        """The continuous latent sites with their layout in `z`."""
        return self.structure.sites

    @property
    def enumerated(self) -> dict[str, Discrete]:
        """The discrete latent sites, which are summed out."""
        return self.structure.enumerated

    @property
    def dim(self) -> int:
        """The length of `z`."""
        return self.structure.dim

    @property
    def dtype(self) -> torch.dtype:
        return self.structure.dtype

    @property
    def device(self) -> torch.device:
        return self.structure.device

    @property
    def observed(self) -> tuple[str, ...]:
        """Names of the observed sites."""
        return self.structure.observed

    @property
    def unnormalised(self) -> tuple[str, ...]:
        """Observed sites with values outside their support, which the model does not validate."""
        return self.structure.unnormalised

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the density is of, and what of the model is left out of it, in short sentences."""
        of = () if self.structure.estimates is None else self.structure.estimates.remarks
        return *of, *self.structure.remarks

    @property
    def num_datapoints(self) -> int:
        """N, the number of datapoints."""
        return self.data.num_datapoints

    @guarded
    def __call__(self, z: Tensor, indices: Tensor | None = None) -> Tensor:
        """log p(x_n, z_sn) in nats, shape `(S, N)`, for unconstrained `z` `(S, N, dim)` of `indices` (default: all)."""
        return self._run_at(z, indices).log_joint.reshape(z.shape[:2])

    @guarded
    def terms(self, z: Tensor, indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""log p(z_sn) (in unconstrained space) and log p(x_n | z_sn), each `(S, N)`.

        Discrete latents are summed out of both: $p(z) = \sum_y p(y, z)$ and $p(x | z) = \sum_y p(x, y, z) / p(z)$.
        """
        log_prior, log_likelihood = self._run_at(z, indices).terms
        return log_prior.reshape(z.shape[:2]), log_likelihood.reshape(z.shape[:2])

    def _run_at(self, z: Tensor, indices: Tensor | None) -> ScoreModel:
        indices = self._indices(indices)
        check_points(z, len(indices), self.dim)
        with evaluating(self.model):
            return self.run(z.flatten(0, 1), self.fetch(indices, len(z)), indices.repeat(len(z)))

    def fetch(self, indices: Tensor, num_particles: int = 1) -> tuple[Any, ...]:
        """The model's arguments for `indices`, which are repeated as a whole `num_particles` times."""
        return finite_arguments(self.data.fetch(indices.repeat(num_particles) if self.plate is not None else indices))

    @property
    def num_given(self) -> int:
        """How many of the model's last arguments are values of given latents, and not the caller's."""
        return 0 if self.structure.estimates is None else len(self.structure.estimates.values)

    def given(self, guide: Program, args: tuple[Any, ...]) -> tuple[Program, tuple[Any, ...]]:
        """A guide without the latents that are given, and its arguments, from those of `model`."""
        if self.structure.estimates is None:
            return guide, args
        own, values = self.structure.estimates.split(args)
        return given(guide, values), own

    def score(self, flat: Tensor, args: tuple[Any, ...], indices: Tensor) -> tuple[Tensor, Tensor]:
        """`terms` for rows: `flat` `(R, dim)` and the arguments of those R rows give two tensors `(R,)`.

        A pure function of `flat` and the tensors in `args`, for use inside `evaluating(model)`.
        """
        return self.run(flat, args, indices).terms

    def total(self, flat: Tensor, args: tuple[Any, ...], indices: Tensor) -> Tensor:
        """log p(x, z) `(R,)`, the sum of `score`, which need not be computed one by one."""
        return self.run(flat, args, indices).log_joint

    def run(self, flat: Tensor, args: tuple[Any, ...], indices: Tensor) -> ScoreModel:
        """Run the model with `flat` in its latent sites; the handler holds the terms, site values and masks."""
        particles = self.structure.particles
        if self.plate is not None or particles == "broadcast":
            return self._run(flat, args, indices)
        if particles == "one by one" or len(flat) == 1:
            return stack_runs([self._run(row[None], args, indices[:1]) for row in flat])
        return mapped_rows(lambda row: self._run(row, args, indices[:1]), flat, particles)

    def _run(self, flat: Tensor, args: tuple[Any, ...], indices: Tensor) -> ScoreModel:
        return self.scored_by(ScoreModel(flat, self.structure), args, indices)

    def run_at(
        self, flat: Tensor, args: tuple[Any, ...], indices: Tensor, states: dict[str, Tensor]
    ) -> tuple[ScoreModel, SetStates]:
        """Run the model with the discrete latents at the values number `states[name]` `(R, *shape)`: the handler with
        the terms of log p(x, y, z), and the one that put them there. Without a data plate and not `vectorized`, R = 1.
        """
        vectorized = self.plate is not None or self.structure.vectorized
        handler, placed = ScoreModel(flat, self.structure), SetStates(self.enumerated, states, drop_rows=not vectorized)
        with self.plates(indices), handler, placed, failures_named("model"):
            self.model(*args)
        return handler, placed

    def scored_by(self, handler: ScoreModel, args: tuple[Any, ...], indices: Tensor) -> ScoreModel:
        """`handler` after a run of the model inside it, discrete latents enumerated."""
        with self.plates(indices), handler, self.enumeration(), failures_named("model"):
            self.model(*args)
        missing = [name for name in self.sites if name not in handler.values]
        if missing:
            raise InputError(
                f"site '{missing[0]}': the model leaves out this latent site for some inputs. {PAD_REMEDY}"
            )
        return handler

    def plates(self, indices: Tensor) -> AbstractContextManager[None]:
        """A context in which the model's data plate holds the rows of `indices`."""
        plate = ANY_PLATE if self.structure.make_whole else self.plate
        number, rows = self.num_datapoints, indices
        if isinstance(self.data, HeldData):
            number, rows = self.data.size, self.data.rows.to(indices.device)[indices]
        bound = self.structure.bound
        return whole_plates(plate, indices, num_datapoints=number, bound=bound, held=rows if bound else None)

    def enumeration(self) -> AbstractContextManager[Any]:
        """A context in which discrete latents have all their values, inside a `ScoreModel`."""
        if not self.enumerated:
            return nullcontext()
        return Enumerate(self.enumerated, first_dim(self.plate, self.structure.lead))

    @guarded
    def constrain(self, z: Tensor, indices: Tensor | None = None) -> dict[str, Tensor]:
        """The latent sites' values, each `(S, N, *shape)`, of unconstrained `z` `(S, N, dim)`."""
        indices = self._indices(indices)
        check_points(z, len(indices), self.dim)
        with evaluating(self.model), torch.no_grad():
            handler = self.run(z.flatten(0, 1), self.fetch(indices, len(z)), indices.repeat(len(z)))
        result = {}
        for name, value in handler.values.items():
            site = self.sites[name]
            value = value.movedim(site.batch_axis - site.event_dim, 0)
            padded = 1 if self.plate is not None else value.dim() - site.batch_dims - site.event_dim
            result[name] = value.reshape(*z.shape[:2], *value.shape[padded:])
        return result

    @guarded
    def active(self, indices: Tensor) -> Tensor | None:
        """Which coordinates are not masked out, `(B, dim)`; None if the model masks no latent."""
        if not self.structure.masked:
            return None
        flat = self.zeros(len(indices))
        with evaluating(self.model), torch.no_grad():
            handler = self.run(flat, self.fetch(indices), indices)
        columns = []
        for name, site in self.sites.items():
            mask, shape = handler.masks[name], site.unflatten(flat).shape
            mask = torch.ones((), dtype=torch.bool, device=flat.device) if mask is None else mask
            columns.append(site.flatten(mask.expand(shape)))
        return torch.cat(columns, -1)

    def zeros(self, rows: int) -> Tensor:
        """The origin of unconstrained space, `(rows, dim)`, in the model's dtype and on its device."""
        return torch.zeros(rows, self.dim, dtype=self.dtype, device=self.device)

    def _points(self, rows: int) -> Tensor:
        """Random points about the origin, with random states of discrete sites: `(rows, dim)`."""
        z = (0.5 * torch.randn(rows, self.dim, dtype=self.dtype)).to(self.device)
        for name in self.structure.drawn:
            site = self.sites[name]
            z[:, site.columns] = torch.randint(site.num_states, (rows, site.size)).to(z)
        return z

    @guarded
    def sample_prior(self, num_particles: int, indices: Tensor | None = None) -> Tensor:
        """Draws of z from the model's latent sites (given earlier observed ones), `(S, N, dim)`, unconstrained."""
        num_particles, indices = conform("num_particles", Count, num_particles), self._indices(indices)
        with evaluating(self.model), torch.no_grad():
            if self.plate is None:
                args = self.fetch(indices)
                return torch.stack([self._draw(args, indices) for _ in range(num_particles)])
            flat = self._draw(self.fetch(indices, num_particles), indices.repeat(num_particles))
        return flat.reshape(num_particles, len(indices), self.dim)

    def _draw(self, args: tuple[Any, ...], indices: Tensor) -> Tensor:
        with self.plates(indices), DrawStates(self.enumerated):
            messages = sample_sites(self.model, args)
        return self.flatten({name: messages[name] for name in self.sites}, len(indices))

    def flatten(self, messages: dict[str, Any], rows: int) -> Tensor:
        """Unconstrained rows `(R, dim)` of drawn latent sites (`messages` of a trace, in layout order)."""
        columns = []
        for name, message in messages.items():
            unconstrained = bijection(message["fn"], name).inv(message["value"])
            site = self.sites[name]
            if self.plate is None:
                columns.append(unconstrained.reshape(1, -1))
            else:
                columns.append(site.flatten(unconstrained))
        return torch.cat(columns, -1) if columns else self.zeros(rows)

    def columns_of(self, z: Tensor, other: "JointDensity") -> Tensor:
        """The columns of `z` `(*, dim)` that belong to the sites of `other`, in its order."""
        columns = [z[..., self.sites[name].columns] for name in other.sites]
        return torch.cat(columns, -1) if columns else z[..., :0]

    def over(self, data: IndexedData) -> "JointDensity":
        """The same density over other data of the same form; runs no program and repeats no check."""
        return JointDensity(self.model, data, structure=self.structure)

    def one_by_one(self) -> "JointDensity":
        """The same density; without a plate, particles are evaluated one after the other."""
        return self._evaluating("one by one")

    def _indices(self, indices: Tensor | None) -> Tensor:
        if indices is None:
            return torch.arange(self.num_datapoints)
        check_indices(indices)
        return indices

    @cached_property
    def probe(self) -> "Probe":
        """Points at some datapoints, for checks of the model and of guides; masked coordinates are zero."""
        with evaluating(self.model):
            return self._probed()

    def _probed(self) -> "Probe":
        with seeded(0, "probe"), torch.no_grad():
            indices = torch.zeros(1, dtype=torch.long) if self.plate is None else probe_rows(self.num_datapoints)
            z = self._points(len(indices))
            active = self.active(indices)
            z = z if active is None else torch.where(active, z, torch.zeros_like(z))
            handler = self.run(z, self.fetch(indices), indices)
        return Probe(indices, z, handler.values, handler.log_joint)

    def _check_rows(self) -> None:
        """Check that a row's density does not depend on its position or on other rows."""
        if self.enumerated:
            (self if self.plate is not None else self.one_by_one())._check_enumeration()
        if self.plate is None:
            self._choose_particles()
            return
        # Not in a block of its own: parameters that the model draws at its first run would not be those of the next.
        self.probe = probe = self._probed()
        indices, z, together = probe.indices, probe.z, probe.log_density
        if not rows_are_independent(lambda rows: self._total(z[rows], indices[rows]), together):
            self._refuse_random(indices, lambda: self._total(z, indices), together)
            with self.plates(indices):
                refuse_other_shapes(sample_sites(self.model, self.fetch(indices)))
            raise InputError(
                "data: the density of a datapoint changes with its position or with other rows of the batch. "
                "fetch(indices) must keep the order, and the model must treat rows independently: no batch "
                "statistics, and no sizes read from values, such as F.one_hot(k) without num_classes"
            )

    def _check_enumeration(self) -> None:
        """Check that the model runs with discrete latents enumerated, and computes what it does at single states."""
        indices = torch.zeros(1, dtype=torch.long) if self.plate is None else probe_rows(self.num_datapoints)
        args, z = self.fetch(indices), 0.5 * torch.randn(len(indices), self.dim, dtype=self.dtype, device=self.device)
        try:
            enumerated = self._run_bounded(z, args, indices)
        except TooManyStates as error:
            raise too_many([*self.enumerated], error.elements, z.element_size()) from None
        except ProgramError as error:
            raise InputError(f"{error}. It failed with discrete latents enumerated. {BROADCAST_REMEDY}") from error
        for _ in range(NUM_STATES):
            alone, placed = self.run_at(z, args, indices, random_states(self.enumerated, len(indices)))
            if not same_density(enumerated.log_joint_at(placed.positions), alone.log_joint):
                raise InputError(
                    f"site '{next(iter(self.enumerated))}': with discrete latents enumerated the model has another "
                    f"density than at their single values. {BROADCAST_REMEDY}"
                )

    def _run_bounded(self, z: Tensor, args: tuple[Any, ...], indices: Tensor) -> ScoreModel:
        """`_run`, with a bound on the size of tensors."""
        try:
            with BoundedStates(len(indices)):
                return self._run(z, args, indices)
        except RuntimeError:  # of the program, in an operation that was called by the bound
            return self._run(z, args, indices)

    def _refuse_random(self, indices: Tensor, total: Callable[[], Tensor], before: Tensor) -> None:
        """Refuse data that are random, and a model that is: `total` at the datapoints `indices` is no longer `before`.

        Nothing is refused where it is.
        """
        first = tree_leaves(self.fetch(indices))
        self.fetch(indices[:1])  # a data set that is fetched by index keeps its last batch
        pairs = zip(first, tree_leaves(self.fetch(indices)), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor)):
            raise InputError(
                "data: the same datapoints changed between two calls, so they are random (a random transform, say). "
                "Draw them once: pass [data[i] for i in range(len(data))] of a Dataset, or "
                "data.fetch(torch.arange(len(data))) of an IndexedData"
            )
        if not torch.equal(total(), before):
            raise RandomProgram(
                "model: it is random beyond its sample sites: log p(x, z) of one point changed between two identical "
                "calls. Switch dropout off in evaluation mode (F.dropout(x, p, training=self.training)), and draw "
                "other noise with pyro.sample"
            )

    def _total(self, z: Tensor, indices: Tensor) -> Tensor:
        return self.total(z, self.fetch(indices), indices)

    def _choose_particles(self) -> None:
        """Without a data plate, evaluate particles together only if the result equals one run per particle."""
        indices, z = torch.zeros(3, dtype=torch.long), self._points(3)
        args = self.fetch(indices[:1])
        alone, reason = self._evaluating("one by one"), None
        expected = _with_slopes(alone, z, args, indices)
        if not same_density(again := alone.total(z[:1], args, indices[:1]), expected[:1]):
            self._refuse_random(indices[:1], lambda: expected[:1], again)
        for particles in TOGETHER:
            try:
                together = _with_slopes(self._evaluating(particles), z, args, indices)
            except Exception as error:
                reason = error
                continue
            if same_density(together, expected):
                self.structure = replace(self.structure, particles=particles)
                return
            reason = None
        self.structure = alone.structure
        note = one_by_one_note(seconds_of(lambda: alone.total(z[:1], args, indices)), reason)
        if note is not None:
            warn(note)

    def _evaluating(self, particles: Particles) -> "JointDensity":
        return JointDensity(self.model, self.passed, structure=replace(self.structure, particles=particles))


def check_points(z: Any, number: int, dim: int) -> None:
    """Refuse what is not a point in unconstrained space, or several, for each of `number` datapoints."""
    right = isinstance(z, Tensor) and z.is_floating_point()
    if not right or z.dim() != 3 or z.shape[1:] != (number, dim):
        got = str(tuple(z.shape)) if right else f"{z.dtype}" if isinstance(z, Tensor) else f"a {type(z).__name__}"
        raise InputError(
            f"z: expected shape (S, {number}, {dim}), got {got}. Pass draws in unconstrained space, as "
            "sample_prior(S, indices) returns them, with the indices of their datapoints"
        )


def _with_slopes(joint: JointDensity, z: Tensor, args: tuple[Any, ...], indices: Tensor) -> Tensor:
    """log p(x, z) `(R,)` and its gradients, flat; zeros where it cannot be differentiated."""
    slopes = torch.zeros_like(z)
    with torch.enable_grad():
        point = z.detach().requires_grad_()
        values = joint.total(point, args, indices)
        with suppress(RuntimeError):
            (slopes,) = torch.autograd.grad(values.sum(), point)
    return torch.cat([values.detach(), slopes.flatten()])
