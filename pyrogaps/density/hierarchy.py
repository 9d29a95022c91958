"""`Hierarchy`: a model and a guide with latents shared by the datapoints of a plate, taken apart.

The model is p(theta) prod_n p(x_n, z_n | theta), the guide q(theta) prod_n q(z_n | x_n, theta), with theta the latents
outside the data plate. The parts are Pyro programs: those of theta alone, and those of the datapoints given theta. The
values of theta are the last argument of these, so that a recorded density serves all draws.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer.autoguide import AutoGaussian, AutoStructured
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrogaps.density.autoguides import autoguides_in, check_size, latents_in, supports_at
from pyrogaps.density.data import IndexedData
from pyrogaps.density.forms import Given
from pyrogaps.density.guide import GuideDensity
from pyrogaps.density.joint import JointDensity
from pyrogaps.density.layout import leaf
from pyrogaps.density.local import PlaceValues
from pyrogaps.density.plates import BoundPlate, WrongSize, steady_plates, whole_plates
from pyrogaps.density.rows import same_density
from pyrogaps.density.runs import Program, RandomProgram, evaluating
from pyrogaps.density.score import is_bookkeeping
from pyrogaps.density.shared import SharedLatents, is_inside
from pyrogaps.density.structure import check_finite, first_sites, sample_sites
from pyrogaps.errors import InputError
from pyrogaps.guard import ProgramError
from pyrogaps.streams import Stream, seeded

# Stands for the data in the model of theta alone.
LIKELIHOOD = "_data"
NOTHING = torch.zeros(1)


class Inseparable(InputError):
    """A model and a guide that are not of the form of a `Hierarchy`: why the data set is one datapoint."""


class SharedDraws(NamedTuple):
    """Draws of theta from the guide: values by site for each, those of the guide's own sites included, and
    log p(theta) - log q(theta) `(M,)` in nats.
    """

    values: list[dict[str, Tensor]]
    log_ratio: Tensor


@dataclass(frozen=True)
class Hierarchy:
    """A model and a guide, taken apart: theta, and the datapoints given theta.

    Attributes:
        model, guide: of the datapoints given theta. They take the values of theta as their last argument.
        data: the data set, without theta.
        plate: the data plate's name.
        prior: log p(theta), `(S, 1)` in nats, in unconstrained space.
        posterior: log q(theta).
        extra: the guide's sites outside the data plate that are none of the model's.
    """

    model: Program
    guide: Program
    data: IndexedData
    plate: str
    prior: JointDensity
    posterior: GuideDensity
    extra: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The shared latents."""
        return tuple(self.prior.sites)

    @property
    def dim(self) -> int:
        """The dimension of theta in unconstrained space."""
        return self.prior.dim

    @classmethod
    def of(cls, model: Program, guide: Program, data: Given, shared: SharedLatents) -> "Hierarchy":
        """Take a model and a guide apart.

        Raises `Inseparable` where p(theta) or q(theta) depends on the data or on local latents, or the guide draws
        theta and local latents jointly; `InputError` for what `JointDensity` and `GuideDensity` refuse.
        """
        indexed, plate = data.indexed(), shared.plate
        number = indexed.num_datapoints
        _check_full_size(model, indexed, shared)
        _check_guide(guide, indexed, shared)
        alone = [(_Alone(indexed, plate, rows, True), _Alone(indexed, plate, rows, False)) for rows in _rows(number)]
        depends = f"{_named(shared.names)} depends on data or local latents"
        try:
            prior = JointDensity(alone[0][0].of(model), NOTHING, False)
        except RandomProgram as error:  # by the latents that are hidden
            raise Inseparable(f"the model's prior of {depends}") from error
        if enumerated := [name for name in shared.names if name not in prior.sites]:
            raise Inseparable(f"{_named(tuple(enumerated))}, shared by all datapoints, is discrete")
        try:
            posterior = GuideDensity(alone[0][1].of(guide), None, prior)
        except RandomProgram as error:
            raise Inseparable(f"the guide's {depends}") from error
        except ProgramError as error:
            if not _runs(_Alone(indexed, plate, torch.arange(number), False).of(guide)):
                raise
            raise Inseparable("the guide runs only on all datapoints together") from error
        others = JointDensity(alone[1][0].of(model), NOTHING, structure=prior.structure)
        _check_same(prior, prior, others, f"the model's prior of {depends}")
        other = GuideDensity(alone[1][1].of(guide), None, prior, structure=posterior.structure)
        _check_same(prior, posterior.log_prob, other.log_prob, f"the guide's {depends}")
        with seeded(0, "shared sites"), evaluating(guide), torch.no_grad():
            sites = posterior.messages(torch.zeros(1, dtype=torch.long))
        extra = () if posterior.structure.mapped else tuple(name for name in sites if name not in prior.sites)
        return cls(_given(model, plate), _given(guide, plate), indexed, plate, prior, posterior, extra)

    def at(self, values: Mapping[str, Tensor]) -> IndexedData:
        """The data, and the values of theta as the last argument."""
        data, last = self.data, dict(values)
        return IndexedData(data.num_datapoints, lambda indices: (*data.fetch(indices), last))

    def draw(self, number: int, stream: Stream, block: int = 0) -> SharedDraws:
        """`number` draws of theta from the guide, those of `block` of a stream."""
        with stream.seeded(block, device=self.prior.device), evaluating(self.guide), torch.no_grad():
            z, log_q = self.posterior.sample(number)
            log_p = self.prior(z)
            values = self.prior.constrain(z)
            drawn = [(f"its draw of site '{name}'", value) for name, value in values.items()]
            check_finite(drawn, "guide", "Check the parameters that the site's distribution is made of")
            each = [{name: value[s, 0] for name, value in values.items()} for s in range(number)]
            if self.extra:
                each = [{**known, **self._extra(z[s])} for s, known in enumerate(each)]
        return SharedDraws(each, (log_p.double() - log_q.double())[:, 0])

    def _extra(self, flat: Tensor) -> dict[str, Tensor]:
        """The guide's own sites where theta is at `flat` `(1, dim)`."""
        handler = PlaceValues(self.posterior.terms, flat, False)
        messages = self.posterior.messages(torch.zeros(1, dtype=torch.long), 1, handler)
        return {name: messages[name]["value"] for name in self.extra}


