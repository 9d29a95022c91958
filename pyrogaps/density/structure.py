"""Read a program's structure from a trace; refuse unsupported programs."""

from collections.abc import Iterable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from torch import Tensor

from pyrogaps.density.discrete import is_discrete
from pyrogaps.density.layout import Site, distribution_mask, leaf, plate_dim
from pyrogaps.density.runs import MisreadData, Program, modules_of
from pyrogaps.density.samplers import ExactDraws
from pyrogaps.density.score import is_bookkeeping
from pyrogaps.density.state_numbers import states_of
from pyrogaps.density.support_words import support_words
from pyrogaps.density.supports import bijection
from pyrogaps.errors import InputError
from pyrogaps.guard import failures_named

NOT_OBSERVED = (
    "model: there is no observed sample site. Pass the data so that obs= is set (were model and guide swapped?)"
)

Message = Any
# The key among a site's `infer` options of a remedy for data outside its support, where the program knows a better one.
OUTSIDE_SUPPORT = "outside_support"


def sample_sites(program: Program, args: tuple[Any, ...], what: str = "model") -> dict[str, Message]:
    """The random variables of one run of `program(*args)`, in program order; `what` names it in errors."""
    try:
        with (
            poutine.trace() as tracer,
            ExactDraws(),
            failures_named(what),
        ):  # poutine.trace(program) would rewrite its errors
            program(*args)
    finally:
        for module in modules_of(program):
            if isinstance(module, EasyGuide):  # it keeps the plates of a run that failed for the next
                module.plates.clear()
    return _random_variables(tracer)


def first_sites(program: Program, args: tuple[Any, ...]) -> tuple[dict[str, Message], InputError | None]:
    """The random variables of a run of the model that may fail, and its exception."""
    with poutine.trace() as tracer, ExactDraws():
        try:
            with failures_named("model"):
                program(*args)
        except InputError as error:
            return _random_variables(tracer), error
    return _random_variables(tracer), None


def _random_variables(tracer: Any) -> dict[str, Message]:
    return {
        name: node for name, node in tracer.trace.nodes.items() if node["type"] == "sample" and not is_bookkeeping(node)
    }


def find_plate(sites: dict[str, Message]) -> str | None:
    """The one plate around every site; None where the model has no plate at all.

    Raises `InputError` where several plates enclose every site, or the model has plates but none does.
    """
    frames = [{frame.name for frame in site["cond_indep_stack"]} for site in sites.values()]
    every = set.union(*frames) if frames else set()
    if not every:
        return None
    common = sorted(set.intersection(*frames))
    if len(common) == 1:
        return str(common[0])
    if common:
        raise InputError(
            f"plate: several plates enclose every site ({', '.join(common)}). Name the data plate with plate="
        )
    outside = [name for name, site in sites.items() if not site["cond_indep_stack"]]
    where = f"; outside any plate: {', '.join(outside)}" if outside else ""
    only = len(every) == 1 and outside
    move = (
        "Move these sites into it, or make them parameters (pyro.param)" if only else "Move every site into one plate"
    )
    raise InputError(
        f"plate: no plate encloses every site (plates: {', '.join(sorted(every))}{where}). {move}, or pass plate=False "
        "to treat the whole data set as one datapoint"
    )


def latent_sites(sites: dict[str, Message]) -> dict[str, Message]:
    """The latent sites of a model; raises `InputError` where there are none, or no observed ones beside them."""
    latent = {name: site for name, site in sites.items() if not site["is_observed"]}
    if not latent:
        raise InputError("model: there is no latent sample site, so there is nothing to infer")
    if len(latent) == len(sites):
        raise InputError(NOT_OBSERVED)
    return latent


def check_model_sites(sites: dict[str, Message], plate: str | None) -> None:
    """Refuse models without latent or observed sites, and sites outside the data plate."""
    latent = latent_sites(sites)
    for name, site in sites.items():
        check_in_plate(name, site, plate, "model")
        _check_mask(name, site)
    for name, site in latent.items():
        if type(leaf(site["fn"])).__name__ == "Delta":
            raise InputError(
                f"site '{name}': a Delta latent in the model has no density. Use pyro.deterministic, or pyro.factor "
                "for its log_density"
            )


