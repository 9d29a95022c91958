"""`read_model`: the structure of a model, checked for every datapoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyrogaps.density.data import HeldData, IndexedData, check_tensor
from pyrogaps.density.discrete import Discrete, is_discrete, read_discrete
from pyrogaps.density.estimates import PointEstimates
from pyrogaps.density.forms import Given, held, whole
from pyrogaps.density.layout import Site, plate_dim
from pyrogaps.density.particles import Particles
from pyrogaps.density.plates import BoundPlate, WrongSize, steady_plates, whole_plates
from pyrogaps.density.remarks import Scales, declared, joined, on_modes, on_one_datapoint, on_scales, scales_of
from pyrogaps.density.rows import CHECK_ROWS, PAD_REMEDY
from pyrogaps.density.runs import Program
from pyrogaps.density.shared import check_shared, data_plate
from pyrogaps.density.structure import (
    batch_dims,
    check_finite,
    check_model_sites,
    check_observed,
    first_sites,
    frames_of,
    is_factor,
    is_masked,
    latent_sites,
    lay_out,
    sample_sites,
)
from pyrogaps.errors import InputError
from pyrogaps.guard import ProgramError
from pyrogaps.settings import Plate

MISSING_REMEDY = (
    "Remove these datapoints or impute the values, or mask them: pass x.where(seen, 0.0) and seen = x.isfinite(), and "
    "give the distribution of the site .mask(seen), before any .to_event"
)
# The plate name where there is no data plate and every plate has its full size.
ANY_PLATE = ""


@dataclass(frozen=True)
class ModelStructure:
    """Structure of a model, read once; it holds for other data of the same form.

    Attributes:
        plate: the data plate's name; None where the whole data set is one datapoint.
        sites: the continuous latent sites, and those `drawn`, with their layout in a flat vector.
        enumerated: the other discrete latent sites, by name, which are summed out and have no columns.
        observed: names of the observed sites.
        unnormalised: observed sites with values outside their support, which the model does not validate.
        bound: whether the data plate has the data set's full size.
        masked: whether some latents are masked.
        dtype, device: of the latents.
        lead: the first batch dimension (negative) left of all plates: without a data plate that of the rows.
        particles: without a data plate, how many particles are evaluated.
        unplated: whether nobody asked for one datapoint: the model has no plate.
        make_whole: without a data plate, whether subsampled plates get their full size rather than being refused.
        remarks: what of the model is left out of the density, in short sentences.
        estimates: latents that are given, see `PointEstimates`.
        num_held: number of datapoints that the model holds itself; None where the data have them.
        drawn: names of the discrete latents that a guide draws. Their columns hold numbers of states.
    """

    plate: str | None
    sites: dict[str, Site]
    observed: tuple[str, ...]
    unnormalised: tuple[str, ...]
    bound: bool
    masked: bool
    dtype: torch.dtype
    device: torch.device
    lead: int
    enumerated: dict[str, Discrete] = field(default_factory=dict)
    particles: Particles = "broadcast"
    unplated: bool = False
    make_whole: bool = False
    remarks: tuple[str, ...] = ()
    estimates: PointEstimates | None = None
    num_held: int | None = None
    drawn: tuple[str, ...] = ()

    @property
    def vectorized(self) -> bool:
        """Whether the model's own operations broadcast over particles, or over the rows of its data plate."""
        return self.particles == "broadcast"

    @property
    def dim(self) -> int:
        """The length of the flat vector."""
        return sum(site.size for site in self.sites.values())