@dataclass(frozen=True)
class _Alone:
    """Makes programs of theta alone: those of the whole on the datapoints `rows`, without their local sites."""

    data: IndexedData
    plate: str
    rows: Tensor
    is_model: bool

    def of(self, program: Program) -> Program:
        bound = self._is_bound(program)

        @functools.wraps(program, assigned=(), updated=())
        def alone(unused: Tensor) -> None:
            depth = self._run(program, bound)
            if self.is_model:  # with the dimensions of the hidden plates, left of which many draws of theta are put
                pyro.factor(LIKELIHOOD, torch.zeros((1,) * depth))

        return alone

    def _run(self, program: Program, bound: bool | None) -> int:
        """A run, and how many dimensions the plates of its hidden sites take."""
        number, hidden = self.data.num_datapoints, _Hidden(self.plate, inside=True)
        with (
            whole_plates(self.plate, self.rows, num_datapoints=number, bound=bound),
            supports_at(program, self.plate, self.rows),
            hidden,
        ):
            program(*self.data.fetch(self.rows))
        return hidden.depth

    def _is_bound(self, program: Program) -> bool:
        """Whether the program's data plate has the data set's full size."""
        what, number = "model" if self.is_model else "guide", self.data.num_datapoints
        try:
            with seeded(0, "shared structure"), evaluating(program), torch.no_grad():
                sample_sites(lambda: self._run(program, None), (), what)
        except BoundPlate as refusal:
            if self.is_model and not refusal.subsampled:
                raise WrongSize(self.plate, number, len(self.rows), number) from None
            return True
        except ProgramError:  # raised, or explained, where the program is read
            pass
        return False


