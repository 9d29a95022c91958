"""Match a guide's sites with the model's."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from pyrogaps.density.bijective import BijectiveMap, check_bijective
from pyrogaps.density.differing import differs, does_not_fit
from pyrogaps.density.joint import JointDensity
from pyrogaps.density.layout import Site, leaf, plate_dim
from pyrogaps.density.local import GuideSite, place
from pyrogaps.density.mapped import NotAffineError, affine_map, check_stated, image_of
from pyrogaps.density.state_numbers import states_of
from pyrogaps.density.structure import missing
from pyrogaps.density.supports import bijection, support_of
from pyrogaps.errors import InputError, counted

# Messages of the guide's sites with `terms` at the points `flat` `(R, dim)`, for the datapoints `indices` `(R,)`.
PlaceAt = Callable[[list[GuideSite], Tensor, Tensor], dict[str, Any]]
NUM_MAPPED_ROWS = 16
Mapped = Literal["affine", "bijective"]


def read_terms(
    messages: dict[str, Any], joint: JointDensity, place_at: PlaceAt
) -> tuple[list[GuideSite], Mapped | None]:
    """Match a guide's sites, at the rows of `joint.probe`, with the model's; `InputError` where they do not fit.

    Returns the sites that carry density, and where these lie in the guide's own coordinates, the kind of map that leads
    from there to the model's, see `mapped` and `bijective`.
    """
    auxiliary = {name: m for name, m in messages.items() if m["infer"].get("is_auxiliary") and name not in joint.sites}
    for name, message in messages.items():
        _check_guide_site(name, message, joint)
    terms, deltas = [], []
    for name, site in joint.sites.items():
        message = messages.get(name)
        if message is None:
            raise InputError(missing(name))
        if not is_delta(message):
            _check_states(name, message["fn"], site)
            terms.append(_term(name, message, site, joint, unconstrained=False))
        elif f"{name}_unconstrained" in auxiliary:
            helper = auxiliary.pop(f"{name}_unconstrained")
            terms.append(_term(f"{name}_unconstrained", helper, site, joint, unconstrained=True))
        else:
            deltas.append(name)
    if deltas:
        term = _flat_term(deltas, auxiliary, joint)
        if term is None:
            return _own_terms(messages, joint, place_at)
        terms.append(term)
    if auxiliary:
        raise _no_reverse(next(iter(auxiliary)))
    if sum(term.site.size for term in terms) == joint.dim:
        fixed = not any(term.unconstrained for term in terms)  # the run at hand tells, unless a support moves with it
        if not fixed or _check_values(terms, messages, joint) is not None:
            messages = place_at(terms, joint.probe.z, joint.probe.indices)
            error = _check_values(terms, messages, joint)
            if error is not None and fixed:
                raise error
            if error is not None:
                return _own_terms(messages, joint, place_at)
    _check_stated(terms, messages, joint)
    return terms, None


def _check_states(name: str, fn: Any, site: Site) -> None:
    """Refuse a site that is discrete in one program alone, or has another number of states in the guide."""
    discrete = bool(support_of(fn).is_discrete)
    if discrete != bool(site.num_states):
        here, there = ("discrete", "continuous") if discrete else ("continuous", "discrete")
        raise InputError(f"site '{name}': {here} in the guide, {there} in the model. Give it the model's support")
    if not discrete:
        return
    number = len(states_of(fn, name))
    if number != site.num_states:
        raise InputError(
            f"site '{name}': {counted(number, 'state')} in the guide, {site.num_states} in the model. Give its "
            "distribution in the guide as many"
        )


def is_delta(message: Any) -> bool:
    return type(leaf(message["fn"])).__name__ == "Delta"


def _no_reverse(name: str) -> InputError:
    return InputError(
        f"site '{name}': this auxiliary variable of the guide has no reverse model. Define augment(model) on the "
        "guide's class to add a reverse model"
    )


def _check_stated(terms: list[GuideSite], messages: dict[str, Any], joint: JointDensity) -> None:
    """Refuse Deltas that state another log-density than their map from unconstrained space has."""
    deltas = [name for name in joint.sites if name not in {term.name for term in terms}]
    if deltas:
        indices, z = joint.probe.indices, joint.probe.z
        active = joint.active(indices)
        for name, excess in image_of(messages, terms, z, joint, indices).excess.items():
            check_stated([name], excess if active is None else excess[active.all(-1)])


def _own_terms(messages: dict[str, Any], joint: JointDensity, place_at: PlaceAt) -> tuple[list[GuideSite], Mapped]:
    """The guide's sites in coordinates of its own, and the kind of map that leads to the model's latents."""
    terms: list[GuideSite] = []
    start, delta = 0, next(name for name in joint.sites if is_delta(messages[name]))
    for name, message in messages.items():
        if not is_delta(message):
            site = _laid_out(Site(name, start, (), -1, 0, 0, 0), message, joint, unconstrained=False)
            terms.append(GuideSite(name, site, False))
            start += site.size
    if start > joint.dim:
        raise _no_reverse(next(term.name for term in terms if term.name not in joint.sites))
    if start < joint.dim:
        raise InputError(
            f"site '{delta}': a Delta in the guide has no density of its own, and the guide has draws of {start} "
            f"dimensions for latents of {joint.dim}. Give every latent a draw of its own"
        )
    if joint.structure.masked:
        raise InputError(
            f"site '{delta}': a Delta whose auxiliary draw is another vector than the latents in unconstrained space "
            "does not fit a model with masked latents. Draw the site itself from a distribution with its support"
        )
    rows = joint.probe.indices[:NUM_MAPPED_ROWS]
    try:
        affine_map(partial(place_at, terms), terms, joint, rows)
    except NotAffineError:
        drawn = {term.name for term in terms}
        names = [name for name in joint.sites if name not in drawn]
        check_bijective(BijectiveMap(partial(place_at, terms), terms, joint, rows), names)
        return terms, "bijective"
    return terms, "affine"


def _check_values(terms: list[GuideSite], messages: dict[str, Any], joint: JointDensity) -> InputError | None:
    """The error for the first site whose values, in the guide's run `messages` at `joint.probe`, are not the model's
    there.
    """
    flat, model_values = joint.probe.z, joint.probe.values
    own = {term.name: term for term in terms}
    for name in joint.sites:
        message, there = messages[name], model_values[name]
        here = place(own[name], message["fn"], flat[None])[0] if name in own else message["value"]
        if joint.plate is None:
            here, there = here.flatten(), there.flatten()
        if here.shape != there.shape and name in own:
            return does_not_fit(name, message, joint)
        here = here.to(there.dtype)  # discrete sites may have whole numbers in one program alone
        if here.shape != there.shape or torch.allclose(here, there, rtol=1e-4, atol=1e-5):
            continue
        if name in own:
            return differs(name, message, joint)
        return InputError(f"site '{name}': the guide's Delta has other values than the auxiliary draw")
    return None


def _check_guide_site(name: str, message: Any, joint: JointDensity) -> None:
    if name in joint.enumerated:
        raise InputError(
            f"site '{name}': drawn by the guide, but summed out of this density. Leave the site out of the guide, or "
            f"pass JointDensity(model, data, drawn=('{name}',)) in the model's place"
        )
    if name in joint.observed:
        raise InputError(f"site '{name}': observed in the model. Remove it from the guide")
    if name not in joint.sites and not message["infer"].get("is_auxiliary"):
        raise InputError(
            f"site '{name}': in the guide but not in the model, whose latents are {', '.join(joint.sites)}. Remove it "
            "or rename it. An auxiliary variable needs infer={'is_auxiliary': True} and augment(model) on the "
            "guide's class, which adds a reverse model for it"
        )


def _term(name: str, message: Any, site: Site, joint: JointDensity, *, unconstrained: bool) -> GuideSite:
    """A term with the guide's own row axis; its values must fit the model site's columns."""
    laid_out = _laid_out(site, message, joint, unconstrained=unconstrained)
    if laid_out.size != site.size:
        raise does_not_fit(site.name, message, joint)
    return GuideSite(name, laid_out, unconstrained)


def _laid_out(site: Site, message: Any, joint: JointDensity, *, unconstrained: bool) -> Site:
    """`site` with the shape and the row axis that it has in the guide."""
    fn, value = message["fn"], message["value"]
    flat = value if unconstrained else bijection(fn, site.name).inv(value)
    event_dim = fn.event_dim + flat.dim() - value.dim()
    shape, axis = tuple(flat.shape), -1 - flat.dim()
    if joint.plate is not None:
        dim = plate_dim(message, joint.plate)
        if dim is None:
            raise InputError(
                f"site '{site.name}': outside the data plate '{joint.plate}' in the guide. Put it inside `with "
                f"pyro.plate('{joint.plate}', ...)`"
            )
        axis = dim - event_dim
        rest = list(flat.shape)
        del rest[axis]
        shape = tuple(rest)
    return replace(site, shape=shape, axis=axis, event_dim=fn.event_dim, unconstrained_event_dim=event_dim)


def _flat_term(deltas: list[str], auxiliary: dict[str, Any], joint: JointDensity) -> GuideSite | None:
    """The auxiliary vector that the sites `deltas` are parts of, as in joint autoguides; None if there is none.

    Raises `InputError` where the guide has no auxiliary draws at all.
    """
    if not auxiliary:
        raise no_density(deltas[0])
    size = sum(joint.sites[name].size for name in deltas)
    for name in list(auxiliary):
        helper = auxiliary[name]
        in_plate = joint.plate is None or plate_dim(helper, joint.plate) is not None
        whole = joint.sites if len(deltas) == len(joint.sites) else None
        length = size + getattr(helper["fn"], "num_auxiliary", 0)
        if in_plate and whole is not None and helper["value"].shape[-1:] == (length,) and helper["fn"].event_dim == 1:
            del auxiliary[name]
            flat_site = Site(name, 0, (length,), -2, 1, 1, 1)
            return _term(name, helper, flat_site, joint, unconstrained=True)
    return None


def no_density(name: str) -> InputError:
    return InputError(
        f"site '{name}': a Delta in the guide has no density, so no gap is defined. Use a guide with a density, such "
        "as AutoNormal instead of AutoDelta"
    )