def read_model(
    model: Program, data: Given, plate: Plate, *, make_whole: bool = False, drawn: tuple[str, ...] = (), why: str = ""
) -> ModelStructure:
    """Read a model's structure; all batches of datapoints must share it. `why` says why the data are one datapoint.

    Raises `InputError` naming the site, plate or argument; see `JointDensity`.
    """
    read = None
    if data.held and plate is not False:
        name, indexed, found = _held_data(model, data, plate)
    else:
        name, read, found = (plate or None, None, "") if plate is not None else _find_plate(model, data.indexed())
        indexed = whole(data) if name is None else data.indexed()
    why, make_whole = why or found, make_whole or bool(found)
    number, is_held = indexed.num_datapoints, isinstance(indexed, HeldData)
    batches = [torch.tensor([0])]
    if name is not None:
        batches = [first_rows(number), *torch.arange(number).split(CHECK_ROWS)]
    bound: bool | None = True if is_held else None
    layout: dict[str, Site] | None = None
    discrete: dict[str, Discrete] = {}
    unnormalised: set[str] = set()
    masked = False
    scales: Scales = {}
    for batch in batches:
        args = finite_arguments(indexed.fetch(batch))
        if isinstance(indexed, HeldData):
            sites = _held_sites(model, args, indexed, batch, str(name))
        elif read is None:
            sites, bound = model_sites(model, args, batch, ANY_PLATE if make_whole else name, number, bound)
        else:
            sites, bound, read = read, False, None
        if name is not None and name not in (names := frames_of(sites)):
            raise _no_such_plate(name, names)
        if name is not None and (reason := check_shared(sites, name)):
            return read_model(model, data, False, make_whole=True, drawn=drawn, why=reason)
        check_model_sites(sites, name)
        observed = {site: message for site, message in sites.items() if message["is_observed"]}
        latent = {site: m for site, m in latent_sites(sites).items() if site in drawn or not is_discrete(m["fn"])}
        unnormalised |= {site for site, message in observed.items() if not check_observed(site, message)}
        scales = joined([scales, scales_of(sites)])
        masked |= any(is_masked(message) for message in latent.values())
        nesting = max((-f.dim for m in sites.values() for f in m["cond_indep_stack"] if f.vectorized), default=0)
        lead = -1 - max(nesting, batch_dims(sites))
        batch_layout = lay_out(sites, name, lead, drawn)
        batch_discrete = {
            site: read_discrete(site, message, name, lead)
            for site, message in sites.items()
            if not message["is_observed"] and site not in drawn and is_discrete(message["fn"])
        }
        if layout is not None and (batch_layout != layout or batch_discrete != discrete):
            raise _differing({**layout, **discrete}, {**batch_layout, **batch_discrete})
        layout, discrete = batch_layout, batch_discrete
    assert layout is not None
    value = _like([*latent.values(), *observed.values()])
    return ModelStructure(
        plate=name,
        sites=layout,
        observed=tuple(observed),
        unnormalised=tuple(sorted(unnormalised)),
        bound=bool(bound),
        masked=masked,
        dtype=value.dtype,
        device=value.device,
        lead=lead,
        enumerated=discrete,
        unplated=plate is None and name is None and not why,
        make_whole=make_whole,
        remarks=(*on_one_datapoint(why), *declared(model), *on_scales(scales, "model"), *on_modes(model, "model")),
        num_held=number if is_held else None,
        drawn=drawn,
    )


def _like(sites: list[Any]) -> Tensor:
    """A tensor whose dtype and device the latents have: the first value of a site that is not of whole numbers."""
    values: list[Tensor] = [site["value"] for site in sites]
    first = next((value for value in values if value.is_floating_point()), None)
    return values[0].to(torch.get_default_dtype()) if first is None else first


def _differing(layout: Mapping[str, Site | Discrete], other: Mapping[str, Site | Discrete]) -> InputError:
    """The error for latent sites that differ between batches of datapoints."""
    if some := [name for name in {**layout, **other} if (name in layout) != (name in other)]:
        return InputError(
            f"site '{some[0]}': the model has this latent site only for some datapoints. Keep it for all of them, and "
            "mask it where it is not used"
        )
    for name, site in layout.items():
        if site.shape != other[name].shape or (isinstance(site, Discrete) and site != other[name]):
            return InputError(f"site '{name}': the shape of this latent differs between datapoints. {PAD_REMEDY}")
    return InputError("model: the order of its latent sites differs between datapoints. Keep one order for all inputs")


def finite_arguments(args: tuple[Any, ...], what: str = "data") -> tuple[Any, ...]:
    """The model's arguments; raises `InputError` where they hold NaN, or tensors that have no plain numbers."""
    leaves = [(f"argument {position}", leaf) for position, value in enumerate(args) for leaf in tree_leaves(value)]
    for name, leaf in leaves:
        if isinstance(leaf, Tensor):
            check_tensor(leaf, name)
    check_finite(leaves, what, MISSING_REMEDY)
    return args


