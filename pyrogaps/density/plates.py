"""Plates while a program runs on some of the datapoints.

Pyro's class of plates is patched meanwhile, because no handler can do this. A plate announces its random choice of rows
in a message, but its size and its subsample size are local variables of `SubsampleMessenger._subsample`: a handler can
replace the rows alone, and rows of another number than the program asked for are an error. The plate then broadcasts
every site to that size itself, before any handler around the program sees the site. The patch is made by one thread at
a time, holds for that thread's plates only, and is undone afterwards.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor

from pyrogaps.density.runs import MisreadData
from pyrogaps.errors import InputError
from pyrogaps.guard import one_at_a_time

Choice = tuple[int, int, Any]


class BoundPlate(Exception):
    """A program's data plate has the data set's full size, so it may hold parameters for each datapoint.

    `subsampled`: whether its subsample size is the number of rows at hand (Pyro's idiom for minibatches).
    """

    def __init__(self, subsampled: bool) -> None:
        super().__init__()
        self.subsampled = subsampled


class WrongSize(MisreadData):
    """A plate whose size does not follow the data that its program is called with."""

    def __init__(self, name: str, size: int, rows: int, number: int | None) -> None:
        some = f"{rows} of the {number} rows" if number is not None and rows < number else f"{rows} rows"
        self.of_fetch = (
            f"plate '{name}' has size {size}, but fetch(indices) was asked for {some}. Return one row per index "
            f"in order, and size the plate by them, as in pyro.plate('{name}', len(x))"
        )
        super().__init__(
            f"plate '{name}' has size {size}, but the program was called with {some}. Size it by the data that the "
            f"program is called with, as in pyro.plate('{name}', len(x))"
        )


def whole_plates(
    plate: str | None,
    indices: Tensor,
    *,
    num_datapoints: int | None = None,
    bound: bool | None = False,
    held: Tensor | None = None,
) -> AbstractContextManager[None]:
    """Make the data plate hold the rows at hand, and every other plate its full size.

    `indices` `(R,)` are the datapoints of the rows, out of `num_datapoints` in the data set. A data plate of `R` rows,
    subsampled or not, becomes `arange(R)`; an explicit subsample of `R` rows is kept. With `bound=True`, the program's
    data plate has the data set's full size and is given `indices`. With `bound=None`, such a plate raises `BoundPlate`.
    `held` `(R,)` are the rows of data that a program holds: a data plate of any size is then given these, and with
    `bound=False` has the size R.
    """
    rows = len(indices)

    def choose(name: str, size: int, requested: int | None, subsample: Any) -> Choice:
        if name != plate:
            return _whole(name, size, requested, subsample, plate, indices.device)
        if held is not None:  # perhaps an input of a record, whose values are not known
            return max(size, num_datapoints or 0, rows + 1) if bound else rows, rows, held
        if bound:
            if size <= rows == num_datapoints and not explicit(subsample) and _in_order(indices):
                return rows, rows, indices
            # Pyro selects rows of a parameter only where the plate holds fewer rows than its size.
            return max(size, num_datapoints or 0, rows + 1), rows, subsample if explicit(subsample) else indices
        if bound is None and size == num_datapoints != rows:
            raise BoundPlate(requested == rows)
        if explicit(subsample):
            return rows, rows, subsample
        if requested == rows != size:
            return rows, rows, indices
        if size == rows:
            return rows, rows, torch.arange(rows, device=indices.device)
        raise WrongSize(name, size, rows, num_datapoints)

    def explicit(subsample: Any) -> bool:
        return subsample is not None and len(subsample) == rows

    def check(messenger: SubsampleMessenger) -> None:
        if messenger.name == plate and messenger.subsample_size not in (rows, -1):
            raise InputError(
                f"plate '{plate}' was made outside the model or guide, with size {messenger.subsample_size}. Make it "
                f"inside, sized by the data, as in pyro.plate('{plate}', len(x))"
            )

    return _plates(choose, check)


def _in_order(indices: Tensor) -> bool:
    """Whether `indices` are 0, 1, ..., so that no rows need to be selected."""
    return torch.equal(indices, torch.arange(len(indices), device=indices.device))


def steady_plates() -> AbstractContextManager[None]:
    """Subsample every plate to its first rows: as many as requested, at most its size."""

    def choose(name: str, size: int, requested: int | None, subsample: Any) -> Choice:
        length = min(size, requested or size)
        return size, length, torch.arange(length) if subsample is None else subsample

    return _plates(choose, lambda messenger: None)


def _whole(
    name: str, size: int, requested: int | None, subsample: Any, plate: str | None, device: torch.device
) -> Choice:
    """The rows of a plate other than the data plate: all of them, or an explicit subsample."""
    if plate is None and requested not in (None, size):
        raise InputError(
            f"plate '{name}' is subsampled, but with plate=False the whole data set is one datapoint. Remove the "
            "subsampling, or name the data plate with plate="
        )
    if subsample is not None:
        return size, len(subsample), subsample
    return size, size, torch.arange(size, device=device)


@contextmanager
def _plates(
    choose: Callable[[str, int, int | None, Any], Choice], check: Callable[[SubsampleMessenger], None]
) -> Iterator[None]:
    """Let `choose` pick the rows of every new plate, and `check` inspect every plate around a site."""
    with one_at_a_time():
        yield from _patched(choose, check, threading.get_ident())


def _patched(
    choose: Callable[[str, int, int | None, Any], Choice], check: Callable[[SubsampleMessenger], None], thread: int
) -> Iterator[None]:
    original, process = SubsampleMessenger.__dict__["_subsample"], SubsampleMessenger._process_message

    def chosen(name, size=None, subsample_size=None, subsample=None, use_cuda=None, device=None):  # type: ignore[no-untyped-def]
        if threading.get_ident() != thread:
            return original.__func__(name, size, subsample_size, subsample, use_cuda, device)
        if size is None:
            return -1, -1, None
        requested = len(subsample) if subsample is not None else None if subsample_size is None else int(subsample_size)
        return choose(name, int(size), requested, subsample)

    def checked(messenger, message):  # type: ignore[no-untyped-def]
        if threading.get_ident() == thread:
            check(messenger)
        process(messenger, message)

    SubsampleMessenger._subsample = staticmethod(chosen)  # type: ignore[method-assign]
    SubsampleMessenger._process_message = checked  # type: ignore[method-assign]
    try:
        yield
    finally:
        SubsampleMessenger._subsample = original  # type: ignore[method-assign]
        SubsampleMessenger._process_message = process  # type: ignore[method-assign]
