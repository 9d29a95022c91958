"""Docstrings for Sphinx: the library's use Markdown's code and mathematics, autodoc reads reStructuredText."""

import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pyrogaps as pg
from pyrogaps.density import Data

# Code in single backticks, mathematics between dollars; everything else is prose.
SPAN = re.compile(r"(`[^`]+`)|\$([^$]+)\$")

# Names that docstrings mean by their bare words. Others, such as `elbo` and `refine`, are columns and settings too.
LINKED = {name: f"pyrogaps.{name}" for name in pg.__all__ if name[0].isupper() or name.startswith("plot_")}
LINKED |= {name: f"pyrogaps.{name}" for name in ("calibrate", "decompose", "mapa_posterior", "posterior_grid")}
LINKED |= {name: f"pyrogaps.{name}" for name in ("reference_guide", "shared_posterior", "to_datatree")}
LINKED["Estimate"] = "pyrogaps.log_weights.Estimate"


def process(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """The handler of `autodoc-process-docstring`: translate `lines` in place.

    The attributes of a class of settings are what it is called with, and get their types and defaults as arguments.
    """
    if dataclasses.is_dataclass(item) and all(_has_default(field) for field in dataclasses.fields(item)):
        lines[:] = ["Args:" if line == "Attributes:" else line for line in lines]
    lines[:] = translated(lines)


def signature(app: Any, what: str, name: str, item: Any, *_: Any) -> tuple[str, None] | None:
    """The handler of `autodoc-process-signature`: names and defaults. Types stand with the descriptions."""
    if what not in ("function", "class", "method"):
        return None
    try:
        parameters = inspect.signature(item).parameters.values()
    except (TypeError, ValueError):
        return None
    names = [p.replace(annotation=p.empty) for p in parameters if not p.name.startswith("_")]
    if what == "method" and names and names[0].name == "self":
        names = names[1:]
    return str(inspect.Signature(names)), None


def _has_default(field: Any) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def translated(lines: list[str]) -> Iterator[str]:
    """Fences become literal blocks, `$$` blocks become directives, spans become roles."""
    fenced, formula = False, False
    margin = ""
    for line in lines:
        text = line.strip()
        if not fenced and not formula:
            margin = line[: len(line) - len(line.lstrip())]
        if text.startswith("```"):
            fenced = not fenced
            yield from (["", f"{margin}::", ""] if fenced else [""])
        elif fenced:
            yield f"    {line}"
        elif formula or text.startswith("$$"):
            if not formula:
                yield from ("", f"{margin}.. math::", "")
            formula = text.count("$$") == 0 if formula else text.count("$$") == 1
            yield f"{margin}    {text.replace('$$', '').strip()}"
            if not formula:
                yield ""
                rest = text.rsplit("$$", 1)[1].strip(" ,")
                assert not rest, f"text after a formula: {line}"
        elif text.startswith((">>>", "...")):
            yield line
        else:
            yield prose(line)


def prose(line: str) -> str:
    """A line of text with its spans as roles, and what would be markup to reStructuredText escaped."""
    parts, end = [], 0
    for match in SPAN.finditer(line):
        code, formula = match.groups()
        parts += [escaped(line[end : match.start()]), _code(code.strip("`")) if code else f":math:`{formula}`"]
        end = match.end()
    return "".join([*parts, escaped(line[end:])])


def _code(text: str) -> str:
    place = LINKED.get(text.removesuffix("(...)"))
    return f":py:obj:`{text} <{place}>`" if place else f"``{text}``"


def escaped(text: str) -> str:
    """Bars, underscores at the ends of words and stars that open nothing are markup to reStructuredText alone."""
    return re.sub(r"\||(?<=\w)_(?!\w)|(?<![\w*])\*(?=\w)(?![\w ,-]*\w\*)", lambda match: "\\" + match.group(), text)


def type_words(kind: Any, config: Any = None) -> str | None:
    """An annotation without the limits of settings, which messages name; programs and data by these words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return type_words(parts[0])
    if kind is None or kind is types.NoneType:
        return "``None``"
    if origin in (Union, types.UnionType):
        rest = [*parts]
        if set(get_args(Data)) <= set(rest):
            rest = [part for part in rest if part not in get_args(Data)]
            return " | ".join([":doc:`data </howto/bring>`", *(type_words(part) or "" for part in rest)])
        return " | ".join(dict.fromkeys(type_words(part) or "" for part in rest))
    if origin is Literal:
        return " | ".join(f"``{part!r}``" for part in parts)
    if origin is Callable or getattr(origin, "__name__", "") == "Callable":
        return "``callable``"
    if origin is None and isinstance(kind, type):
        place = LINKED.get(kind.__name__)
        return f":py:obj:`~{place}`" if place and kind.__module__.startswith("pyrogaps") else f"``{kind.__name__}``"
    return f"``{_plain(kind)}``"


def _plain(kind: Any) -> str:
    """A generic type in words without links, such as Mapping[str, callable]."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is None or not parts:
        return "..." if kind is Ellipsis else getattr(kind, "__name__", str(kind).removeprefix("typing."))
    if origin is Annotated:
        return _plain(parts[0])
    if getattr(origin, "__name__", "") == "Callable":
        return "callable"
    if origin in (Union, types.UnionType, Literal):
        return " | ".join(repr(part) if origin is Literal else _plain(part) for part in parts)
    return f"{origin.__name__}[{', '.join(map(_plain, parts))}]"
