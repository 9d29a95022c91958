"""The public boundary: one call at a time, in a known state, and one line for what a user's own code raises.

Exceptions of the library itself keep their traceback: the innermost frame outside torch, Pyro, NumPy and the standard
library decides whose an exception is. The zoo and the data sets count as a user's code.
"""

import functools
import inspect
import os
import sys
import sysconfig
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from traceback import walk_tb
from types import CodeType, FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar

import numpy as np
import pyro
import torch
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK, NonlocalExit

from pyrogaps.errors import InputError
from pyrogaps.signatures import bound

P = ParamSpec("P")
Result = TypeVar("Result")
Place = tuple[CodeType, int]  # code and line number

# Pyro's handlers and param store, and torch's random state, are global to the process.
_lock = threading.RLock()


class _Thread(threading.local):
    """Whether this thread is inside a public call."""

    inside = False

    @contextmanager
    def entered(self) -> Iterator[None]:
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before


_thread = _Thread()

_PACKAGE = Path(__file__).parent
_USERS = tuple(str(_PACKAGE / name) + os.sep for name in ("models", "guides", "datasets"))
_LIBRARIES = tuple(str(Path(str(module.__file__)).parent) + os.sep for module in (torch, pyro, np))
_STANDARD = sysconfig.get_path("stdlib") + os.sep
_COMPILER_VARIABLES = ("TORCHINDUCTOR_", "TRITON_")
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")
# Arguments whose exceptions may mean that a run is to stop.
CALLBACKS = ("schedule", "callback")
MAX_LENGTH = 300
# The file of a warning that no user's line has caused, and what has been warned of there.
NOWHERE = "<pyrogaps>"
_shown: dict[Any, Any] = {}
# In what Pyro raises of handlers that are not left in order.
LEFT_OPEN = "not on the bottom of the stack"
# In what torch raises of operands that have other dtypes.
DTYPE_WORDS = ("dtype", "scalar type", "ScalarType", "bool tensor")


class ProgramError(InputError):
    """An exception of a user's own model, guide, data or family, which is its `__cause__`."""


def guarded(function: Callable[P, Result]) -> Callable[P, Result]:
    """A public function or method: see this module. Calls within another call are passed on as they are."""
    signature, name = inspect.signature(function), function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Result:
        if _thread.inside:
            return function(*args, **kwargs)
        arguments = bound(signature, name, args, kwargs, function.__doc__ or "")
        with one_at_a_time(), _known_state():
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if LEFT_OPEN in str(error):
                    raise InputError(
                        "model or guide: a plate or handler was entered and not left. Use it in a with statement"
                    ) from error
                places = _places(error.__traceback__)[1:]
                if _is_users(error, places) and (program := _program_of(places, arguments)) not in CALLBACKS:
                    raise _named(program, error, places) from error
                raise

    return call


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Wait until no other thread is inside a public call."""
    with _lock, _thread.entered():
        yield


@contextmanager
def _known_state() -> Iterator[None]:
    """Full precision, and gradients where they are asked for, in whatever context the caller is; Pyro's handlers and
    plates, warning filters and the variables that torch's compiler sets are put back.
    """
    stack, plates, filters = [*_PYRO_STACK], [*_DIM_ALLOCATOR._stack], [*warnings.filters]
    variables = {name: value for name, value in os.environ.items() if name.startswith(_COMPILER_VARIABLES)}
    try:
        with ExitStack() as contexts:
            if torch.is_inference_mode_enabled():  # in which nothing can be differentiated, inside neither
                contexts.enter_context(torch.inference_mode(False))
                contexts.enter_context(torch.no_grad())
            for device in _AUTOCAST_DEVICES:
                if torch.is_autocast_enabled(device):
                    contexts.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        _PYRO_STACK[:], _DIM_ALLOCATOR._stack[:] = stack, plates
        if warnings.filters != filters:
            warnings.filters[:] = filters  # type: ignore[index]
            warnings._filters_mutated()  # type: ignore[attr-defined]
        for name in [name for name in os.environ if name.startswith(_COMPILER_VARIABLES)]:
            if name not in variables:
                del os.environ[name]
        os.environ.update(variables)


@contextmanager
def failures_named(what: str, *, own_too: bool = False) -> Iterator[None]:
    """Turn an exception of a user's code, which the block calls directly, into a `ProgramError`.

    `own_too`: exceptions of the library as well, for what it is given by a recipe or a file.
    """
    try:
        yield
    except Exception as error:
        # Without the frames of this generator and of the block.
        places = _places(error.__traceback__)[2:]
        if not _is_passed_on(error) and (own_too or _culprit(places) is None or _is_users(error, places)):
            raise _named(what, error, places) from error
        raise


def warn(message: str, place: tuple[str, int] | None = None) -> None:
    """Warn as of the `place` in a user's code, file and line; by default of the line that called the library."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (_is_library(at := (frame.f_code, frame.f_lineno)) or _is_own(at)):
        frame = frame.f_back
    if place is None:
        place = (NOWHERE, 1) if frame is None else (frame.f_code.co_filename, frame.f_lineno)
    shown = _shown if frame is None else frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, UserWarning, *place, registry=shown)


