"""Signatures of public functions: short ones for `help`, and one line for arguments that do not fit."""

import inspect
import operator
import re
import types
from collections.abc import Callable, Iterable, Mapping
from difflib import SequenceMatcher, get_close_matches
from functools import reduce
from inspect import Parameter
from typing import Annotated, Any, Union, get_args, get_origin

from pyrogaps.errors import InputError


def bound(signature: inspect.Signature, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], doc: str) -> Any:
    """The arguments of a call by name; `InputError` where they do not fit the signature of `name`, which has `doc`."""
    try:
        return signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise InputError(f"{name}: {error}{_hint(signature, kwargs, str(error), doc)}") from None


def readable(signature: inspect.Signature) -> inspect.Signature:
    """`signature` with the types of its annotations alone, without the limits of values."""
    parameters = [p.replace(annotation=_bare(p.annotation)) for p in signature.parameters.values()]
    return signature.replace(parameters=parameters)


def _bare(kind: Any) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _bare(parts[0])
    if origin in (Union, types.UnionType):
        return reduce(operator.or_, map(_bare, parts))
    if origin is not None and origin is not Callable and all(part in (Any, Ellipsis) for part in parts):
        return origin
    if isinstance(kind, types.GenericAlias) and origin is not Callable:
        return types.GenericAlias(origin, tuple(map(_bare, parts)))
    return kind


def _hint(signature: inspect.Signature, given: Mapping[str, Any], text: str, doc: str) -> str:
    known = {name: parameter.kind for name, parameter in signature.parameters.items() if name not in ("self", "cls")}
    unknown = next((name for name in given if name not in known), "")
    near = nearest(unknown, known, doc) if unknown else None
    meant = f" Did you mean '{near}'?" if near else ""
    by_name = [name for name, kind in known.items() if kind in (Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD)]
    in_order = [name for name in known if name not in by_name]
    takes = [", ".join(in_order)] * bool(in_order) + [f"by name {', '.join(by_name)}"] * bool(by_name)
    tuples = ". Several tensors of data are one tuple (x, y)" if "data" in in_order and "positional" in text else ""
    return f".{meant} It takes {'; '.join(takes) or 'no arguments'}{tuples}"


def nearest(unknown: str, known: Iterable[str], doc: str) -> str | None:
    """The known argument that `unknown` was most likely meant for: one spelled much the same; else one with all its
    words in its name or in its description in `doc`; else the one spelled most alike.
    """
    names = [*known]
    near = get_close_matches(unknown, names, n=1, cutoff=0.8)
    words, described = _words(unknown), _descriptions(doc)
    meant = [name for name in names if words and words <= _words(name) | _words(described.get(name, ""))]
    if not near and meant:
        return max(meant, key=lambda name: (len(words & _words(name)), SequenceMatcher(None, unknown, name).ratio()))
    return next(iter(near or get_close_matches(unknown, names, n=1)), None)


def _words(text: str) -> set[str]:
    return {word.removesuffix("s") for word in re.findall(r"[a-z0-9]{2,}", text.lower())}


def _descriptions(doc: str) -> dict[str, str]:
    """What the sections of a docstring say of each argument."""
    entries = re.findall(r"^ {4}((?:\w+, )*\w+): (.+(?:\n {8}.+)*)", inspect.cleandoc(doc), re.MULTILINE)
    return {name: text for names, text in entries for name in names.split(", ")}
