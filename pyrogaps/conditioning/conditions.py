"""What a guide is shown of the data: declared conditions, and the check that it looks at nothing else."""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pyrogaps.density import GuideDensity, IndexedData, JointDensity
from pyrogaps.density.data import as_tuple
from pyrogaps.density.layout import leaf
from pyrogaps.density.local import FactorisedGuide, PlaceValues, Term
from pyrogaps.density.runs import evaluating
from pyrogaps.density.structure import sample_sites
from pyrogaps.errors import InputError
from pyrogaps.streams import seeded

Masks = tuple[Tensor | None, ...]
NUM_CHECKED_ROWS = 8


@dataclass(frozen=True)
class Shown:
    """One part of the data is shown, to every factor of the guide alike.

    `part` is a boolean mask over the model's first argument, True where it is shown, or a function from the model's
    arguments to such a mask or to a tuple of them, one for each argument, None for those that are shown whole. A mask
    leaves out the axis of datapoints, or has one entry for each of the rows that the function was given.
    """

    part: Any

    def __str__(self) -> str:
        return "a part of x"

    def masks(self, args: tuple[Any, ...]) -> Masks:
        """The masks over `args`, each of the argument's own shape; raises `InputError` for those that do not fit."""
        given = self.part(*args) if callable(self.part) else self.part
        given = given if isinstance(given, tuple) else (given,)
        if len(given) > len(args):
            raise InputError(f"conditions: {len(given)} masks for the model's {len(args)} argument(s)")
        padded = [*given, *[None] * (len(args) - len(given))]
        return tuple(
            _checked(position, mask, arg) for position, (mask, arg) in enumerate(zip(padded, args, strict=True))
        )


@dataclass(frozen=True)
class Lookahead:
    """The factor of step t is shown the data up to step t + `steps`: 0 is filtering."""

    steps: int

    def __str__(self) -> str:
        return f"lookahead {self.steps}"

    def masks(self, args: tuple[Any, ...], steps: Tensor, temporal: list[bool]) -> Masks:
        """What the factor of step `steps` (from 0), one a row, is shown of the arguments that are `temporal`."""
        stop = steps + self.steps + 1
        return tuple(_until(arg, stop) if timed else None for arg, timed in zip(args, temporal, strict=True))


Conditions: TypeAlias = Shown | Lookahead


def declared(guide: Any) -> Conditions | None:
    """What `guide` says that it is shown: its `conditions` or its `lookahead`; None where that is all of x.

    Raises `InputError` for a lookahead that is not a whole number from 0 on (or infinity), and for both at once.
    """
    part, lookahead = getattr(guide, "conditions", None), getattr(guide, "lookahead", None)
    if part is not None and lookahead is not None:
        raise InputError("guide: it declares both conditions and a lookahead; leave one of them out")
    if part is not None:
        return Shown(part)
    if lookahead is None:
        return None
    number = checked_lookahead("guide", lookahead)
    return None if number == math.inf else Lookahead(int(number))


def checked_lookahead(program: str, lookahead: int | float | str) -> int | float:
    """`lookahead` as a whole number from 0 on, or infinity ("inf" in recipes).

    Raises `InputError`, on behalf of `program`, for anything else.
    """
    try:
        number = math.nan if isinstance(lookahead, bool) else float(lookahead)
    except (TypeError, ValueError):
        number = math.nan
    if not number >= 0 or not (number.is_integer() or number == math.inf):
        raise InputError(f"{program}: lookahead must be 0 (filtering), 1, 2, ... or inf (smoothing), got {lookahead!r}")
    return number if number == math.inf else int(number)


def hidden(args: tuple[Any, ...], masks: Masks, *, at_random: bool = False) -> tuple[Any, ...]:
    """`args` with other values in the places that `masks` do not show, within the range of those that are there.

    They are reflected in the middle of the range, so that each differs from what was there, or drawn `at_random`.
    """
    other = _random if at_random else _reflected
    return tuple(
        arg if mask is None else torch.where(mask, arg, other(arg)) for arg, mask in zip(args, masks, strict=True)
    )


