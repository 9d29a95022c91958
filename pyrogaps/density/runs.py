"""Running a caller's Pyro program without leaving a trace of it: plates made whole, global state put back."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor, nn

from pyrogaps.errors import InputError

Program = Callable[..., Any]
Choice = tuple[int, int, Any]


def modules_of(program: Program) -> list[nn.Module]:
    """The torch modules that a program is, is a method of, or closes over."""
    program = inspect.unwrap(program) if inspect.isfunction(program) else program
    candidates: list[Any] = [program, getattr(program, "__self__", None)]
    function = getattr(program, "__func__", program)
    if inspect.isfunction(function):
        variables = inspect.getclosurevars(function)
        candidates += [*variables.nonlocals.values(), *variables.globals.values()]
    return [candidate for candidate in candidates if isinstance(candidate, nn.Module)]


@contextmanager
def evaluating(*programs: Program) -> Iterator[None]:
    """Evaluation mode for `programs`; puts back the caller's train/eval modes, default dtype and validation setting.

    Parameters are read from the caller's own param store; entries that a program adds meanwhile are removed.
    """
    store = pyro.get_param_store()
    names = set(store.keys())
    modes = {module: module.training for program in programs for m in modules_of(program) for module in m.modules()}
    dtype = torch.get_default_dtype()
    try:
        with pyro.validation_enabled(False):
            for module in modes:
                module.training = False
            yield
    finally:
        torch.set_default_dtype(dtype)
        for module, mode in modes.items():
            module.training = mode
        for name in set(store.keys()) - names:
            del store[name]


@contextmanager
def whole_plates(
    plate: str | None, indices: Tensor, *, num_datapoints: int | None = None, bound: bool | None = False
) -> Iterator[None]:
    """Make every plate cover all of its range: the data plate the rows at hand, others their full size.

    `indices` `(R,)` are the datapoints behind the rows. A data plate of `R` rows, subsampled or not, becomes
    `arange(R)`; one that keeps the data set's size and names a subsample of `R` rows (Pyro's idiom for minibatches)
    is given `indices`. `bound=True` marks a program whose plate always has the data set's full size, with
    parameters of its own for each datapoint: it is given `indices` too. `bound=None` raises `BoundPlate` for one.
    """
    rows = len(indices)

    def choose(name: str, size: Any, subsample_size: Any, subsample: Any) -> Choice:
        if name != plate and plate is not None and subsample is not None:
            return int(size), len(subsample), subsample
        if name != plate:
            if plate is None and _length(subsample_size, subsample) not in (None, int(size)):
                raise InputError(
                    f"plate '{name}' is subsampled: with plate=False the whole data set is one datapoint, "
                    "so remove the subsampling or name the data plate with plate="
                )
            return int(size), int(size), torch.arange(int(size), device=indices.device)
        if bound:
            # Pyro picks the rows of parameters only where it sees fewer of them than the plate's size.
            return max(num_datapoints or 0, rows + 1), rows, indices
        requested = _length(subsample_size, subsample)
        if int(size) == rows:
            return rows, rows, torch.arange(rows, device=indices.device)
        if requested == rows:
            return rows, rows, indices if subsample is None else subsample
        if bound is None and int(size) == num_datapoints:
            raise BoundPlate
        raise InputError(
            f"plate '{name}' has the hard-coded size {int(size)} where the data hold {rows} rows: "
            f"size it by the data, as in pyro.plate('{name}', len(x)); fetch(indices), if any, must return a row for each index"
        )

    def check(messenger: SubsampleMessenger) -> None:
        if messenger.name == plate and messenger.subsample_size not in (rows, -1):
            raise InputError(
                f"plate '{plate}' was made outside the program with size {messenger.subsample_size}; make it inside the "
                f"program, sized by the data, as in pyro.plate('{plate}', len(x))"
            )

    with _plates(choose, check):
        yield


def steady_plates() -> AbstractContextManager[None]:
    """Subsample every plate as its program asks, but by its first rows and never by more than it has."""

    def choose(name: str, size: Any, subsample_size: Any, subsample: Any) -> Choice:
        length = min(int(size), _length(subsample_size, subsample) or int(size))
        return int(size), length, torch.arange(length) if subsample is None else subsample

    return _plates(choose, lambda messenger: None)


@contextmanager
def _plates(choose: Callable[..., Choice], check: Callable[[SubsampleMessenger], None]) -> Iterator[None]:
    """Have `choose` say which rows a new plate holds, and `check` look at every plate that a site is in."""
    subsample, process = SubsampleMessenger.__dict__["_subsample"], SubsampleMessenger._process_message

    def chosen(name, size=None, subsample_size=None, subsample=None, use_cuda=None, device=None):  # type: ignore[no-untyped-def]
        if size is None:
            return -1, -1, None
        return choose(name, size, subsample_size, subsample)

    def checked(messenger, message):  # type: ignore[no-untyped-def]
        check(messenger)
        process(messenger, message)

    SubsampleMessenger._subsample = staticmethod(chosen)  # type: ignore[method-assign]
    SubsampleMessenger._process_message = checked  # type: ignore[method-assign]
    try:
        yield
    finally:
        SubsampleMessenger._subsample = subsample
        SubsampleMessenger._process_message = process  # type: ignore[method-assign]


class BoundPlate(Exception):
    """A guide's data plate has the data set's full size: it holds parameters for each datapoint."""


def _length(subsample_size: int | None, subsample: Any) -> int | None:
    return len(subsample) if subsample is not None else None if subsample_size is None else int(subsample_size)