class _Hidden(Messenger):
    """Hides the sites inside the data plate from every handler outside, or those that are not; `values` sets some."""

    def __init__(self, plate: str, *, inside: bool, values: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.plate, self.inside, self.values, self.depth = plate, inside, values or {}, 0

    def _pyro_sample(self, message: Any) -> None:
        if is_bookkeeping(message) or is_inside(message, self.plate) is not self.inside:
            return
        if message["name"] in self.values:
            message["value"] = self.values[message["name"]]
            message["done"] = True
        message["stop"] = True
        self.depth = max([self.depth, *(-frame.dim for frame in message["cond_indep_stack"] if frame.vectorized)])


def _given(program: Program, plate: str) -> Program:
    """A program of the datapoints given theta, whose values are its last argument."""

    @functools.wraps(program, assigned=(), updated=())
    def given(*args: Any) -> Any:
        *rest, values = args
        with _Hidden(plate, inside=False, values=values):
            return program(*rest)

    return given


def _check_full_size(model: Program, data: IndexedData, shared: SharedLatents) -> None:
    """Refuse a model whose data plate is larger than the data, which are then not all that share theta."""
    number = data.num_datapoints
    with seeded(0, "shared sites"), evaluating(model), torch.no_grad(), steady_plates():
        sites, _ = first_sites(model, data.fetch(torch.arange(number)))  # a run that fails is explained later
    for site in sites.values():
        for frame in site["cond_indep_stack"]:
            if frame.name == shared.plate and frame.full_size not in (None, number):
                raise InputError(
                    f"plate '{shared.plate}': its size is {frame.full_size:,}, but the data have {number:,} datapoints,"
                    f" and all share {_named(shared.names)}. Give it the size of the data, or pass all data"
                )


def _check_guide(guide: Program, data: IndexedData, shared: SharedLatents) -> None:
    """Raise `Inseparable` for a guide with one distribution over theta and local latents, or without any of these."""
    joint = Inseparable(f"the guide draws {_named(shared.names)} and the latents in plate '{shared.plate}' jointly")
    for part in autoguides_in(guide):
        check_size(part, shared.plate, data.num_datapoints)
        inside, every = latents_in(part, shared.plate)
        if isinstance(part, AutoContinuous | AutoGaussian | AutoStructured) and 0 < len(inside) < len(every):
            raise joint
    rows = torch.arange(data.num_datapoints)
    try:
        with (
            seeded(0, "shared sites"),
            evaluating(guide),
            torch.no_grad(),
            whole_plates(shared.plate, rows, num_datapoints=len(rows), bound=False),
        ):
            sites = sample_sites(guide, data.fetch(rows), "guide")
    except InputError:  # raised, or explained, where the guide is read
        return
    latents = {name: site for name, site in sites.items() if not site["is_observed"]}
    for name in shared.names:
        if name in latents and is_inside(latents[name], shared.plate):
            raise InputError(
                f"site '{name}': inside the data plate '{shared.plate}' in the guide, but outside in the model. Draw "
                "it outside in the guide too"
            )
    drawn = [name for name, site in latents.items() if type(leaf(site["fn"])).__name__ != "Delta"]
    local = [name for name in sites if is_inside(sites[name], shared.plate)]
    if shared.summed_out and not local:  # given theta no gap is left
        raise Inseparable(f"all latents in the plate '{shared.plate}' are discrete and summed out")
    further = [name for name in drawn if name not in shared.names and name not in local]
    if local and further and not set(local) & set(drawn):
        raise joint


def _check_same(prior: JointDensity, first: Any, second: Any, why: str) -> None:
    """Raise `Inseparable` where two densities of theta, of other data and other local draws, differ."""
    z = prior.probe.z[None]
    with torch.no_grad():
        values = []
        for seed, density in ((0, first), (1, first), (2, second)):
            with seeded(seed, "shared latents alone", device=prior.device):
                values.append(density(z))
    if not all(same_density(values[0], value) for value in values[1:]):
        raise Inseparable(why)


def _runs(program: Program) -> bool:
    try:
        with seeded(0, "shared sites"), evaluating(program), torch.no_grad():
            sample_sites(program, (NOTHING,), "guide")
    except InputError:
        return False
    return True


def _rows(number: int) -> tuple[Tensor, Tensor]:
    """A few datapoints, twice; never as many as there are, so that a hard-coded plate size shows."""
    first, second = [number - 1, 0, 0, 0, 0, 0], [0, number // 2, number - 1, 0, 0, 0]
    length = 5 + (number == 5)
    return torch.tensor(first[:length]), torch.tensor(second[:length])


def _named(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))
