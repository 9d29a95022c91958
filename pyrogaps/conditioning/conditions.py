"""The part of the data that a guide declares to be shown."""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pyrogaps.errors import InputError, counted
from pyrogaps.family import AmortizedGuide
from pyrogaps.guard import failures_named

Masks = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Shown:
    """The same part of the data is shown to every factor of the guide.

    `part` is a boolean mask over the model's first argument, True where it is shown; or a function from the model's
    arguments to such a mask, or to a tuple with one mask per argument (None: shown whole). A mask omits the axis of
    datapoints, or has one entry per row of the function's arguments.
    """

    part: Any

    def __str__(self) -> str:
        return "a part of x"

    def masks(self, args: tuple[Any, ...]) -> Masks:
        """The masks over `args`, each of its argument's shape; raises `InputError` where one does not fit."""
        given = self.part
        if callable(given):
            with failures_named("conditions"):
                given = given(*args)
        if given is None:
            raise InputError("conditions: the function returned None. Return a boolean mask, True where shown")
        given = given if isinstance(given, tuple) else (given,)
        if len(given) > len(args):
            raise InputError(f"conditions: {len(given)} masks, but the model has {counted(len(args), 'argument')}")
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
        """Masks over the `temporal` arguments: what the factor of step `steps` `(rows,)`, from 0, is shown."""
        stop = steps + self.steps + 1
        return tuple(_until(arg, stop) if timed else None for arg, timed in zip(args, temporal, strict=True))


Conditions: TypeAlias = Shown | Lookahead


def declared(guide: Any) -> Conditions | None:
    """The conditions or the lookahead that `guide` declares; None where it is shown all of x.

    Raises `InputError` where the lookahead is not 0, 1, 2, ... or infinity, and where both are declared.
    """
    parts = AmortizedGuide.of(guide)
    part, lookahead = parts.conditions, parts.lookahead
    if part is not None and lookahead is not None:
        raise InputError("guide: it declares both conditions and a lookahead. Remove one of them")
    if part is not None:
        return Shown(part)
    if lookahead is None:
        return None
    number = checked_lookahead("guide", lookahead)
    return None if number == math.inf else Lookahead(int(number))


def checked_lookahead(program: str, lookahead: int | float | str) -> int | float:
    """`lookahead` as a whole number, 0 or more, or infinity ("inf" in recipes).

    Raises `InputError`, which begins with `program`, for anything else.
    """
    try:
        number = math.nan if isinstance(lookahead, bool) else float(lookahead)
    except (TypeError, ValueError):
        number = math.nan
    if not number >= 0 or not (number.is_integer() or number == math.inf):
        raise InputError(f"{program}: lookahead must be 0 (filtering), 1, 2, ... or inf (smoothing), got {lookahead!r}")
    return number if number == math.inf else int(number)


def hidden(args: tuple[Any, ...], masks: Masks, *, at_random: bool = False) -> tuple[Any, ...]:
    """`args` with other values of the same range where `masks` are False.

    The values are reflected at the middle of the range, so that all of them change, or drawn `at_random`.
    """
    other = _random if at_random else _reflected
    return tuple(
        arg if mask is None else torch.where(mask, arg, other(arg)) for arg, mask in zip(args, masks, strict=True)
    )


def _checked(position: int, mask: Any, arg: Any) -> Tensor | None:
    if mask is None:
        return None
    mask = mask if isinstance(mask, Tensor) else np.asarray(mask)
    if str(mask.dtype).removeprefix("torch.") != "bool":
        raise InputError(f"conditions: the mask of argument {position} must be boolean, True where shown")
    if not isinstance(arg, Tensor):
        raise InputError(
            f"conditions: argument {position} is a {type(arg).__name__}, which cannot be masked. Pass None as its mask"
        )
    try:
        whole: Tensor = torch.as_tensor(mask).to(arg.device).expand(arg.shape)
        return whole
    except RuntimeError:
        raise InputError(
            f"conditions: the mask of argument {position} has shape {tuple(mask.shape)}, but the argument has shape "
            f"{tuple(arg.shape)}. Omit the axis of datapoints; for one mask per datapoint, make conditions a function "
            "of the data that returns the masks"
        ) from None


def _until(arg: Tensor, stop: Tensor) -> Tensor:
    """True before step `stop` `(rows,)` of `arg` `(rows, steps, *)`."""
    early = torch.arange(arg.shape[1], device=arg.device) < stop.to(arg.device)[:, None]
    return early.reshape(*early.shape, *[1] * (arg.dim() - 2)).expand(arg.shape)


def _reflected(arg: Tensor) -> Tensor:
    """Values of the same range that differ everywhere: reflected, or the minimum where that changes nothing.

    A constant tensor becomes zero, or one if it is zero: most supports contain both.
    """
    if arg.dtype == torch.bool:
        return ~arg
    low, high = arg.min(), arg.max()
    if bool(low == high):
        return torch.zeros_like(arg) if bool(low != 0) else torch.ones_like(arg)
    reflected = low + high - arg
    return torch.where(reflected == arg, low, reflected)


def _random(arg: Tensor) -> Tensor:
    """Random values of the same range; whole numbers where all values are."""
    if arg.dtype == torch.bool:
        return torch.rand(arg.shape, device=arg.device) < 0.5
    low, high = arg.min().double(), arg.max().double()
    uniform = torch.rand(arg.shape, dtype=torch.float64, device=arg.device)
    if bool((arg == arg.round()).all()) if arg.is_floating_point() else True:
        return (low + (uniform * (high - low + 1)).floor()).to(arg.dtype)
    return (low + uniform * (high - low)).to(arg.dtype)
