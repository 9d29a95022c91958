"""What a guide is shown of the data, as it declares it."""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pyrogaps.errors import InputError
from pyrogaps.family import AmortizedGuide

Masks = tuple[Tensor | None, ...]


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
    parts = AmortizedGuide.of(guide)
    part, lookahead = parts.conditions, parts.lookahead
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