def innermost_place(error: BaseException) -> tuple[str, int] | None:
    """File and line of the innermost frame of a user's code; None where there is none."""
    place = _culprit(_places(error.__traceback__))
    return None if place is None or _is_own(place) else (place[0].co_filename, place[1])


def described(error: BaseException) -> str:
    """An exception in one line, with file and line number of the innermost frame outside libraries."""
    return _line(error, _culprit(_places(error.__traceback__)))


def _named(what: str, error: Exception, places: list[Place]) -> ProgramError:
    culprit = _culprit(places)
    return ProgramError(f"{what} failed: {_line(error, culprit)}{_hint(error, culprit)}")


def _is_users(error: Exception, places: list[Place]) -> bool:
    """Whether an exception is the fault of code outside the library and the libraries that it uses."""
    culprit = _culprit(places)
    return not _is_passed_on(error) and culprit is not None and not _is_own(culprit)


def _is_passed_on(error: Exception) -> bool:
    """Whether an exception is one line already, Pyro's own means of control, or the machine's."""
    return (
        isinstance(error, InputError | NonlocalExit)
        or is_out_of_memory(error)
        or type(error).__module__.partition(".")[0] == "pyrogaps"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, in whichever way torch says it."""
    exhausted = isinstance(error, RuntimeError) and ("out of memory" in str(error) or "allocate memory" in str(error))
    return exhausted or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _places(traceback: TracebackType | None) -> list[Place]:
    return [(frame.f_code, line) for frame, line in walk_tb(traceback)]


def _culprit(places: list[Place]) -> Place | None:
    """The innermost place outside libraries; None where there is none."""
    return next((place for place in reversed(places) if not _is_library(place)), None)


def _is_library(place: Place) -> bool:
    file = place[0].co_filename
    standard = file.startswith(_STANDARD) and "-packages" not in file
    # torch names the files of recorded and compiled programs in its own way.
    return standard or file.startswith((*_LIBRARIES, "<frozen", "<eval_with_key")) or "torchinductor" in file


def _is_own(place: Place) -> bool:
    file = place[0].co_filename
    return file.startswith(str(_PACKAGE) + os.sep) and not file.startswith(_USERS)


def _line(error: BaseException, place: Place | None) -> str:
    message = " ".join(str(error).partition("Trace Shapes:")[0].split())  # which Pyro adds, a line for each site
    message = message if len(message) <= MAX_LENGTH else f"{message[:MAX_LENGTH]}..."
    kind = type(error).__name__ + (f": {message}" if message else "")
    if place is None or isinstance(error, SyntaxError):  # which says where in its message
        return kind
    return f"{kind} ({Path(place[0].co_filename).name}, line {place[1]})"


def _hint(error: Exception, place: Place | None) -> str:
    text = str(error)
    if isinstance(error, TypeError) and place is None and "argument" in text:
        return (
            ". It is called with the arguments that the data give: a tensor is one, a tuple or an item (x, y) two. "
            "Pass only what the programs take"
        )
    if isinstance(error, RuntimeError) and any(word in text for word in DTYPE_WORDS):
        return ". Convert the data and the parameters to one dtype, as in x.float()"
    if isinstance(error, ValueError) and "Shape mismatch inside plate" in text:
        return (
            ". Dimensions to the right of the plate's belong to the event: declare them, as in "
            "Normal(loc, scale).to_event(1)"
        )
    return ""


def _program_of(places: list[Place], arguments: Mapping[str, Any]) -> str:
    """The argument of the public call whose code comes first in `places`, or that code's name."""
    first = next(code for code, line in places if not _is_library((code, line)) and not _is_own((code, line)))
    return next((name for name, value in arguments.items() if first in _codes(value)), first.co_qualname)


def _codes(program: Any) -> set[CodeType]:
    """The code that runs when `program` is called."""
    program = program.func if isinstance(program, functools.partial) else program
    parts = (program, getattr(type(program), "forward", None), type(program).__call__ if callable(program) else None)
    functions = [inspect.unwrap(getattr(part, "__func__", part)) for part in parts if callable(part)]
    return {function.__code__ for function in functions if hasattr(function, "__code__")}