def first_rows(number: int) -> Tensor:
    """A few rows, first and last datapoints among them; never as many as there are datapoints, so that a hard-coded
    plate size shows.
    """
    return torch.tensor([number - 1, 0, 0] + [0] * (number == 3))


def find_data_plate(model: Program, data: IndexedData) -> str | None:
    """The data plate's name; None where there is none."""
    return _find_plate(model, data)[0]


def _find_plate(model: Program, data: IndexedData) -> tuple[str | None, dict[str, Any] | None, str]:
    """The data plate's name, the model's sites at the first rows where they need not be read again, and why the whole
    data set is one datapoint, where a model with plates has no data plate.
    """
    number = data.num_datapoints
    # A program with hard-coded sizes fails on a few rows; it is refused later.
    for rows in (first_rows(number), torch.arange(number)):
        with steady_plates():
            sites, error = first_sites(model, finite_arguments(data.fetch(rows)))
        if error is None:
            break
    else:
        raise error or AssertionError
    latent_sites(sites)  # before a remedy that would not help without them
    name, why = data_plate(sites)
    frames = [frame for site in sites.values() for frame in site["cond_indep_stack"]]
    # Any other plate than one of these rows is made the data plate's by a run of its own.
    as_they_are = all(frame.size == frame.full_size for frame in frames)
    of_rows = all(frame.size == len(rows) != number for frame in frames if frame.name == name)
    return name, sites if as_they_are and of_rows and name is not None else None, why


def _held_data(model: Program, data: Given, plate: str | None) -> tuple[str | None, IndexedData, str]:
    """As `_find_plate` of a model that holds its data, with the datapoints, which are all of them without a plate."""
    with steady_plates():
        sites = sample_sites(model, data.everything())
    latent_sites(sites)
    name, why = data_plate(sites) if plate is None else (plate, "")
    sizes = [f.full_size for site in sites.values() for f in site["cond_indep_stack"] if f.name == name]
    if plate is not None and not sizes:
        raise _no_such_plate(plate, frames_of(sites))
    return name, held(data, sizes[0]) if sizes else whole(data), why


def _held_sites(model: Program, args: tuple[Any, ...], data: HeldData, batch: Tensor, plate: str) -> dict[str, Any]:
    """The sites at some of the datapoints that the model holds; refuses a model that takes all of them every time."""
    try:
        with whole_plates(plate, data.rows[batch], num_datapoints=data.size, bound=True):
            sites = sample_sites(model, args)
    except ProgramError as error:
        raise _takes_all(plate, data.size, str(error)) from error
    for name, site in sites.items():
        dim = plate_dim(site, plate)
        event = 0 if is_factor(site["fn"]) else site["fn"].event_dim
        if dim is not None and site["is_observed"] and site["value"].shape[dim - event :][:1] != (len(batch),):
            raise _takes_all(plate, data.size, f"site '{name}' has values for other datapoints too")
    return sites


def _takes_all(plate: str, size: int, reason: str) -> InputError:
    return InputError(
        f"model: it holds its data itself, and does not run on some of its datapoints ({reason}). Select them by the "
        f"plate's indices, as in: with pyro.plate('{plate}', {size}) as rows: ... obs=x[rows]; or make the data an "
        "argument, or pass plate=False to treat the whole data set as one datapoint"
    )


def _no_such_plate(plate: str, names: set[str]) -> InputError:
    known = f"its plates are {', '.join(sorted(names))}" if names else "it has none"
    return InputError(f"plate: the model has no plate named '{plate}' ({known})")


def model_sites(
    model: Program, args: tuple[Any, ...], batch: Tensor, plate: str | None, number: int, bound: bool | None
) -> tuple[dict[str, Any], bool]:
    """The model's sites on a batch, and whether its data plate has the data set's full size (None: not known)."""
    try:
        with whole_plates(plate, batch, num_datapoints=number, bound=bound):
            return sample_sites(model, args), bool(bound)
    except BoundPlate as refusal:
        if not refusal.subsampled:
            raise WrongSize(str(plate), number, len(batch), number) from None
        return model_sites(model, args, batch, plate, number, True)