def check_in_plate(name: str, site: Message, plate: str | None, program: str) -> None:
    dim = None if plate is None else plate_dim(site, plate)
    if dim is not None and len(site["fn"].batch_shape) < -dim and not is_factor(site["fn"]):
        raise InputError(
            f"site '{name}': the plate '{plate}' around it has no size. Size it by the data, as in "
            f"pyro.plate('{plate}', len(x))"
        )
    if plate is None or dim is not None:
        return
    if any(frame.name == plate for frame in site["cond_indep_stack"]):
        raise InputError(
            f"site '{name}': the {program} loops over the data plate '{plate}'. Use the plate as a context: with "
            f"pyro.plate('{plate}', len(x))"
        )
    kind = "observed" if site["is_observed"] else "latent"
    if kind == "latent" and is_discrete(site["fn"]):
        raise InputError(
            f"site '{name}': a discrete latent outside the data plate '{plate}' in the {program}. Move it inside the "
            "plate, or pass plate=False to sum it out with the whole data set as one datapoint"
        )
    raise InputError(
        f"site '{name}': {kind} outside the data plate '{plate}' in the {program}. Move it inside the plate"
        + ("" if kind == "observed" else ", or make it a parameter (pyro.param)")
    )


def lay_out(sites: dict[str, Message], plate: str | None, lead: int, drawn: tuple[str, ...] = ()) -> dict[str, Site]:
    """Give each latent site that is continuous or `drawn` its columns of the flat vector.

    Without a plate, rows have their own batch dimension `lead` (negative), left of every plate.
    """
    layout: dict[str, Site] = {}
    start = 0
    for name, message in sites.items():
        if message["is_observed"] or (name not in drawn and is_discrete(message["fn"])):
            continue
        fn, value = message["fn"], message["value"]
        unconstrained = bijection(fn, name).inv(value)
        event_dim = fn.event_dim + unconstrained.dim() - value.dim()
        if plate is not None:
            dim = plate_dim(message, plate)
            assert dim is not None
            axis = dim - event_dim
            shape = list(unconstrained.shape)
            del shape[axis]
        else:
            axis = lead - event_dim
            shape = [1] * (-1 - lead - (unconstrained.dim() - event_dim)) + list(unconstrained.shape)
        number = len(states_of(fn, name)) if name in drawn else 0
        site = Site(name, start, tuple(shape), axis, fn.event_dim, event_dim, len(fn.batch_shape), number)
        layout[name] = site
        start += site.size
    return layout


def opted_out_of_validation(fn: Any) -> bool:
    """Whether the user set `validate_args=False` on this distribution or one inside it."""
    while fn is not None:
        if fn.__dict__.get("_validate_args") is False:
            return True
        fn = getattr(fn, "base_dist", None)
    return False


def check_observed(name: str, site: Message) -> bool:
    """Whether the observed value lies in the likelihood's support; False if not, and validation is off.

    Raises `InputError` for a value outside the support of a likelihood that is validated.
    """
    value, fn = site["value"], site["fn"]
    if is_factor(fn):
        return True
    if not isinstance(value, Tensor) or value.is_complex():
        kind = "complex" if isinstance(value, Tensor) else f"of type {type(value).__name__}"
        raise MisreadData(
            f"site '{name}': its observed value is {kind}. Pass a tensor of real numbers as obs=, as in "
            "torch.as_tensor(x)"
        )
    element = leaf(fn)
    try:
        inside = element.support.check(value)
    except NotImplementedError:  # no support is declared, so there is nothing to check
        return True
    mask = distribution_mask(fn, site["mask"])
    if mask is not None:
        seen = mask.to(inside.device).expand(torch.broadcast_shapes(mask.shape, value.shape))
        inside = inside | ~(seen.flatten(-element.event_dim).any(-1) if element.event_dim else seen)
    if bool(inside.all()):
        return True
    if opted_out_of_validation(fn):
        return False
    outside = value[~inside] if inside.shape == value.shape[: inside.dim()] else value
    example = f", such as {outside.flatten()[0].item():.4g}," if not element.event_dim else ""
    own = site["infer"].get(OUTSIDE_SUPPORT)
    every = ". Transform the data, or set validate_args=False on the likelihood to score them all the same"
    raise InputError(
        f"site '{name}': some observed values{example} lie outside the support of its {type(element).__name__} "
        f"likelihood, {support_words(element)}{f'. {own}' if own else every}"
    )


