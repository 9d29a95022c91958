"""What a setting may be: declared by the annotation of its field or argument, and checked before anything runs.

`@checked()` on a function, or `@checked("section")` on a class, refuses arguments that do not fit their annotations by
one `InputError`, such as "refinement.num_steps: must be a whole number of at least 1, got 0". NumPy's scalars and
tensors without dimensions are numbers here, and arrive as Python's. Kinds that are no settings, such as data and
latents, are left to who takes them.
"""

import functools
import inspect
import math
import operator
import os
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from pyrogaps.errors import InputError
from pyrogaps.signatures import bound, readable

Target = TypeVar("Target", bound=Callable[..., Any])
REFUSED: Any = object()
COMPARISONS = {"of at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
NUMBERS: dict[Any, Any] = {int: Integral, float: Real}
SCALARS = {bool: "True or False", int: "a whole number", float: "a number", str: "a string", types.NoneType: "None"}
SEQUENCES, MAPPINGS = (list, tuple, Sequence), (dict, Mapping)
WORDS: dict[Any, str] = SCALARS | dict.fromkeys(SEQUENCES, "a sequence") | dict.fromkeys(MAPPINGS, "a mapping")
WORDS |= {Callable: "callable", os.PathLike: "a path"}


@dataclass(frozen=True, repr=False)
class Limit:
    """What holds for a setting: a `test`, which may raise an error instead, and its words in messages, which follow
    the setting's kind ("of at least 1") or take its place ("a non-empty string"); and what to do about others.
    """

    words: str
    test: Callable[[Any], Any] = lambda value: True
    remedy: str = ""

    def __repr__(self) -> str:
        return self.words


def within(words: str) -> Limit:
    """Finite numbers in a range, such as "of at least 1" or "above 0 and below 1"."""
    bounds = [part.rsplit(" ", 1) for part in words.split(" and ")]
    return Limit(words, lambda n: n < math.inf and all(COMPARISONS[name](n, float(bound)) for name, bound in bounds))


Whole = Annotated[int, within("of at least 0")]
Count = Annotated[int, within("of at least 1")]
Several = Annotated[int, within("of at least 2")]
NonNegative = Annotated[float, within("of at least 0")]
Positive = Annotated[float, within("above 0")]
Probability = Annotated[float, within("above 0 and below 1")]
Seed = Annotated[int, Limit("of 64 bits", lambda seed: torch.Generator().manual_seed(seed))]
Name = Annotated[str, Limit("a non-empty string", str.strip)]
File: TypeAlias = Name | os.PathLike[str]
DeviceName = Annotated[str, Limit("a device such as cpu, cuda or cuda:1", torch.device)]
Device: TypeAlias = torch.device | DeviceName
Sample: TypeAlias = Count | Literal[False]
Plate: TypeAlias = Name | Literal[False] | None


def checked(section: str = "") -> Callable[[Target], Target]:
    """A decorator that checks what a function, or a class called `section` in messages, is given."""

    def decorate(target: Target) -> Target:
        if isinstance(target, type):
            target.__init__ = _checking(target.__init__, f"{section}.", target.__doc__)  # type: ignore[misc]
            return target
        return cast(Target, _checking(target, "", target.__doc__))

    return decorate


def checked_arguments(function: Callable[..., Any], given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Named arguments of `function`, each as its annotation has it; those that it does not annotate as they are."""
    kinds = _annotations(function)
    return {name: conform(prefix + name, kinds.get(name, Any), value) for name, value in given.items()}


def conform(name: str, kind: Any, value: Any) -> Any:
    """`value` as the annotation `kind` has it; raises `InputError`, which begins with `name`, where it does not fit."""
    fitted = _fit(name, kind, value)
    if fitted is REFUSED:
        remedy = "".join(f". {limit.remedy}" for limit in get_args(kind)[1:] if getattr(limit, "remedy", ""))
        shown = _shown(kind, _plain(value)) + ("" if remedy else _written(kind, value))
        raise InputError(f"{name}: must be {_described(kind)}, got {shown}{remedy}")
    return fitted


def is_plain(kind: Any) -> bool:
    """Whether the annotation is of numbers, text and collections of them alone."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Annotated, Union, types.UnionType, list, Sequence, *MAPPINGS) or Ellipsis in parts:
        return all(is_plain(part) for part in (parts[:1] if origin in (Annotated, tuple) else parts))
    return origin is Literal or kind in SCALARS or kind is Any


def _checking(function: Callable[..., Any], prefix: str, doc: str | None) -> Callable[..., Any]:
    code, signature = function.__code__, inspect.signature(function)
    names, called = code.co_varnames[: code.co_argcount], function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound(signature, called, args, kwargs, doc or "")
        try:
            given = checked_arguments(function, dict(zip(names, args, strict=False)), prefix)
        except InputError as error:
            if prefix or not any(isinstance(value, np.ndarray | Tensor) for value in args[: len(names) - 1]):
                raise
            order = ", ".join(name for name in names if name not in ("self", "cls"))
            raise InputError(f"{error}. {called} takes {order}, in this order") from None
        return function(*given.values(), *args[len(names) :], **checked_arguments(function, kwargs, prefix))

    call.__signature__ = readable(signature)  # type: ignore[attr-defined]
    return call


@functools.cache
def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(function, include_extras=True)


def _fit(name: str, kind: Any, value: Any) -> Any:
    """`value` in the form of `kind`, or `REFUSED`."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        fitted = _fit(name, parts[0], value)
        return fitted if fitted is not REFUSED and _holds(parts[1], fitted) else REFUSED
    if origin in (Union, types.UnionType):
        return next((fitted for part in parts if (fitted := _fit(name, part, value)) is not REFUSED), REFUSED)
    if origin in (list, Sequence) or (origin is tuple and Ellipsis in parts):
        one = isinstance(value, str | bytes) or getattr(value, "ndim", 1) == 0
        if one or not isinstance(value, Sequence | np.ndarray | Tensor):
            return REFUSED
        items = [conform(f"{name}[{place}]", parts[0], item) for place, item in enumerate(value)]
        return items if origin is list else (*items,)
    if origin in MAPPINGS and isinstance(value, Mapping):
        keys = [conform(f"{name}: a key", parts[0], key) for key in value]
        return {key: conform(f"{name}.{key}", parts[1], value[key]) for key in keys}
    if origin is Literal:
        return next((part for part in parts if type(part) is type(_plain(value)) and part == value), REFUSED)
    if kind in SCALARS:
        return _scalar(kind, _plain(value))
    if origin is Callable:
        return value if callable(value) else REFUSED
    if origin is type:
        return value if isinstance(value, type) and issubclass(value, parts[0]) else REFUSED
    return value if _is_opaque(kind) or isinstance(value, origin or kind) else REFUSED


def _holds(limit: Limit, value: Any) -> bool:
    try:
        return bool(limit.test(value))
    except (ValueError, RuntimeError):
        return False


def _scalar(kind: type, value: Any) -> Any:
    if kind not in NUMBERS:
        return value if isinstance(value, kind) else REFUSED
    try:
        return kind(value) if isinstance(value, NUMBERS[kind]) and not isinstance(value, bool) else REFUSED
    except OverflowError:  # a whole number that no float is as large as
        return REFUSED


def _plain(value: Any) -> Any:
    """A number of NumPy or torch as Python's; anything else as it is."""
    scalar = isinstance(value, np.generic) or (isinstance(value, np.ndarray | Tensor) and value.ndim == 0)
    return value.item() if scalar else value


def _is_opaque(kind: Any) -> bool:
    protocol = getattr(kind, "_is_protocol", False) and not getattr(kind, "_is_runtime_protocol", False)
    return kind in (Any, Tensor) or protocol or not isinstance(get_origin(kind) or kind, type)


def _described(kind: Any) -> str:
    """The kind in words, as they follow "must be"."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        words = str(parts[1])
        return words if words.startswith("a ") else f"{_described(parts[0])} {words}"
    if origin in (Union, types.UnionType):
        *first, last = (_described(part) for part in parts)
        return f"{', '.join(first)} or {last}"
    if origin is Literal:
        return f"one of {', '.join(parts)}" if len(parts) > 1 else repr(parts[0])
    if origin is type:
        return f"a subclass of {parts[0].__name__}"
    name = getattr(kind, "__name__", str(kind))
    return WORDS.get(origin or kind) or f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _written(kind: Any, value: Any) -> str:
    """How to write what was asked for, where that is an object of one class of settings."""
    classes = [part for part in get_args(kind) or (kind,) if isinstance(part, type) and is_dataclass(part)]
    return f"; write {classes[0].__name__}(...)" if len(classes) == 1 and not isinstance(value, type) else ""


def _shown(kind: Any, value: Any) -> str:
    """A refused value in few words."""
    if isinstance(value, type):
        instance = any(isinstance(part, type) and issubclass(value, part) for part in get_args(kind) or (kind,))
        return f"the class {value.__name__}" + (f"; write {value.__name__}()" if instance else "")
    text = repr(value) if isinstance(value, bool | int | float | str | list | tuple | dict | types.NoneType) else ""
    return text if text and len(text) < 80 and "\n" not in text else f"a {type(value).__name__}"