def check_no_leak(density: GuideDensity, conditions: Conditions) -> None:
    """Raise `InputError` where a guide looks at what its conditions withhold: its factors change when that is changed.

    What is withheld is replaced by other values of its range, reflected ones and random ones, at some datapoints and
    for every step of a lookahead, so that integer data are checked as well. The message names the site.
    """
    if density.joint.plate is None:
        raise InputError("conditions: they need a data plate; the model has none")
    if density.bound:
        raise InputError(
            "guide: it holds parameters for each datapoint, fitted to all of x, so it cannot be shown a part; take an "
            "encoder of what is shown"
        )
    with seeded(0, "leak"), evaluating(density.guide, density.joint.model), torch.no_grad():
        rows = _Rows(density, conditions)
        before = rows.factors(None)
        for at_random in (False, True):
            rows.compare(before, rows.factors(at_random))


class _Rows:
    """Some datapoints, once for each of what is withheld: the steps of a lookahead, or one part for all factors."""

    def __init__(self, density: GuideDensity, conditions: Conditions) -> None:
        self.density, self.conditions = density, conditions
        self.names = [term.name for term in density.terms]
        self.few = torch.arange(min(NUM_CHECKED_ROWS, density.num_datapoints))
        args = as_tuple(density.joint.data.fetch(self.few))
        self.steps = torch.zeros(1, dtype=torch.long)
        self.temporal = [False] * len(args)
        if isinstance(conditions, Lookahead):
            if self.names != list(density.joint.sites):
                raise InputError("guide: a lookahead needs a site of the guide's own for every step")
            self.steps = torch.arange(len(self.names))
            self.temporal = _temporal(density.joint, args, self.few, len(self.names))
        local = density.at(self.few)
        z, _ = local.sample_extended(1) if isinstance(local, FactorisedGuide) else local.sample(1)
        self.z = z[0].repeat(len(self.steps), 1)

    def factors(self, at_random: bool | None) -> dict[str, Tensor]:
        """Elements of the log-density of every site at fixed z, `(rows, *)`; `at_random` None withholds nothing."""
        fetch, each = self.density.joint.data.fetch, len(self.few)

        def other(indices: Tensor) -> tuple[Any, ...]:
            args = as_tuple(fetch(self.few[indices % each]))
            if at_random is None:
                return args
            if isinstance(self.conditions, Shown):
                masks = self.conditions.masks(args)
            else:
                masks = self.conditions.masks(args, self.steps[indices // each], self.temporal)
            return hidden(args, masks, at_random=at_random)

        indices = torch.arange(len(self.z))
        blind = self.density.restrict(
            self.density.joint.over(IndexedData(len(indices), other)), self.few.repeat(len(self.steps))
        )
        messages = blind.messages(indices, 1, PlaceValues(self.density.terms, self.z, in_plate=True))
        return {term.name: _elements(term, messages[term.name]) for term in self.density.terms}

    def compare(self, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
        """Raise `InputError` for a site that changed where it should not have."""
        each = len(self.few)
        for position, name in enumerate(self.names):
            # The rows of step t withhold what the factors up to t are not shown.
            first = position * each if isinstance(self.conditions, Lookahead) else 0
            left, right = before[name][first:], after[name][first:]
            tolerance = 1e-8 if left.dtype == torch.float64 else 1e-4
            same = (
                torch.isclose(left, right, rtol=tolerance, atol=tolerance, equal_nan=True).reshape(len(left), -1).all(1)
            )
            if not bool(same.all()):
                told = "a part of the data outside its conditions"
                if isinstance(self.conditions, Lookahead):
                    step = position + int((~same).nonzero()[0]) // each
                    told = f"data after step {step + 1 + self.conditions.steps}"
                raise InputError(
                    f"guide: site '{name}' changes with {told}, which the guide declares not to be shown; do not look "
                    "at it there, or declare what is shown"
                )


def _elements(term: Term, message: Any) -> Tensor:
    """The log-density of a site, its elements apart where they are independent, rows first."""
    fn = message["fn"]
    inner = leaf(fn)
    elements: Tensor = inner.log_prob(message["value"])
    axis = term.site.batch_axis - (fn.event_dim - inner.event_dim)
    return elements.movedim(axis, 0) if elements.dim() >= -axis else elements.expand(1)


def _temporal(joint: JointDensity, args: tuple[Any, ...], indices: Tensor, num_steps: int) -> list[bool]:
    """Which arguments are sequences of observations: as many steps as there are latents, and observed by the model."""
    sized = [isinstance(arg, Tensor) and arg.dim() > 1 and arg.shape[1] == num_steps for arg in args]
    found = [sized[k] and _is_observed(joint, args, indices, k) for k in range(len(args))]
    if not any(found):
        raise InputError(
            f"lookahead: the model has {num_steps} latent sites, which should be one a step, but no argument that it "
            f"observes has {num_steps} steps along its second axis"
        )
    return found


def _is_observed(joint: JointDensity, args: tuple[Any, ...], indices: Tensor, position: int) -> bool:
    masks = [None if k != position else torch.zeros_like(arg, dtype=torch.bool) for k, arg in enumerate(args)]
    with joint.plates(indices):
        before, after = (observed(joint, given) for given in (args, hidden(args, tuple(masks))))
    return any(not torch.equal(value, after[name][0]) for name, (value, _) in before.items())


def observed(joint: JointDensity, args: tuple[Any, ...]) -> dict[str, tuple[Tensor, Any]]:
    """Value and distribution of every observed site of a run of the model."""
    sites = sample_sites(joint.model, args)
    return {name: (site["value"], site["fn"]) for name, site in sites.items() if site["is_observed"]}


def _checked(position: int, mask: Any, arg: Any) -> Tensor | None:
    if mask is None:
        return None
    mask = mask if isinstance(mask, Tensor) else torch.as_tensor(mask)
    if mask.dtype != torch.bool:
        raise InputError(f"conditions: the mask of argument {position} must be boolean, True where shown")
    if not isinstance(arg, Tensor):
        raise InputError(f"conditions: argument {position} is a {type(arg).__name__}, which cannot be shown in part")
    try:
        whole: Tensor = mask.to(arg.device).expand(arg.shape)
        return whole
    except RuntimeError:
        raise InputError(
            f"conditions: the mask of argument {position} has shape {tuple(mask.shape)}, which does not fit the "
            f"argument's {tuple(arg.shape)}; leave out the axis of datapoints, or, for masks of their own, make them "
            "one of the data's tensors and return that from a function"
        ) from None


def _until(arg: Tensor, stop: Tensor) -> Tensor:
    """True before step `stop` `(rows,)` of `arg` `(rows, steps, *)`."""
    early = torch.arange(arg.shape[1], device=arg.device) < stop.to(arg.device)[:, None]
    return early.reshape(*early.shape, *[1] * (arg.dim() - 2)).expand(arg.shape)


def _reflected(arg: Tensor) -> Tensor:
    """Values of the same range that differ everywhere: reflected, or the least where that changes nothing.

    Where all values are one, zero, or one for zero: what most supports hold.
    """
    if arg.dtype == torch.bool:
        return ~arg
    low, high = arg.min(), arg.max()
    if bool(low == high):
        return torch.zeros_like(arg) if bool(low != 0) else torch.ones_like(arg)
    reflected = low + high - arg
    return torch.where(reflected == arg, low, reflected)


def _random(arg: Tensor) -> Tensor:
    """Random values of the same range, whole numbers where all are."""
    if arg.dtype == torch.bool:
        return torch.rand(arg.shape, device=arg.device) < 0.5
    low, high = arg.min().double(), arg.max().double()
    uniform = torch.rand(arg.shape, dtype=torch.float64, device=arg.device)
    if bool((arg == arg.round()).all()) if arg.is_floating_point() else True:
        return (low + (uniform * (high - low + 1)).floor()).to(arg.dtype)
    return (low + uniform * (high - low)).to(arg.dtype)