def _check_mask(name: str, site: Message) -> None:
    """Refuse a mask that does not broadcast to the site's log-probability."""
    mask, shape = site["mask"], _log_prob_shape(site)
    if isinstance(mask, Tensor) and shape is not None and _broadcast(mask.shape, shape) != shape:
        raise InputError(
            f"site '{name}': its mask has shape {tuple(mask.shape)}, but the site has batch shape {tuple(shape)}. Give "
            "the mask one element for each of the site's, without its event dimensions"
        )


def refuse_other_shapes(sites: dict[str, Message]) -> None:
    """Refuse an observed value that has other dimensions than its distribution, whose log-probability is then wrong."""
    for name, site in sites.items():
        fn = site["fn"]
        if site["is_observed"] and not is_factor(fn) and _log_prob_shape(site) != fn.batch_shape:
            raise InputError(
                f"site '{name}': its observed value has shape {tuple(site['value'].shape)}, but its distribution has "
                f"batch shape {tuple(fn.batch_shape)} and event shape {tuple(fn.event_shape)}. Reshape the data, or "
                "give the distribution the dimensions of a datapoint as event, by to_event"
            )


def _log_prob_shape(site: Message) -> torch.Size | None:
    """The shape of a site's log-probability, not masked; None where its value does not fit its distribution."""
    fn, value = site["fn"], site["value"]
    if is_factor(fn) or not isinstance(value, Tensor):
        return None
    return _broadcast(value.shape[: max(0, value.dim() - fn.event_dim)], fn.batch_shape)


def _broadcast(left: torch.Size, right: torch.Size) -> torch.Size | None:
    try:
        return torch.Size(torch.broadcast_shapes(left, right))
    except RuntimeError:
        return None


def is_factor(fn: Any) -> bool:
    return type(fn).__name__ == "Unit"


def missing(name: str) -> str:
    """What to say of a latent that the guide does not draw."""
    return f"site '{name}': latent in the model but missing from the guide. Add a pyro.sample for it"


def check_finite(tensors: Iterable[tuple[str, Any]], what: str, remedy: str) -> None:
    """Refuse NaN and infinities, naming the tensor that holds them."""
    for name, tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not _is_finite(tensor):
            raise InputError(f"{what}: {name} contains NaN or infinite values. {remedy}")


def _is_finite(tensor: Tensor) -> bool:
    # A sum is finite only if all its terms are, and takes a fifth of the time.
    return bool(torch.isfinite(tensor.detach().sum())) or bool(torch.isfinite(tensor).all())


def check_parameters(*programs: Program) -> None:
    """Refuse NaN and infinities in parameters of `programs` and Pyro's param store."""
    store = pyro.get_param_store()
    remedy = "Training diverged. Lower the learning rate, or load an earlier checkpoint"
    check_finite(((f"parameter '{name}'", store._params[name]) for name in store), "param store", remedy)
    for program in programs:
        for module in modules_of(program):
            if any(value.is_inference() for value in module.parameters()):
                raise InputError(
                    f"{type(module).__name__}: its parameters were made in torch.inference_mode, so nothing can be "
                    "differentiated. Make it outside, or copy its state_dict into one that was"
                )
            named = ((f"parameter '{name}'", value) for name, value in module.named_parameters())
            check_finite(named, type(module).__name__, remedy)


def is_masked(site: Any) -> bool:
    """Whether a site is under any mask."""
    return distribution_mask(site["fn"], site["mask"]) is not None


def batch_dims(sites: dict[str, Any]) -> int:
    """The largest number of batch dimensions of any of `sites`."""
    return max(len(site["fn"].batch_shape) for site in sites.values())


def frames_of(sites: dict[str, Any]) -> set[str]:
    """The names of all plates around any of `sites`."""
    return {frame.name for site in sites.values() for frame in site["cond_indep_stack"]}
