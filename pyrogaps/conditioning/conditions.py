"""What a guide is shown of the data: declared conditions, and the check that it looks at nothing else."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pyrogaps.density import GuideDensity, IndexedData
from pyrogaps.density.data import as_tuple
from pyrogaps.density.local import FactorisedGuide, PlaceValues
from pyrogaps.density.rows import same_density
from pyrogaps.density.runs import evaluating
from pyrogaps.errors import InputError
from pyrogaps.streams import seeded

Masks = tuple[Tensor | None, ...]
NUM_CHECKED_ROWS, NUM_CHECKED_STEPS = 8, 16


@dataclass(frozen=True)
class Shown:
    """One part of the data is shown, to every factor of the guide alike.

    `part` is a boolean mask over the model's first argument, True where it is shown, or a function from the model's
    arguments to such a mask or to a tuple of them, one for each argument, None for those that are shown whole. A mask
    may leave out the axis of datapoints.
    """

    part: Tensor | Callable[..., Any]

    def __str__(self) -> str:
        return "a part of x"

    def masks(self, args: tuple[Any, ...]) -> Masks:
        """The masks over `args`, each of the argument's own shape; raises `InputError` for those that do not fit."""
        given = self.part(*args) if callable(self.part) else self.part
        given = given if isinstance(given, tuple | list) else (given,)
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

    def masks(self, args: tuple[Any, ...], step: int, num_steps: int) -> Masks:
        """What the factor of `step` (from 0) is shown: of every argument whose second axis is time."""
        temporal = [_is_temporal(arg, num_steps) for arg in args]
        if not any(temporal):
            raise InputError(
                f"lookahead: the model has {num_steps} latent sites, one a step, but no argument has {num_steps} steps "
                "along its second axis; declare conditions instead"
            )
        return tuple(
            _until(arg, step + self.steps + 1) if timed else None for arg, timed in zip(args, temporal, strict=True)
        )


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


def hidden(args: tuple[Any, ...], masks: Masks) -> tuple[Any, ...]:
    """`args` with other values in the places that `masks` do not show, within the range of those that are there."""
    return tuple(
        arg if mask is None else torch.where(mask, arg, _others(arg)) for arg, mask in zip(args, masks, strict=True)
    )


def check_no_leak(density: GuideDensity, conditions: Conditions) -> None:
    """Raise `InputError` where a guide looks at what its conditions withhold: its factors change when that is changed.

    What is withheld is replaced by other values of its range, at some datapoints, and for a lookahead at some steps, so
    that integer data are checked as well. The message names the site.
    """
    if density.joint.plate is None:
        raise InputError("conditions: they need a data plate; the model has none")
    indices = torch.arange(min(NUM_CHECKED_ROWS, density.num_datapoints))
    with seeded(0, "leak"), evaluating(density.guide, density.joint.model), torch.no_grad():
        local = density.at(indices)
        z, _ = local.sample_extended(1) if isinstance(local, FactorisedGuide) else local.sample(1)
        before = _factors(density, indices, z)
        for sites, masks, told in _withholdings(density, conditions):
            after = _factors(_blind(density, masks), indices, z)
            for name in before if sites is None else sites:
                if not same_density(before[name], after[name]):
                    raise InputError(
                        f"guide: site '{name}' changes with {told}, which the guide declares not to be shown; do not "
                        "look at it there, or declare what is shown"
                    )


Maker = Callable[[tuple[Any, ...]], Masks]


def _withholdings(density: GuideDensity, conditions: Conditions) -> Iterator[tuple[list[str] | None, Maker, str]]:
    """The guide's sites to compare (None: all), the masks to compare them under, and what they withhold in words."""
    if isinstance(conditions, Shown):
        yield None, conditions.masks, "a part of the data outside its conditions"
        return
    names = list(density.joint.sites)
    if [term.name for term in density.terms] != names:
        raise InputError("guide: a lookahead needs a site of its own for every step; declare conditions instead")
    last = len(names) - 2 - conditions.steps
    for step in sorted({round(float(s)) for s in torch.linspace(0, max(last, 0), NUM_CHECKED_STEPS)}):
        masks = functools.partial(conditions.masks, step=step, num_steps=len(names))
        yield names[: step + 1], masks, f"data after step {step + 1 + conditions.steps}"


def _blind(density: GuideDensity, masks: Maker) -> GuideDensity:
    """The guide on data that differ in everything that is withheld."""
    number, fetch = density.num_datapoints, density.joint.data.fetch

    def other(indices: Tensor) -> tuple[Any, ...]:
        args = as_tuple(fetch(indices))
        return hidden(args, masks(args))

    return density.restrict(density.joint.over(IndexedData(number, other)), torch.arange(number))


def _factors(density: GuideDensity, indices: Tensor, z: Tensor) -> dict[str, Tensor]:
    """The log-density of every site at fixed `z`."""
    messages = density.messages(indices, 1, PlaceValues(density.terms, z[0], in_plate=True))
    found = {term.name: messages[term.name] for term in density.terms}
    return {name: message["fn"].log_prob(message["value"]) for name, message in found.items()}


def _checked(position: int, mask: Any, arg: Any) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise InputError(
            f"conditions: the mask of argument {position} must be a boolean tensor, True where it is shown"
        )
    if not isinstance(arg, Tensor):
        raise InputError(f"conditions: argument {position} is a {type(arg).__name__}, which cannot be shown in part")
    try:
        return mask.to(arg.device).expand(arg.shape)
    except RuntimeError:
        raise InputError(
            f"conditions: the mask of argument {position} has shape {tuple(mask.shape)}, which does not fit the "
            f"argument's {tuple(arg.shape)}"
        ) from None


def _is_temporal(arg: Any, num_steps: int) -> bool:
    return isinstance(arg, Tensor) and arg.dim() > 1 and arg.shape[1] == num_steps


def _until(arg: Tensor, stop: int) -> Tensor:
    mask = torch.zeros(arg.shape, dtype=torch.bool, device=arg.device)
    mask[:, :stop] = True
    return mask


def _others(arg: Tensor) -> Tensor:
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
